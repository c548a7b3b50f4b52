"""A scheme that stores tokens as they are, so that a rewritten graph must give the numbers of the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ottfx.schemes.base import PAGE, CacheShape, Role, Scheme, SchemeConfig, TensorSpec


@torch.library.custom_op("ottfx_test_passes::lossless_append", mutates_args=("key_tokens", "value_tokens"))
def lossless_append(
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    key_tokens: Tensor,
    key_unused: Tensor,
    value_tokens: Tensor,
    value_unused: Tensor,
    answer: int,
) -> None:
    assert answer == 42 and (mask is None or mask.dim() == 4)
    past, q_len = int(lengths[site, 0]), key.shape[2]
    key_tokens[:, :, past : past + q_len] = key
    value_tokens[:, :, past : past + q_len] = value


@torch.library.custom_op("ottfx_test_passes::lossless_attend", mutates_args=())
def lossless_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    past_length: int,
    softmax_scale: float,
    key_tokens: Tensor,
    key_unused: Tensor,
    value_tokens: Tensor,
    value_unused: Tensor,
    answer: int,
) -> Tensor:
    assert answer == 42 and (mask is None or mask.dim() == 4)
    assert int(lengths[site, 0]) == past_length
    assert key_tokens[:, :, past_length:].isnan().all(), "append ran before attend"
    repeats = query.shape[1] // key.shape[1]
    keys = torch.cat([key_tokens[:, :, :past_length], key], dim=2).repeat_interleave(repeats, dim=1)
    values = torch.cat([value_tokens[:, :, :past_length], value], dim=2).repeat_interleave(repeats, dim=1)
    scores = query @ keys.transpose(-1, -2) * softmax_scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A row with nothing to attend gives 0, as `scaled_dot_product_attention` does.
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ values


@lossless_attend.register_fake
def _(query: Tensor, *operands: Any) -> Tensor:
    return torch.empty_like(query)


@dataclass(frozen=True, kw_only=True)
class LosslessConfig(SchemeConfig):
    scheme = "lossless"


class Lossless(Scheme):
    name = "lossless"
    config_class = LosslessConfig
    citation = ""
    append_op = torch.ops.ottfx_test_passes.lossless_append.default
    attend_op = torch.ops.ottfx_test_passes.lossless_attend.default

    def check(self, config: SchemeConfig, shape: CacheShape) -> str | None:
        return None

    def state_spec(self, config: SchemeConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        tokens = (shape.batch_size, shape.num_kv_heads, shape.pages * PAGE, shape.head_dim)
        return {
            f"{role}_tokens": TensorSpec(shape=tokens, dtype=shape.dtype, part="dense", fill=float("nan"), paged_dim=2),
            f"{role}_unused": TensorSpec(shape=(shape.batch_size, 1), dtype=torch.uint8, part="tables"),
        }

    def constants(self, config: SchemeConfig) -> tuple[Any, ...]:
        return (42,)

    def read(self, config: SchemeConfig, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        return state[f"{role}_tokens"][:, :, :length]

    def rewind(
        self, config: SchemeConfig, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        return 0


LOSSLESS = Lossless()
