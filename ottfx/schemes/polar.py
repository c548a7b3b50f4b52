"""`polar`: a random rotation, then angles of a tree over blocks of coordinates (PolarQuant; Han et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx import polar_codes, token_pages
from ottfx.errors import ConfigError
from ottfx.ops import bind
from ottfx.polar_codes import BLOCK, UPPER_BITS, UPPER_LEVELS
from ottfx.registry import register_scheme
from ottfx.rotation import rotate_back, seed_offset
from ottfx.schemes.base import PAGE, CacheShape, Role, TensorSpec
from ottfx.schemes.by_token import ByTokenConfig, ByTokenScheme


@dataclass(frozen=True, kw_only=True)
class PolarConfig(ByTokenConfig):
    """Options of PolarQuant, with the paper's defaults."""

    scheme = "polar"

    first_bits: int = 4
    """Bits of an angle of level 1: 4 as published, for 3.875 bits an element; 2 for 2.875, 1 for 2.375."""

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if self.first_bits not in polar_codes.FIRST_BITS:
            raise ConfigError(
                f"ottfx.polar: first_bits must be one of {list(polar_codes.FIRST_BITS)}. "
                f"Got first_bits={self.first_bits!r}."
            )

    def describe(self) -> str:
        """One line, such as `polar 4/2/2/2-bit angles`."""
        upper = "/".join(str(UPPER_BITS) for _ in UPPER_LEVELS)
        return f"polar {self.first_bits}/{upper}-bit angles{self.describe_seed()}"


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_codes: Tensor, key_upper: Tensor, key_radius: Tensor,
    value_codes: Tensor, value_upper: Tensor, value_radius: Tensor,
    first_bits: int, seed: int,
) -> None:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.polar_append import append as launch

        slopes = _by_level(polar_codes.slopes, first_bits)
        launch(
            key, value, lengths.narrow(0, site, 1), key_codes, key_upper, key_radius,
            value_codes, value_upper, value_radius, first_bits, slopes, seed_offset(seed),
        )  # fmt: skip
        return
    storage = ((key, (key_codes, key_upper, key_radius)), (value, (value_codes, value_upper, value_radius)))
    for rows, tensors in storage:
        for tensor, part in zip(tensors, polar_codes.encode(rows, first_bits, seed), strict=True):
            token_pages.write_tokens(tensor, part, lengths, site)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_codes: Tensor, key_upper: Tensor, key_radius: Tensor,
    value_codes: Tensor, value_upper: Tensor, value_radius: Tensor,
    first_bits: int, seed: int,
) -> Tensor:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.token_attend import attend_polar as launch

        cosines = _by_level(polar_codes.cosines, first_bits)
        return launch(
            query, key, value, mask, lengths.narrow(0, site, 1), softmax_scale, key_codes, key_upper, key_radius,
            value_codes, value_upper, value_radius, first_bits, cosines, seed_offset(seed),
        )  # fmt: skip
    stored_key, stored_value = (
        polar_codes.decode(
            token_pages.stored_rows(codes, past_length),
            token_pages.stored_rows(upper, past_length),
            token_pages.stored_rows(radius, past_length),
            first_bits,
        )
        for codes, upper, radius in ((key_codes, key_upper, key_radius), (value_codes, value_upper, value_radius))
    )
    return token_pages.attend(query, key, value, mask, lengths, site, softmax_scale, stored_key, stored_value, seed)


def _by_level(table: Callable[[int, int], tuple[float, ...]], first_bits: int) -> list[tuple[float, ...]]:
    return [table(1, first_bits), *(table(level, UPPER_BITS) for level in UPPER_LEVELS)]


@register_scheme
class Polar(ByTokenScheme[PolarConfig]):
    """PolarQuant with the codebook that is known beforehand, keys and values: angles of four levels, radii in fp16.

    Nothing is calibrated, no token is kept in full precision, and each token is quantized on its own when it comes. The
    paper's other codebook, k-means over the angles of the prompt, is not here.
    """

    name = "polar"
    config_class = PolarConfig
    citation = "Han et al., PolarQuant: Quantizing KV Caches with Polar Transformation, AISTATS 2026, arXiv:2502.02617."
    append_op = bind(
        "polar_append",
        _append,
        mutates=("key_codes", "key_upper", "key_radius", "value_codes", "value_upper", "value_radius"),
        outline=True,
    )
    attend_op = bind("polar_attend", _attend, outline=True)

    def state_spec(self, config: PolarConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Angles of level 1, those of the upper levels, radii: a row for each token."""
        paged = (shape.batch_size, shape.num_kv_heads, shape.pages, PAGE)
        words = polar_codes.angle_words(shape.head_dim, config.first_bits)
        upper = sum(polar_codes.upper_bytes(shape.head_dim))
        blocks = shape.head_dim // BLOCK
        return {
            f"{role}_codes": TensorSpec(shape=(*paged, words), dtype=torch.int32, part="codes", paged_dim=2),
            f"{role}_upper": TensorSpec(shape=(*paged, upper), dtype=torch.uint8, part="codes", paged_dim=2),
            f"{role}_radius": TensorSpec(shape=(*paged, blocks), dtype=torch.float16, part="scales", paged_dim=2),
        }

    def constants(self, config: PolarConfig) -> tuple[int, int]:
        """Bits of an angle of level 1, the seed."""
        return config.first_bits, config.seed

    def read(self, config: PolarConfig, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens, in fp32."""
        codes, upper, radius = (
            state[f"{role}_{name}"].flatten(2, 3).narrow(2, 0, length) for name in ("codes", "upper", "radius")
        )
        return rotate_back(polar_codes.decode(codes, upper, radius, config.first_bits), torch.float32, config.seed)
