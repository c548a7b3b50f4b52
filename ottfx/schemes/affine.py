"""What `kivi` and `ott` share: options, state tensors and bookkeeping of paged affine storage (docs/storage.md)."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ottfx.affine_read import read_tokens
from ottfx.affine_rewind import rewind
from ottfx.errors import ConfigError
from ottfx.reference import CODE_BITS, words_per_page
from ottfx.schemes.base import PAGE, CacheShape, Role, Scheme, SchemeConfig, TensorSpec

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LayerBits = int | tuple[int, int]

Config = TypeVar("Config", bound="AffineConfig")


def state_names(
    *, with_pool: bool, with_seats: bool = False, with_order: bool = False, with_row_scales: bool = False
) -> tuple[str, ...]:
    """Return the names of the state tensors of both halves, in the order in which the ops take them."""
    key = ["key_codes", "key_scale", "key_zero_point", "key_residual", "residual_valid"]
    value = ["value_codes", "value_scale", "value_zero_point", "value_residual"]
    if with_pool:
        key += ["outlier_key", "outlier_position", "spill_count"]
        value += ["outlier_value", "value_outlier_position"]
    if with_seats:
        key += ["seat_key", "seat_key_scale", "seat_row"]
        value += ["seat_value", "seat_value_scale", "value_seat_row"]
    if with_order:
        key += ["key_order"]
    if with_row_scales:
        key += ["key_residual_scale"]
        value += ["value_residual_scale"]
    return (*key, *value)


@dataclass(frozen=True, kw_only=True)
class AffineConfig(SchemeConfig):
    """Options of a scheme whose keys are quantized per channel and whose values are quantized per token."""

    bits: int = 2
    """Width of a code: 2, 3, 4 or 8."""
    key_bits: int | None = None
    """Width of a key code, if it differs from `bits`."""
    value_bits: int | None = None
    """Width of a value code, if it differs from `bits`."""
    group_size: int = 128
    """Tokens that share one scale and zero point of a key channel: 32, 64 or 128."""
    value_group_size: int | None = None
    """Channels that share one scale and zero point of a value token; None for `group_size` or what fits head_dim."""
    residual_length: int = 32
    """Newest tokens kept in full precision."""
    layer_bits: Mapping[int, LayerBits] | tuple[tuple[int, LayerBits], ...] = ()
    """Layers with other widths: layer index -> bits, or (key_bits, value_bits)."""

    def __post_init__(self) -> None:
        """Check every value, and make `layer_bits` hashable."""
        given = dict(self.layer_bits)
        layer_bits = sorted((layer, bits if isinstance(bits, int) else tuple(bits)) for layer, bits in given.items())
        object.__setattr__(self, "layer_bits", tuple(layer_bits))
        for name in ("bits", "key_bits", "value_bits"):
            width = getattr(self, name)
            if width is not None or name == "bits":
                self.require(name, width in CODE_BITS, f"one of {list(CODE_BITS)}")
        for _, bits in layer_bits:
            widths = bits if isinstance(bits, tuple) else (bits, bits)
            valid = len(widths) == 2 and all(width in CODE_BITS for width in widths)
            self.require("layer_bits", valid, f"layer -> bits or (key_bits, value_bits), each one of {list(CODE_BITS)}")
        self.require("group_size", self.group_size in GROUP_SIZES, f"one of {list(GROUP_SIZES)}")
        channels = self.value_group_size
        self.require(
            "value_group_size",
            channels is None or (is_int(channels) and channels >= 16 and channels % 16 == 0),
            "None or a positive multiple of 16",
        )
        length = self.residual_length
        self.require("residual_length", is_int(length) and length >= 0, "0 or a positive number of tokens")

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise ConfigError about the field `name` unless `holds`."""
        if not holds:
            raise ConfigError(f"ottfx.{self.scheme}: {name} must be {expected}. Got {name}={getattr(self, name)!r}.")

    def at_layer(self: Config, layer_index: int) -> Config:
        """Resolve `key_bits` and `value_bits` of one layer."""
        widths: LayerBits = dict(self.layer_bits).get(layer_index, self.bits)
        pair = widths if isinstance(widths, tuple) else (widths, widths)
        special = layer_index in dict(self.layer_bits)
        return dataclasses.replace(
            self,
            key_bits=pair[0] if special or self.key_bits is None else self.key_bits,
            value_bits=pair[1] if special or self.value_bits is None else self.value_bits,
            layer_bits=(),
        )

    def widths(self) -> tuple[int, int]:
        """Return (key_bits, value_bits) of a config without per-layer exceptions."""
        return self.key_bits or self.bits, self.value_bits or self.bits

    def bits_of(self, role: Role) -> int:
        """Return the width of a code of one half."""
        return self.widths()[role == "value"]

    def value_channels(self, head_dim: int) -> int:
        """Return how many channels of a value token share one scale, for heads of this size."""
        if self.value_group_size is not None:
            return self.value_group_size
        if head_dim % self.group_size == 0:
            return self.group_size
        if head_dim <= self.group_size:
            return head_dim
        return max(size for size in range(16, self.group_size + 1, 16) if head_dim % size == 0)

    def describe(self) -> str:
        """One line, such as `ott 2-bit, group 128, residual 32`."""
        key_bits, value_bits = self.widths()
        width = f"{key_bits}-bit" if key_bits == value_bits else f"{key_bits}-bit keys, {value_bits}-bit values"
        return f"{self.scheme} {width}, group {self.group_size}, residual {self.residual_length}"


class AffineScheme(Scheme[Config]):
    """A scheme in affine storage. A subclass says when tokens are packed, and how large the ring is."""

    config_class: ClassVar[type[AffineConfig]]

    @abstractmethod
    def schedule(self, config: Config, role: Role) -> tuple[int, int]:
        """Return (window, step) of one half, in tokens."""

    @abstractmethod
    def ring_rows(self, config: Config) -> int:
        """Return how many tokens the full-precision window can hold."""

    def pool_rows(self, config: Config) -> tuple[int, int]:
        """Return (seats of the outlier pool, rows of the spill pool)."""
        return 0, 0

    def check(self, config: Config, shape: CacheShape) -> str | None:
        """Say why a site of this shape cannot be stored, or None."""
        if shape.dtype not in DTYPES:
            return f"dtype must be float16, bfloat16 or float32, got {str(shape.dtype).removeprefix('torch.')}"
        if shape.head_dim % 16:
            return f"head_dim must be a multiple of 16, got {shape.head_dim}"
        channels = config.value_channels(shape.head_dim)
        if shape.head_dim % channels:
            return f"value_group_size must divide head_dim {shape.head_dim}, got {channels}"
        return None

    def state_spec(self, config: Config, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name every state tensor of one half; layouts in docs/storage.md."""
        lead = (shape.batch_size, shape.num_kv_heads)
        paged = (*lead, shape.pages)
        if role == "key":
            constants = (*paged, PAGE // config.group_size, shape.head_dim)
        else:
            constants = (*paged, shape.head_dim // config.value_channels(shape.head_dim), PAGE)
        words = words_per_page(PAGE, shape.head_dim, config.bits_of(role))
        ring = self.ring_rows(config)
        spec = {
            f"{role}_codes": TensorSpec(shape=(*paged, words), dtype=torch.int32, part="codes", paged_dim=2),
            f"{role}_scale": TensorSpec(shape=constants, dtype=torch.float16, part="scales", paged_dim=2),
            f"{role}_zero_point": TensorSpec(shape=constants, dtype=torch.float16, part="scales", paged_dim=2),
            f"{role}_residual": TensorSpec(shape=(*lead, ring, shape.head_dim), dtype=shape.dtype, part="residual"),
        }
        if role == "key":
            spec["residual_valid"] = TensorSpec(shape=(shape.batch_size, ring), dtype=torch.uint8, part="tables")
        return spec

    def read(self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens; those kept apart have their values there."""
        return read_tokens(role, state, config.bits_of(role), packed, 0, length)

    def rewind(
        self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        """Forget every token from `length` on; what stays packed are whole groups of `group_size` tokens."""
        seats, _ = self.pool_rows(config)
        return rewind(role, state, config.bits_of(role), config.group_size, seats, packed, in_ring, length)


def is_int(number: Any) -> bool:
    """Whether an option is a whole number, and not True or False."""
    return isinstance(number, int) and not isinstance(number, bool)
