"""`polar_pairs`: keys as radius and angle of rotary pairs of channels (the PolarQuant of Wu et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx import group_pages, pair_codes
from ottfx.affine_schedule import Due
from ottfx.ops import bind
from ottfx.reference import CODE_BITS, words_per_page
from ottfx.registry import register_scheme
from ottfx.schemes.base import PAGE, CacheShape, TensorSpec
from ottfx.schemes.by_group import SHARED_STATE, ByGroupScheme
from ottfx.schemes.kivi import KIVIConfig


@dataclass(frozen=True, kw_only=True)
class PolarPairsConfig(KIVIConfig):
    """Options of PolarQuant for keys, with the paper's defaults; those of values are `kivi`'s."""

    scheme = "polar_pairs"

    key_bits: int | None = 4
    """Width of the codes of a radius and of an angle, two for a pair of channels; None for `bits`."""
    radius_bits: int | None = None
    """Width of a radius code, if it differs from `key_bits`."""
    angle_bits: int | None = None
    """Width of an angle code, if it differs from `key_bits`."""
    group_size: int = 128

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name in ("radius_bits", "angle_bits"):
            width = getattr(self, name)
            self.require(name, width is None or width in CODE_BITS, f"None or one of {list(CODE_BITS)}")

    def pair_widths(self) -> tuple[int, int]:
        """Return (radius_bits, angle_bits)."""
        key_bits, _ = self.widths()
        return self.radius_bits or key_bits, self.angle_bits or key_bits

    def describe(self) -> str:
        """One line, such as `polar_pairs 4-bit radii, 4-bit angles, 2-bit values, group 128, residual 128`."""
        radius_bits, angle_bits = self.pair_widths()
        widths = f"{radius_bits}-bit radii, {angle_bits}-bit angles, {self.bits_of('value')}-bit values"
        return f"{self.scheme} {widths}, group {self.group_size}, residual {self.residual_length}"


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_radius: Tensor, key_radius_scale: Tensor, key_radius_zero_point: Tensor,
    key_angle: Tensor, key_angle_scale: Tensor, key_angle_zero_point: Tensor,
    key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    radius_bits: int, angle_bits: int, value_bits: int, group_size: int, residual_length: int,
) -> None:  # fmt: skip
    valid = group_pages.real_tokens(mask, lengths, site, key)
    if key.is_cuda:
        from ottfx.kernels.pair_append import append as launch

        launch(
            key, value, valid, lengths.narrow(0, site, 1), key_radius, key_radius_scale, key_radius_zero_point,
            key_angle, key_angle_scale, key_angle_zero_point, key_residual, residual_valid,
            value_codes, value_scale, value_zero_point, value_residual,
            radius_bits, angle_bits, value_bits, group_size,
        )  # fmt: skip
        return

    def write_keys(rows: Tensor, real: Tensor, due: Due) -> None:
        grouped = rows.unflatten(2, (-1, group_size))
        in_group = real.unflatten(2, (-1, group_size)).unsqueeze(-1)
        radius, angle = pair_codes.to_polar(grouped)
        for x, bits, storage, scales, zero_points in (
            (radius, radius_bits, key_radius, key_radius_scale, key_radius_zero_point),
            (angle, angle_bits, key_angle, key_angle_scale, key_angle_zero_point),
        ):
            codes, scale, zero_point = pair_codes.quantize_cells(x, bits, in_group)
            group_pages.write_codes(storage, codes.flatten(2, 3), due, bits)
            group_pages.write_constants(scales, scale, due, group_size)
            group_pages.write_constants(zero_points, zero_point, due, group_size)

    group_pages.append(
        key, value, valid, lengths, site, write_keys, key_residual=key_residual, residual_valid=residual_valid,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual, value_bits=value_bits, step=residual_length,
    )  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_radius: Tensor, key_radius_scale: Tensor, key_radius_zero_point: Tensor,
    key_angle: Tensor, key_angle_scale: Tensor, key_angle_zero_point: Tensor,
    key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    radius_bits: int, angle_bits: int, value_bits: int, group_size: int, residual_length: int,
) -> Tensor:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.group_attend import attend_pairs as launch

        return launch(
            query, key, value, mask, lengths.narrow(0, site, 1), softmax_scale,
            key_radius, key_radius_scale, key_radius_zero_point, key_angle, key_angle_scale, key_angle_zero_point,
            key_residual, value_codes, value_scale, value_zero_point, value_residual,
            radius_bits, angle_bits, value_bits, group_size,
        )  # fmt: skip
    radius, angle = (
        [group_pages.used_pages(tensor, past_length) for tensor in tensors]
        for tensors in (
            (key_radius, key_radius_scale, key_radius_zero_point),
            (key_angle, key_angle_scale, key_angle_zero_point),
        )
    )
    coded_key = pair_codes.read_keys(radius, angle, radius_bits, angle_bits)
    return group_pages.attend(
        query, key, value, mask, lengths, site, past_length, softmax_scale, coded_key, key_residual=key_residual,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual, value_bits=value_bits,
    )  # fmt: skip


@register_scheme
class PolarPairs(ByGroupScheme[PolarPairsConfig]):
    """PolarQuant for keys: radius and angle of channels `i` and `i + head_dim / 2`, each on a grid of its group.

    The published tail: keys stay in full precision until `residual_length` of them have gathered. The paper's default
    leaves values as they are; here they are those of `kivi`, which it offers as well, and leave with the keys.
    """

    name = "polar_pairs"
    config_class = PolarPairsConfig
    citation = (
        "Wu et al., PolarQuant: Leveraging Polar Transformation for Efficient Key Cache Quantization and Decoding "
        "Acceleration, NeurIPS 2025, arXiv:2502.00527."
    )
    append_op = bind(
        "polar_pairs_append",
        _append,
        mutates=(
            "key_radius", "key_radius_scale", "key_radius_zero_point",
            "key_angle", "key_angle_scale", "key_angle_zero_point", *SHARED_STATE,
        ),
        outline=True,
    )  # fmt: skip
    attend_op = bind("polar_pairs_attend", _attend, outline=True)

    def key_spec(self, config: PolarPairsConfig, shape: CacheShape) -> dict[str, TensorSpec]:
        """Codes of radii and angles, and scale and zero point of both for each group and pair."""
        paged, pairs = (shape.batch_size, shape.num_kv_heads, shape.pages), shape.head_dim // 2
        constants = TensorSpec(
            shape=(*paged, PAGE // config.group_size, pairs), dtype=torch.float16, part="scales", paged_dim=2
        )
        spec = {}
        for name, bits in zip(("key_radius", "key_angle"), config.pair_widths(), strict=True):
            words = words_per_page(PAGE, pairs, bits)
            spec[name] = TensorSpec(shape=(*paged, words), dtype=torch.int32, part="codes", paged_dim=2)
            spec[f"{name}_scale"] = spec[f"{name}_zero_point"] = constants
        return spec

    def decode_keys(self, config: PolarPairsConfig, state: Mapping[str, Tensor], head_dim: int) -> Tensor:
        """Return the keys of whole pages."""
        radius, angle = (
            [state[name], state[f"{name}_scale"], state[f"{name}_zero_point"]] for name in ("key_radius", "key_angle")
        )
        return pair_codes.read_keys(radius, angle, *config.pair_widths())

    def constants(self, config: PolarPairsConfig) -> tuple[int, ...]:
        """Widths of radius, angle and value codes, tokens of a group, tokens of the window."""
        return (*config.pair_widths(), config.bits_of("value"), config.group_size, config.residual_length)
