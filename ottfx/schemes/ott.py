"""`ott`: affine codes, with the tokens that would spoil a group's range kept aside (outlier tokens tracing, 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx.ops import affine_append, affine_attend, bind
from ottfx.registry import register_scheme
from ottfx.schemes.affine import AffineConfig, AffineScheme, state_names
from ottfx.schemes.base import CacheShape, Role, TensorSpec

REPLACEMENTS = ("rest", "group")


@dataclass(frozen=True, kw_only=True)
class OTTConfig(AffineConfig):
    """Options of OTT, with the paper's defaults."""

    scheme = "ott"

    outlier_capacity: int = 3
    """Tokens of each head in the pool: the lowest key norms so far. 0 traces nothing."""
    spill_capacity: int = 32
    """Tokens of each head that may be displaced from the pool; tracing stops when they would be more."""
    score_norm: int = 1
    """The norm of a key that is compared: 1 (the paper) or 2."""
    exempt_layers: tuple[int, ...] = (0, 1)
    """Layers without a pool."""
    replacement: str = "rest"
    """Whose mean stands in for an outlier in its group: "rest" (the other tokens) or "group" (all of them)."""
    mask_replaced: bool = True
    """Whether attention skips the slot of an outlier, so that every token counts once."""

    def __post_init__(self) -> None:
        """Check every value, and make `exempt_layers` hashable."""
        super().__post_init__()
        object.__setattr__(self, "exempt_layers", tuple(self.exempt_layers))
        capacity, spill = self.outlier_capacity, self.spill_capacity
        self.require("outlier_capacity", 0 <= capacity <= self.group_size, f"from 0 to group_size {self.group_size}")
        self.require("spill_capacity", spill >= 0, "0 or a positive number of tokens")
        self.require("score_norm", self.score_norm in (1, 2), "1 or 2")
        self.require("replacement", self.replacement in REPLACEMENTS, f"one of {list(REPLACEMENTS)}")

    def at_layer(self, layer_index: int) -> OTTConfig:
        """Resolve widths and pool of one layer."""
        exempt = layer_index in self.exempt_layers or self.outlier_capacity == 0
        return dataclasses.replace(
            super().at_layer(layer_index),
            outlier_capacity=0 if exempt else self.outlier_capacity,
            spill_capacity=0 if exempt else self.spill_capacity,
            exempt_layers=(),
        )

    def describe(self) -> str:
        """One line, such as `ott 2-bit, group 128, residual 32, pool 3+32`."""
        return f"{super().describe()}, {self.describe_apart()}"

    def describe_apart(self) -> str:
        """What is kept apart: `pool 3+32`."""
        return f"pool {self.outlier_capacity}+{self.spill_capacity}"


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    outlier_key: Tensor, outlier_position: Tensor, spill_count: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    outlier_value: Tensor, value_outlier_position: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
    outlier_capacity: int, score_norm: int, replacement: str, mask_replaced: bool,
) -> None:  # fmt: skip
    affine_append(
        key, value, mask, lengths, site,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        residual_valid=residual_valid,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual,
        outlier_key=outlier_key, outlier_position=outlier_position, outlier_value=outlier_value,
        value_outlier_position=value_outlier_position, spill_count=spill_count,
        key_bits=key_bits, value_bits=value_bits, group_size=group_size,
        key_window=residual_length, key_step=group_size, value_window=residual_length, value_step=group_size,
        outlier_capacity=outlier_capacity, score_norm=score_norm, replacement=replacement, mask_replaced=mask_replaced,
    )  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    outlier_key: Tensor, outlier_position: Tensor, spill_count: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    outlier_value: Tensor, value_outlier_position: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
    outlier_capacity: int, score_norm: int, replacement: str, mask_replaced: bool,
) -> Tensor:  # fmt: skip
    return affine_attend(
        query, key, value, mask, lengths, site, past_length, softmax_scale,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual,
        outlier_key=outlier_key, outlier_position=outlier_position, outlier_value=outlier_value,
        key_bits=key_bits, value_bits=value_bits,
    )  # fmt: skip


@register_scheme
class OTT(AffineScheme[OTTConfig]):
    """KIVI's grids, keys and values packed together by groups, and a pool of outlier tokens for each head.

    Tokens whose keys have the smallest norm would widen a channel's range. As a group is packed, its tokens compete
    with the pool for `outlier_capacity` seats; winners keep their exact key and value, and leave their slot to the
    mean of the others. The rules stand in docs/storage.md, section *Outlier pool*.
    """

    name = "ott"
    config_class = OTTConfig
    citation = "Su et al., Accurate KV Cache Quantization with Outlier Tokens Tracing, ACL 2025, arXiv:2505.10938."
    append_op = bind("ott_append", _append, mutates=state_names(with_pool=True), outline=True)
    attend_op = bind("ott_attend", _attend, outline=True)

    def schedule(self, config: OTTConfig, role: Role) -> tuple[int, int]:
        """Keys and values: a whole group at once."""
        return config.residual_length, config.group_size

    def ring_rows(self, config: OTTConfig) -> int:
        """Return the size of the window and the group that gathers behind it."""
        return config.residual_length + config.group_size

    def pool_rows(self, config: OTTConfig) -> tuple[int, int]:
        """Return (seats of the outlier pool, rows of the spill pool)."""
        return config.outlier_capacity, config.spill_capacity if config.outlier_capacity else 0

    def state_spec(self, config: OTTConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name every state tensor of one half; each half knows the positions of the pool's rows."""
        spec = super().state_spec(config, role, shape)
        heads = (shape.batch_size, shape.num_kv_heads)
        rows = (*heads, sum(self.pool_rows(config)))
        position = "outlier_position" if role == "key" else "value_outlier_position"
        spec[f"outlier_{role}"] = TensorSpec(shape=(*rows, shape.head_dim), dtype=shape.dtype, part="pool")
        spec[position] = TensorSpec(shape=rows, dtype=torch.int32, part="tables", fill=-1)
        if role == "key":
            spec["spill_count"] = TensorSpec(shape=heads, dtype=torch.int32, part="tables")
        return spec

    def constants(self, config: OTTConfig) -> tuple[int | bool | str, ...]:
        """Widths, tokens of a group, tokens of the window, seats, norm, replacement, whether slots are marked."""
        seats, _ = self.pool_rows(config)
        grid = (*config.widths(), config.group_size, config.residual_length)
        return (*grid, seats, config.score_norm, config.replacement, config.mask_replaced)
