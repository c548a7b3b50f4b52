"""`turbo`: a random rotation, then one table for all coordinates (TurboQuant; Zandieh et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx import token_pages, turbo_codes
from ottfx.errors import ConfigError
from ottfx.lloyd_max import sphere_magnitudes
from ottfx.ops import bind
from ottfx.registry import register_scheme
from ottfx.rotation import rotate_back, seed_offset
from ottfx.schemes.base import PAGE, CacheShape, Role, TensorSpec
from ottfx.schemes.by_token import ByTokenConfig, ByTokenScheme


@dataclass(frozen=True, kw_only=True)
class TurboConfig(ByTokenConfig):
    """Options of TurboQuant, with the paper's defaults."""

    scheme = "turbo"

    bits: int = 2
    """Width of a code: 2, 3 or 4."""
    key_bits: int | None = None
    """Width of a key code, if it differs from `bits`."""
    value_bits: int | None = None
    """Width of a value code, if it differs from `bits`."""
    norm_correction: bool = False
    """Whether a token read back has the norm of the token stored, as in vLLM's port; the paper scales by the norm of
    what was quantized, so that tokens come back shorter."""

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name in ("bits", "key_bits", "value_bits"):
            width = getattr(self, name)
            if (width is not None or name == "bits") and width not in turbo_codes.CODE_BITS:
                raise ConfigError(
                    f"ottfx.turbo: {name} must be one of {list(turbo_codes.CODE_BITS)}. Got {name}={width!r}."
                )
        if not isinstance(self.norm_correction, bool):
            raise ConfigError(
                f"ottfx.turbo: norm_correction must be True or False. Got norm_correction={self.norm_correction!r}."
            )

    def widths(self) -> tuple[int, int]:
        """Return (key_bits, value_bits)."""
        return self.key_bits or self.bits, self.value_bits or self.bits

    def describe(self) -> str:
        """One line, such as `turbo 2-bit`, and what differs from the paper."""
        key_bits, value_bits = self.widths()
        width = f"{key_bits}-bit" if key_bits == value_bits else f"{key_bits}-bit keys, {value_bits}-bit values"
        correction = ", norm correction" if self.norm_correction else ""
        return f"turbo {width}{correction}{self.describe_seed()}"


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_codes: Tensor, key_norm: Tensor, value_codes: Tensor, value_norm: Tensor,
    key_bits: int, value_bits: int, norm_correction: bool, seed: int,
) -> None:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.turbo_append import append as launch

        launch(
            key, value, lengths.narrow(0, site, 1), key_codes, key_norm, value_codes, value_norm,
            key_bits, value_bits, norm_correction, _table(key, key_bits), _table(value, value_bits), seed_offset(seed),
        )  # fmt: skip
        return
    for rows, bits, codes, norm in ((key, key_bits, key_codes, key_norm), (value, value_bits, value_codes, value_norm)):
        words, norm_of_token = turbo_codes.encode(rows, bits, norm_correction, seed)
        token_pages.write_tokens(codes, words, lengths, site)
        token_pages.write_tokens(norm, norm_of_token, lengths, site)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_codes: Tensor, key_norm: Tensor, value_codes: Tensor, value_norm: Tensor,
    key_bits: int, value_bits: int, norm_correction: bool, seed: int,
) -> Tensor:  # fmt: skip
    if key.is_cuda:
        from ottfx.kernels.token_attend import attend_turbo as launch

        return launch(
            query, key, value, mask, lengths.narrow(0, site, 1), softmax_scale,
            key_codes, key_norm, value_codes, value_norm, key_bits, value_bits,
            _table(key, key_bits), _table(value, value_bits), seed_offset(seed),
        )  # fmt: skip
    stored_key, stored_value = (
        turbo_codes.decode(
            token_pages.stored_rows(codes, past_length), token_pages.stored_rows(norm, past_length), bits, key.shape[-1]
        )
        for codes, norm, bits in ((key_codes, key_norm, key_bits), (value_codes, value_norm, value_bits))
    )
    return token_pages.attend(query, key, value, mask, lengths, site, softmax_scale, stored_key, stored_value, seed)


def _table(x: Tensor, bits: int) -> tuple[float, ...]:
    return sphere_magnitudes(x.shape[-1], bits).values


@register_scheme
class Turbo(ByTokenScheme[TurboConfig]):
    """TurboQuant for mean squared error, keys and values: norm, random rotation, Lloyd-Max table for each coordinate.

    Nothing is calibrated, no token is kept in full precision, and each token is quantized on its own when it comes. The
    paper's second variant, with a sketch of the residual for unbiased inner products, and its split of channels for
    widths that are no whole number are not here.
    """

    name = "turbo"
    config_class = TurboConfig
    citation = (
        "Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, ICLR 2026, "
        "arXiv:2504.19874."
    )
    append_op = bind(
        "turbo_append", _append, mutates=("key_codes", "key_norm", "value_codes", "value_norm"), outline=True
    )
    attend_op = bind("turbo_attend", _attend, outline=True)

    def state_spec(self, config: TurboConfig, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Codes and norms: int32 and fp16, a row for each token."""
        paged = (shape.batch_size, shape.num_kv_heads, shape.pages, PAGE)
        words = turbo_codes.words_per_token(shape.head_dim, config.widths()[role == "value"])
        return {
            f"{role}_codes": TensorSpec(shape=(*paged, words), dtype=torch.int32, part="codes", paged_dim=2),
            f"{role}_norm": TensorSpec(shape=paged, dtype=torch.float16, part="scales", paged_dim=2),
        }

    def constants(self, config: TurboConfig) -> tuple[int | bool, ...]:
        """Widths of key and value codes, whether norms are corrected, the seed."""
        return (*config.widths(), config.norm_correction, config.seed)

    def read(self, config: TurboConfig, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens, in fp32."""
        bits = config.widths()[role == "value"]
        codes, norm = (state[f"{role}_{name}"].flatten(2, 3).narrow(2, 0, length) for name in ("codes", "norm"))
        rotated = turbo_codes.decode(codes, norm, bits, turbo_codes.channels(codes.shape[-1], bits))
        return rotate_back(rotated, torch.float32, config.seed)
