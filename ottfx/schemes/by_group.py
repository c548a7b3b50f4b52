"""What schemes share whose keys have codes of their own by groups of tokens, and whose values are those of `kivi`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ottfx.affine_read import read_tokens
from ottfx.schemes.base import PAGE, CacheShape, Role, Scheme, TensorSpec
from ottfx.schemes.kivi import KIVI, KIVIConfig

Config = TypeVar("Config", bound=KIVIConfig)

VALUES = KIVI()
"""Stores the values."""
SHARED_STATE = (
    "key_residual", "residual_valid", "value_codes", "value_scale", "value_zero_point", "value_residual",
)  # fmt: skip
"""State tensors that all these schemes have, behind those of their keys."""


class ByGroupScheme(Scheme[Config]):
    """Keys and values gather in a window of `residual_length` tokens and leave it all at once, as keys of `kivi` do.

    Values leave together with the keys, not one by one. A subclass says how keys are coded.
    """

    @abstractmethod
    def key_spec(self, config: Config, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name the tensors that hold codes of keys; pages are axis 2 of each."""

    @abstractmethod
    def decode_keys(self, config: Config, state: Mapping[str, Tensor], head_dim: int) -> Tensor:
        """Return the keys of whole pages, fp32 [batch, num_kv_heads, pages * PAGE, head_dim]; `state` as `key_spec`."""

    def check(self, config: Config, shape: CacheShape) -> str | None:
        """Say why a site of this shape cannot be stored, or None."""
        return VALUES.check(config, shape)

    def schedule(self, config: Config, role: Role) -> tuple[int, int]:
        """Keys and values: all `residual_length` at once."""
        return 0, config.residual_length

    def ring_rows(self, config: Config) -> int:
        """Return how many tokens gather."""
        return config.residual_length

    def state_spec(self, config: Config, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name every state tensor of one half; layouts in docs/storage.md."""
        if role == "value":
            return VALUES.state_spec(config, role, shape)
        ring = (shape.batch_size, shape.num_kv_heads, config.residual_length, shape.head_dim)
        return self.key_spec(config, shape) | {
            "key_residual": TensorSpec(shape=ring, dtype=shape.dtype, part="residual"),
            "residual_valid": TensorSpec(
                shape=(shape.batch_size, config.residual_length), dtype=torch.uint8, part="tables"
            ),
        }

    def read(self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens; those in the window are exact."""
        return self._read(config, role, state, packed, 0, length)

    def _read(
        self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, start: int, stop: int
    ) -> Tensor:
        if role == "value":
            return read_tokens(role, state, config.bits_of(role), packed, start, stop)
        first = start // PAGE
        count = -(-stop // PAGE) - first
        ring = state["key_residual"]
        paged = {name: tensor for name, tensor in state.items() if name not in SHARED_STATE}
        pages = {name: tensor.narrow(2, first, count) for name, tensor in paged.items()}
        coded = self.decode_keys(config, pages, ring.shape[-1])
        position = torch.arange(start, stop, device=ring.device)
        window = ring.index_select(2, torch.remainder(position, ring.shape[2]))
        coded = coded.narrow(2, start - first * PAGE, stop - start).to(ring.dtype)
        return torch.where((position >= packed).unsqueeze(-1), window, coded)

    def rewind(
        self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        """Forget every token from `length` on; what stays packed are whole groups of `group_size` tokens."""
        remaining = min(packed, length // config.group_size * config.group_size)
        # Those of a cut group whose rows hold other tokens by now come back as what they are read as.
        overwritten = min(packed - in_ring, length)
        if remaining < overwritten:
            ring = state[f"{role}_residual"]
            row = torch.remainder(torch.arange(remaining, overwritten, device=ring.device), ring.shape[2])
            ring.index_copy_(2, row, self._read(config, role, state, packed, remaining, overwritten))
            if role == "key":
                state["residual_valid"].index_fill_(1, row, 1)
        return remaining
