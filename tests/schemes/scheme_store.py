"""A cache of one layer, driven through the scheme's ops exactly as the graph pass drives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf
from ottfx.registry import get_scheme
from ottfx.schemes.base import PAGE, ROLES, CacheShape, Role, SchemeConfig


class Store:
    """Both halves of one layer."""

    def __init__(
        self,
        config: SchemeConfig,
        batch_size: int = 1,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        max_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.scheme = get_scheme(config.scheme)
        self.config = config
        self.shape = CacheShape(
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            pages=max(2, self.scheme.pages_needed(config, max_length)),
            dtype=dtype,
            device=torch.device(device),
        )
        assert self.scheme.check(config, self.shape) is None
        self.halves: dict[Role, CacheHalf] = {
            role: CacheHalf.allocate(self.scheme, config, role, self.shape) for role in ROLES
        }

    @property
    def state(self) -> dict[Role, dict[str, Tensor]]:
        return {role: half.tensors for role, half in self.halves.items()}

    @property
    def length(self) -> int:
        return self.halves["key"].high

    @property
    def packed(self) -> dict[Role, int]:
        return {role: half.packed for role, half in self.halves.items()}

    def lengths(self) -> Tensor:
        row = [self.length, self.packed["key"], self.packed["value"]]
        return torch.tensor([[7, 7, 7], row], dtype=torch.int64, device=self.shape.device)

    def tail_operands(self) -> tuple[Any, ...]:
        state = [tensor for role in ROLES for tensor in self.state[role].values()]
        return (*state, *self.scheme.constants(self.config))

    def append(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        self.scheme.append_op(key, value, mask, self.lengths(), 1, *self.tail_operands())
        self.advance(self.length + key.shape[2])

    def advance(self, length: int) -> None:
        for half in self.halves.values():
            half.advance(length)

    def append_in_chunks(self, key: Tensor, value: Tensor, sizes: list[int], valid: Tensor | None = None) -> None:
        start = 0
        for size in sizes:
            stop = start + size
            mask = None if valid is None else valid[:, None, None, :stop]
            self.append(key[:, :, start:stop], value[:, :, start:stop], mask)
            start = stop
        assert start == key.shape[2]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, softmax_scale: float = 0.125
    ) -> Tensor:
        return self.scheme.attend_op(
            query, key, value, mask, self.lengths(), 1, self.length, softmax_scale, *self.tail_operands()
        )

    def read(self, role: Role) -> Tensor:
        return self.halves[role].read(self.length)

    def crop(self, length: int) -> None:
        for half in self.halves.values():
            half.rewind(length)

    def pool_positions(self, batch: int, head: int) -> tuple[set[int], set[int]]:
        """Positions in the pool and in the spill pool of one head."""
        seats = self.config.outlier_capacity
        position = self.state["key"]["outlier_position"][batch, head].tolist()
        return {p for p in position[:seats] if p >= 0}, {p for p in position[seats:] if p >= 0}


def random_tokens(
    batch_size: int, heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tokens with a common offset in every channel and norms that differ by a factor of ten."""
    offset = 2 * torch.randn(1, heads, 1, head_dim)
    size = torch.rand(batch_size, heads, length, 1) * 0.9 + 0.1
    return ((offset + 0.3 * torch.randn(batch_size, heads, length, head_dim)) * size).to(dtype)


def state_difference(one: Store, two: Store) -> list[str]:
    """Names of the state tensors in which two stores differ."""
    return [
        name
        for role in ROLES
        for name in one.state[role]
        if not torch.equal(one.state[role][name], two.state[role][name])
    ]


__all__ = ["PAGE", "ROLES", "Store", "random_tokens", "state_difference"]
