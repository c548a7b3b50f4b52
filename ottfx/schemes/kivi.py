"""`kivi`: keys quantized per channel, values per token (Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ottfx.ops import affine_append, affine_attend, bind
from ottfx.registry import register_scheme
from ottfx.schemes.affine import AffineConfig, AffineScheme, state_names
from ottfx.schemes.base import Role


@dataclass(frozen=True, kw_only=True)
class KIVIConfig(AffineConfig):
    """Options of KIVI, with the paper's defaults."""

    scheme = "kivi"

    group_size: int = 32
    residual_length: int = 128
    """Newest tokens kept in full precision, a positive multiple of `group_size`.

    Keys leave all at once when so many have gathered, values one by one when they are older.
    """

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        self.require(
            "residual_length",
            self.residual_length > 0 and self.residual_length % self.group_size == 0,
            f"a positive multiple of group_size {self.group_size}",
        )


def _append(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
) -> None:  # fmt: skip
    affine_append(
        key, value, mask, lengths, site,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        residual_valid=residual_valid,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual,
        key_bits=key_bits, value_bits=value_bits, group_size=group_size,
        key_window=0, key_step=residual_length, value_window=residual_length, value_step=1,
    )  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, site: int, past_length: int,
    softmax_scale: float,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_residual: Tensor, residual_valid: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_residual: Tensor,
    key_bits: int, value_bits: int, group_size: int, residual_length: int,
) -> Tensor:  # fmt: skip
    return affine_attend(
        query, key, value, mask, lengths, site, past_length, softmax_scale,
        key_codes=key_codes, key_scale=key_scale, key_zero_point=key_zero_point, key_residual=key_residual,
        value_codes=value_codes, value_scale=value_scale, value_zero_point=value_zero_point,
        value_residual=value_residual,
        key_bits=key_bits, value_bits=value_bits,
    )  # fmt: skip


@register_scheme
class KIVI(AffineScheme[KIVIConfig]):
    """Keys per channel over groups of tokens, values per token over groups of channels, asymmetric min-max grids.

    Keys are packed whenever `residual_length` of them have gathered, values one by one when they are older than
    `residual_length`. A query sees packed keys dequantized from the step on in which they were packed.
    """

    name = "kivi"
    config_class = KIVIConfig
    citation = "Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024, arXiv:2402.02750."
    append_op = bind("kivi_append", _append, mutates=state_names(with_pool=False), outline=True)
    attend_op = bind("kivi_attend", _attend, outline=True)

    def schedule(self, config: KIVIConfig, role: Role) -> tuple[int, int]:
        """Keys: all `residual_length` at once. Values: one at a time."""
        return (0, config.residual_length) if role == "key" else (config.residual_length, 1)

    def ring_rows(self, config: KIVIConfig) -> int:
        """Return the size of the window: the keys that gather, or the newest values."""
        return config.residual_length

    def constants(self, config: KIVIConfig) -> tuple[int, int, int, int]:
        """Widths of key and value codes, tokens of a key group, tokens of the window."""
        return (*config.widths(), config.group_size, config.residual_length)
