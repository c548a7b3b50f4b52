"""`qjl`: keys as signs of random projections, outlier channels apart, values as `kivi` (Zandieh et al., 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx import group_pages, sketch_codes
from ottfx.affine_schedule import Due
from ottfx.ops import bind
from ottfx.reference import CODE_BITS
from ottfx.registry import register_scheme
from ottfx.rotation import seed_offset
from ottfx.schemes.base import PAGE, CacheShape, TensorSpec
from ottfx.schemes.by_group import SHARED_STATE, ByGroupScheme
from ottfx.schemes.kivi import KIVIConfig

MOST_CHANNELS = 256
"""Channels that a byte tells apart."""


@dataclass(frozen=True, kw_only=True)
class QJLConfig(KIVIConfig):
    """Options of QJL, with the paper's defaults; those of values are `kivi`'s."""

    scheme = "qjl"

    key_bits: int | None = 2
    """Signs of a key for each of its channels: 2, 3, 4 or 8; None for `bits`. Outliers take half as many again."""
    early_key_bits: int = 4
    """`key_bits` of the first layers."""
    early_layers: int = 15
    """How many layers those are."""
    outlier_channels: int = 8
    """Channels of a group of tokens with a sketch and a norm of their own: those with the largest norm."""
    seed: int = 0
    """Of the sketch, which all layers, heads and tokens share. A cache can be read only with its own seed."""

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        self.require("early_key_bits", self.early_key_bits in CODE_BITS, f"one of {list(CODE_BITS)}")
        self.require("early_layers", self.early_layers >= 0, "0 or a positive number of layers")
        self.require("outlier_channels", 1 <= self.outlier_channels <= 16, "from 1 to 16")
        self.require("seed", 0 <= self.seed < 2**31, "a number in [0, 2**31)")

    def at_layer(self, layer_index: int) -> QJLConfig:
        """Resolve the widths of one layer."""
        early = layer_index < self.early_layers and layer_index not in dict(self.layer_bits)
        resolved = super().at_layer(layer_index)
        key_bits = self.early_key_bits if early else resolved.key_bits
        return dataclasses.replace(resolved, key_bits=key_bits, early_key_bits=QJLConfig.early_key_bits, early_layers=0)

    def describe(self) -> str:
        """One line, such as `qjl 2 signs a channel, 8 outliers, 2-bit values, group 32, residual 128`."""
        key_bits, value_bits = self.widths()
        early = f", {self.early_key_bits} in {self.early_layers} layers" if self.early_layers else ""
        keys = f"{key_bits} signs a channel{early}, {self.outlier_channels} outliers"
        seed = f", seed {self.seed}" if self.seed else ""
        return (
            f"{self.scheme} {keys}, {value_bits}-bit values, group {self.group_size}, residual {self.residual_length}"
            f"{seed}"
        )


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_signs: Tensor, key_outlier_signs: Tensor, key_norms: Tensor, key_outliers: Tensor,
    key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    key_bits: int, outlier_channels: int, value_bits: int, group_size: int, residual_length: int, seed: int,
) -> None:  # fmt: skip
    valid = group_pages.real_tokens(mask, lengths, site, key)
    if key.is_cuda:
        from ottfx.kernels.sketch_append import append as launch

        launch(
            key, value, valid, lengths.narrow(0, site, 1), key_signs, key_outlier_signs, key_norms, key_outliers,
            key_residual, residual_valid, value_codes, value_scale, value_zero_point, value_residual,
            key_bits, value_bits, group_size, seed_offset(seed * sketch_codes.SEEDS),
        )  # fmt: skip
        return

    def write_keys(rows: Tensor, real: Tensor, due: Due) -> None:
        grouped = rows.unflatten(2, (-1, group_size))
        in_group = real.unflatten(2, (-1, group_size)).unsqueeze(-1)
        *by_token, outliers = sketch_codes.encode(grouped, in_group, key_bits, outlier_channels, seed)
        for storage, x in zip((key_signs, key_outlier_signs, key_norms), by_token, strict=True):
            group_pages.write_constants(storage, x.flatten(2, 3), due, 1)
        group_pages.write_constants(key_outliers, outliers, due, group_size)

    group_pages.append(
        key, value, valid, lengths, site, write_keys, key_residual=key_residual, residual_valid=residual_valid,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual, value_bits=value_bits, step=residual_length,
    )  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_signs: Tensor, key_outlier_signs: Tensor, key_norms: Tensor, key_outliers: Tensor,
    key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    key_bits: int, outlier_channels: int, value_bits: int, group_size: int, residual_length: int, seed: int,
) -> Tensor:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.group_attend import attend_sketch as launch

        return launch(
            query, key, value, mask, lengths.narrow(0, site, 1), softmax_scale,
            key_signs, key_outlier_signs, key_norms, key_outliers,
            key_residual, value_codes, value_scale, value_zero_point, value_residual,
            key_bits, value_bits, group_size, seed_offset(seed * sketch_codes.SEEDS),
        )  # fmt: skip
    signs, outlier_signs, norms, outliers = (
        group_pages.used_pages(tensor, past_length)
        for tensor in (key_signs, key_outlier_signs, key_norms, key_outliers)
    )
    coded_key = sketch_codes.decode(signs, outlier_signs, norms, outliers, key.shape[-1], key_bits, seed)
    return group_pages.attend(
        query, key, value, mask, lengths, site, past_length, softmax_scale, coded_key, key_residual=key_residual,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual, value_bits=value_bits,
    )  # fmt: skip


@register_scheme
class QJL(ByGroupScheme[QJLConfig]):
    """QJL: one norm and the signs of random projections for a key, the same again for the outliers of its group.

    As in the published code keys stay in full precision until `residual_length` of them have gathered, and the sketches
    of the first layers have twice the size. Values are those of `kivi` and leave with the keys.
    """

    name = "qjl"
    config_class = QJLConfig
    citation = (
        "Zandieh et al., QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead, AAAI 2025, "
        "arXiv:2406.03482."
    )
    append_op = bind(
        "qjl_append",
        _append,
        mutates=("key_signs", "key_outlier_signs", "key_norms", "key_outliers", *SHARED_STATE),
        outline=True,
    )
    attend_op = bind("qjl_attend", _attend, outline=True)

    def check(self, config: QJLConfig, shape: CacheShape) -> str | None:
        """Say why a site of this shape cannot be stored, or None."""
        if shape.head_dim & (shape.head_dim - 1) or not 16 <= shape.head_dim <= MOST_CHANNELS:
            return f"head_dim must be a power of two from 16 to {MOST_CHANNELS}, got {shape.head_dim}"
        return super().check(config, shape)

    def key_spec(self, config: QJLConfig, shape: CacheShape) -> dict[str, TensorSpec]:
        """Signs and norms by token, outliers by group."""
        paged, key_bits = (shape.batch_size, shape.num_kv_heads, shape.pages), config.bits_of("key")
        words, outlier_words = sketch_codes.sign_words(shape.head_dim, key_bits)
        groups = PAGE // config.group_size
        sizes = {
            "key_signs": ((PAGE, words), torch.int32),
            "key_outlier_signs": ((PAGE, outlier_words), torch.int32),
            "key_norms": ((PAGE, 2), torch.float16),
            "key_outliers": ((groups, config.outlier_channels), torch.uint8),
        }
        return {
            name: TensorSpec(
                shape=(*paged, *size), dtype=dtype, part="codes" if "signs" in name else "scales", paged_dim=2
            )
            for name, (size, dtype) in sizes.items()
        }

    def decode_keys(self, config: QJLConfig, state: Mapping[str, Tensor], head_dim: int) -> Tensor:
        """Return the keys of whole pages, as a query sees them."""
        names = ("key_signs", "key_outlier_signs", "key_norms", "key_outliers")
        signs, outlier_signs, norms, outliers = (state[name] for name in names)
        return sketch_codes.decode(signs, outlier_signs, norms, outliers, head_dim, config.bits_of("key"), config.seed)

    def constants(self, config: QJLConfig) -> tuple[int, ...]:
        """Signs for each channel, outlier channels, width of value codes, tokens of a group and window, the seed."""
        widths = (config.bits_of("key"), config.outlier_channels, config.bits_of("value"))
        return (*widths, config.group_size, config.residual_length, config.seed)
