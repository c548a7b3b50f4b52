"""`ott+`: OTT with everything that measurements say is worth its bits, and nothing to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx.mixed_words import AVERAGE_BITS
from ottfx.ops import affine_append, affine_attend, bind
from ottfx.registry import register_scheme
from ottfx.rotation import rotate_back
from ottfx.schemes.affine import is_int, state_names
from ottfx.schemes.base import PAGE, CacheShape, Role, TensorSpec
from ottfx.schemes.ott import OTT, OTTConfig
from ottfx.window_rows import present

SWITCHES = ("mixed_keys", "range_search", "rotate_values", "symmetric_values", "quantized_residual")
"""The options that are parts of the scheme, each on or off."""

FINE_BITS = 8
"""Bits of a key code and a value code together from which on the window is not rounded to 8 bits."""

MOST_SEATS = 16
"""Seats of a group at the most."""


@dataclass(frozen=True, kw_only=True)
class OTTPlusConfig(OTTConfig):
    """Options of OTT with better grids. Each part is a switch; all of them off, and OTT's defaults, is `ott`."""

    scheme = "ott+"

    outlier_capacity: int = 0
    spill_capacity: int = 3
    exempt_layers: tuple[int, ...] = ()
    """Layers that keep no token apart."""
    group_seats: int = 1
    """Tokens of each key group that are kept apart, in 8 bits: those of least key norm. 0 for none, or for a pool."""
    mixed_keys: bool = True
    """Whether 2-bit keys have 4, 3, 2 or 1 bits by the range of their channel, 2 on average."""
    range_search: bool = True
    """Whether grids may be narrower than the range of their group, where that leaves a smaller error."""
    rotate_values: bool = True
    """Whether values are stored after a Hadamard transform; then all channels of a token share one scale."""
    symmetric_values: bool = True
    """Whether grids of values are around 0 and have no zero point."""
    quantized_residual: bool | None = None
    """Whether the newest tokens are kept in 8 bits, with one scale a token, rather than in full precision. None: where
    codes have fewer than 4 bits on average, as wider ones leave an error smaller than that of 8 bits a token."""

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        self.require(
            "group_seats",
            is_int(self.group_seats) and 0 <= self.group_seats <= MOST_SEATS,
            f"from 0 to {MOST_SEATS}",
        )
        both = self.group_seats > 0 and self.outlier_capacity > 0
        self.require("group_seats", not both, f"0 beside a pool (outlier_capacity={self.outlier_capacity})")
        for name in SWITCHES:
            value = getattr(self, name)
            if name != "quantized_residual" or value is not None:
                self.require(name, isinstance(value, bool), "True or False")

    @property
    def mixes_keys(self) -> bool:
        """Whether key codes are of mixed widths: switched on, and of 2 bits on average."""
        return self.mixed_keys and self.widths()[0] == AVERAGE_BITS

    @property
    def codes_window(self) -> bool:
        """Whether the window is in 8 bits."""
        return self._coarse() if self.quantized_residual is None else self.quantized_residual

    def _coarse(self) -> bool:
        return sum(self.widths()) < FINE_BITS

    def value_channels(self, head_dim: int) -> int:
        """Return how many channels of a value token share one scale: all of them if they are rotated."""
        if self.rotate_values and self.value_group_size is None:
            return head_dim
        return super().value_channels(head_dim)

    def describe(self) -> str:
        """One line, such as `ott+ 2-bit, group 128, residual 32, seats 1`, and what is switched off."""
        unlike_default = self.codes_window != self._coarse()
        off = [name for name in SWITCHES[:-1] if not getattr(self, name)]
        off += ["quantized_residual"] * (unlike_default and not self.codes_window)
        line = ", without ".join([super().describe(), *off])
        return f"{line}, window in 8 bits" if unlike_default and self.codes_window else line

    def describe_apart(self) -> str:
        """What is kept apart: `seats 2` of each group, or the pool."""
        return f"seats {self.group_seats}" if self.group_seats else super().describe_apart()

    def at_layer(self, layer_index: int) -> OTTPlusConfig:
        """Resolve widths, and what is kept apart, of one layer."""
        config = super().at_layer(layer_index)
        assert isinstance(config, OTTPlusConfig)
        return dataclasses.replace(config, group_seats=0) if layer_index in self.exempt_layers else config


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    outlier_key: Tensor, outlier_position: Tensor, spill_count: Tensor,
    seat_key: Tensor, seat_key_scale: Tensor, seat_row: Tensor, key_order: Tensor, key_residual_scale: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    outlier_value: Tensor, value_outlier_position: Tensor,
    seat_value: Tensor, seat_value_scale: Tensor, value_seat_row: Tensor, value_residual_scale: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
    outlier_capacity: int, score_norm: int, replacement: str, mask_replaced: bool,
    range_search: bool, rotate_values: bool,
) -> None:  # fmt: skip
    affine_append(
        key, value, mask, lengths, site,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        residual_valid=residual_valid,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=_zero_points(value_zero_point),
        value_residual=value_residual,
        outlier_key=outlier_key, outlier_position=outlier_position, outlier_value=outlier_value,
        value_outlier_position=value_outlier_position, spill_count=spill_count,
        **_seats(
            seat_key=seat_key, seat_key_scale=seat_key_scale, seat_row=seat_row,
            seat_value=seat_value, seat_value_scale=seat_value_scale, value_seat_row=value_seat_row,
        ),
        key_order=_order(key_order),
        key_residual_scale=present(key_residual_scale), value_residual_scale=present(value_residual_scale),
        key_bits=key_bits, value_bits=value_bits, group_size=group_size,
        key_window=residual_length, key_step=group_size, value_window=residual_length, value_step=group_size,
        outlier_capacity=outlier_capacity, score_norm=score_norm, replacement=replacement, mask_replaced=mask_replaced,
        range_search=range_search, rotate_values=rotate_values,
    )  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    outlier_key: Tensor, outlier_position: Tensor, spill_count: Tensor,
    seat_key: Tensor, seat_key_scale: Tensor, seat_row: Tensor, key_order: Tensor, key_residual_scale: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    outlier_value: Tensor, value_outlier_position: Tensor,
    seat_value: Tensor, seat_value_scale: Tensor, value_seat_row: Tensor, value_residual_scale: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
    outlier_capacity: int, score_norm: int, replacement: str, mask_replaced: bool,
    range_search: bool, rotate_values: bool,
) -> Tensor:  # fmt: skip
    return affine_attend(
        query, key, value, mask, lengths, site, past_length, softmax_scale,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=_zero_points(value_zero_point),
        value_residual=value_residual,
        outlier_key=outlier_key, outlier_position=outlier_position, outlier_value=outlier_value,
        **_seats(
            seat_key=seat_key, seat_key_scale=seat_key_scale, seat_row=seat_row,
            seat_value=seat_value, seat_value_scale=seat_value_scale,
        ),
        key_order=_order(key_order),
        key_residual_scale=present(key_residual_scale), value_residual_scale=present(value_residual_scale),
        key_bits=key_bits, value_bits=value_bits, rotate_values=rotate_values,
    )  # fmt: skip


def _order(key_order: Tensor) -> Tensor | None:
    return key_order if key_order.shape[-1] else None


def _seats(**state: Tensor) -> dict[str, Tensor]:
    return state if state["seat_row"].shape[3] else {}


def _zero_points(value_zero_point: Tensor) -> Tensor | None:
    return value_zero_point if value_zero_point.shape[3] else None


@register_scheme
class OTTPlus(OTT):
    """OTT's schedule, with outliers that each group keeps, and grids that leave a fraction of its error at fewer bits.

    * Outliers: the token of least key norm of each group has a seat, in 8 bits (`ottfx.group_seats`).
    * Keys: a word holds 16 channels in 4, 3, 2 or 1 bits, the widest channels of a head in the widest elements.
    * Keys and values: grids are cut where that leaves a smaller error (`ottfx.grid_search`).
    * Values: rotated by a Hadamard matrix, then a grid around 0 with one scale a token.
    * The window: 8 bits, with one scale a token.

    Nothing is calibrated. Reading costs what `ott` costs, but for the seats, and the rotation of the result.
    """

    name = "ott+"
    config_class = OTTPlusConfig
    citation = (
        "Su et al., Accurate KV Cache Quantization with Outlier Tokens Tracing, ACL 2025, arXiv:2505.10938; rotation "
        "as in Tseng et al., QuIP#, ICML 2024, arXiv:2402.04396."
    )
    append_op = bind(
        "ott_plus_append",
        _append,
        mutates=state_names(with_pool=True, with_seats=True, with_order=True, with_row_scales=True),
        outline=True,
    )
    attend_op = bind("ott_plus_attend", _attend, outline=True)

    def state_spec(self, config: OTTConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name every state tensor of one half; what a switch makes unnecessary has a size of 0."""
        assert isinstance(config, OTTPlusConfig)
        spec = super().state_spec(config, role, shape)
        seats = config.group_seats * (PAGE // config.group_size)
        rows = (shape.batch_size, shape.num_kv_heads, shape.pages, seats)
        row = "seat_row" if role == "key" else "value_seat_row"
        spec[f"seat_{role}"] = TensorSpec(shape=(*rows, shape.head_dim), dtype=torch.int8, part="pool", paged_dim=2)
        spec[f"seat_{role}_scale"] = TensorSpec(shape=rows, dtype=torch.float16, part="pool", paged_dim=2)
        spec[row] = TensorSpec(shape=rows, dtype=torch.int8, part="tables", fill=-1, paged_dim=2)
        if role == "key":
            order = (shape.batch_size, shape.num_kv_heads, shape.head_dim if config.mixes_keys else 0)
            spec["key_order"] = TensorSpec(shape=order, dtype=torch.int16, part="tables", fill=-1)
        elif config.symmetric_values:
            none = (shape.batch_size, shape.num_kv_heads, shape.pages, 0, spec["value_scale"].shape[-1])
            spec["value_zero_point"] = TensorSpec(shape=none, dtype=torch.float16, part="scales", paged_dim=2)
        window = spec[f"{role}_residual"]
        if config.codes_window:
            spec[f"{role}_residual"] = dataclasses.replace(window, dtype=torch.int8)
        scales = (*window.shape[:2], window.shape[2] if config.codes_window else 0)
        spec[f"{role}_residual_scale"] = TensorSpec(shape=scales, dtype=torch.float16, part="residual")
        return spec

    def constants(self, config: OTTConfig) -> tuple[int | bool | str, ...]:
        """Those of `ott`, then whether ranges are searched and values are rotated."""
        assert isinstance(config, OTTPlusConfig)
        return (*super().constants(config), config.range_search, config.rotate_values)

    def read(self, config: OTTConfig, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens, values rotated back."""
        assert isinstance(config, OTTPlusConfig)
        tokens = super().read(config, role, state, packed, length)
        return rotate_back(tokens, tokens.dtype) if role == "value" and config.rotate_values else tokens
