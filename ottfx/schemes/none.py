"""`none`: the cache in full precision, through the same machinery: what the pass itself costs and changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ottfx.ops import bind
from ottfx.registry import register_scheme
from ottfx.schemes.base import (
    ANY_LENGTH,
    PAGE,
    CacheShape,
    Role,
    Scheme,
    SchemeConfig,
    TensorSpec,
    is_always,
    new_positions,
)


@dataclass(frozen=True, kw_only=True)
class NoneConfig(SchemeConfig):
    """`none` has no options."""

    scheme = "none"

    def describe(self) -> str:
        """One line for reports."""
        return "none, full precision"


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, key_data: Tensor, value_data: Tensor
) -> None:
    position = new_positions(lengths, site, key.shape[2])
    key_data.index_copy_(2, position, key)
    value_data.index_copy_(2, position, value)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float, key_data: Tensor, value_data: Tensor,
) -> Tensor:  # fmt: skip
    if is_always(past_length, ANY_LENGTH):
        position = new_positions(lengths, site, key.shape[2])
        full_key = key_data.index_copy(2, position, key)
        full_value = value_data.index_copy(2, position, value)
        mask = _hide_behind(position[-1], key_data.shape[2], mask)
    else:
        torch._check(past_length <= key_data.shape[2])
        full_key = torch.cat([key_data.narrow(2, 0, past_length), key], dim=2)
        full_value = torch.cat([value_data.narrow(2, 0, past_length), value], dim=2)
    return F.scaled_dot_product_attention(
        query,
        full_key,
        full_value,
        attn_mask=mask,
        scale=softmax_scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


def _hide_behind(last: Tensor, capacity: int, mask: Tensor | None) -> Tensor:
    """The mask with `capacity` columns, of which those after `last`, a 0-d int64 tensor, are hidden."""
    stored = torch.arange(capacity, device=last.device) <= last
    if mask is None:
        return stored[None, None, None]
    return mask & stored if mask.dtype == torch.bool else torch.where(stored, mask, -torch.inf)


@register_scheme
class NoneScheme(Scheme[NoneConfig]):
    """Keys and values as the model made them, dense `[batch, num_kv_heads, pages * PAGE, head_dim]`.

    Attention is `scaled_dot_product_attention` over the stored and the new tokens, as in the model.
    """

    name = "none"
    config_class = NoneConfig
    citation = "No quantization."
    append_op = bind("none_append", _append, mutates=("key_data", "value_data"))
    attend_op = bind("none_attend", _attend)

    def check(self, config: NoneConfig, shape: CacheShape) -> str | None:
        """Say why a site cannot be stored: only floats can."""
        if not shape.dtype.is_floating_point:
            return f"dtype must be a float, got {str(shape.dtype).removeprefix('torch.')}"
        return None

    def state_spec(self, config: NoneConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """One dense tensor a half."""
        size = (shape.batch_size, shape.num_kv_heads, shape.pages * PAGE, shape.head_dim)
        return {f"{role}_data": TensorSpec(shape=size, dtype=shape.dtype, part="dense", paged_dim=2)}

    def constants(self, config: NoneConfig) -> tuple[()]:
        """No trailing operands."""
        return ()

    def read(self, config: NoneConfig, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Copy the first `length` tokens."""
        return state[f"{role}_data"].narrow(2, 0, length).clone()

    def rewind(
        self, config: NoneConfig, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        """Nothing to do: later tokens are overwritten."""
        return 0
