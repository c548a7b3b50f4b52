"""Plain-torch arithmetic of the storage format: affine quantization of a group, and the words of a packed page.

The definition is `docs/storage.md`; the Triton kernels produce the same words. Everything here is traceable with
symbolic leading sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.errors import ConfigError
from ottfx.opaque_call import in_opaque_call

FINITE_MAX = 65504.0
"""Largest finite fp16 number: what infinities are stored as."""
CODE_BITS = (2, 3, 4, 8)
_PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def check_bits(bits: int, where: str = "ottfx.reference") -> None:
    """Raise ConfigError unless `bits` is a width that a page can hold."""
    if bits not in CODE_BITS:
        raise ConfigError(
            f"{where}: bits must be one of {list(CODE_BITS)}. Got {bits!r}. Use 2 for the published setting."
        )


def words_per_page(rows: int, contraction: int, bits: int) -> int:
    """Return the int32 words that hold a page of `rows * contraction` codes."""
    return rows * contraction * bits // 32


def make_finite(x: Tensor) -> Tensor:
    """Return `x` in fp32 with NaN -> 0 and everything else clamped to +-65504."""
    x = x.float()
    return torch.where(torch.isnan(x), 0.0, x).clamp(-FINITE_MAX, FINITE_MAX)


def round_to_half(x: Tensor) -> Tensor:
    """Round finite fp32 numbers of at most 65504 to the nearest fp16 number, ties to even; the result is fp32.

    Same as `x.half().float()`, which a compiler may fuse into nothing.
    """
    if in_opaque_call():
        return x.half().float()
    exponent = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    spacing = exponent.clamp(min=2.0**-14) * 2.0**-10
    return torch.round(x / spacing) * spacing


def group_range(x: Tensor, dim: int, taking_part: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest member of groups along `dim`, kept as a size of 1; 0 where none takes part.

    `x` is finite fp32; `taking_part` is bool, broadcastable to `x`, or None for all.
    """
    if taking_part is None:
        return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = torch.where(taking_part, x, torch.inf).amin(dim, keepdim=True)
    high = torch.where(taking_part, x, -torch.inf).amax(dim, keepdim=True)
    empty = low == torch.inf
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def reciprocal(scale: Tensor) -> Tensor:
    """Return `1 / scale`, 0 where the scale is 0."""
    return scale.masked_fill(scale == 0, torch.inf).reciprocal()


def quantize_affine(
    x: Tensor, bits: int, dim: int = -1, taking_part: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups: all members along `dim` share one scale and zero point.

    Args:
        x: float [..., members, ...]; made finite first, arithmetic in fp32.
        bits: width of a code.
        dim: the axis of the members.
        taking_part: bool, broadcastable to `x`, or None for all. Members that take no part do not widen the range;
            they are coded all the same, clamped into it.

    Returns:
        codes uint8 of the shape of `x`; scale and zero_point fp16 of the shape of `x` without `dim`, scale >= 0.
        A group without any member taking part has codes, scale and zero_point 0.

    Source: asymmetric min-max quantization as in arXiv:2402.02750, section 3.1; rounding of the constants to fp16
        happens before the codes are computed.
    """
    x = make_finite(x)
    low, high = group_range(x, dim, taking_part)
    levels = 2**bits - 1
    zero_point = round_to_half(low)
    scale = round_to_half(((high - zero_point) / levels).clamp(0.0, FINITE_MAX))
    steps = (x - zero_point) * reciprocal(scale)
    codes = torch.round(steps).clamp(0, levels).to(torch.uint8)
    return codes, scale.squeeze(dim).half(), zero_point.squeeze(dim).half()


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, dim: int = -1) -> Tensor:
    """Return `codes * |scale| + zero_point` in fp32; the sign bit of a scale is a mark, not a value.

    Args:
        codes: integer [..., members, ...].
        scale: fp16, the shape of `codes` without `dim`.
        zero_point: fp16, the shape of `scale`.
        dim: the axis of the members.
    """
    return codes.float() * scale.float().abs().unsqueeze(dim) + zero_point.float().unsqueeze(dim)


def _bit_positions(per_word: int, width: int, device: torch.device) -> Tensor:
    element = torch.arange(per_word, device=device)
    return (width * (element // 2) + 16 * (element % 2)).to(torch.int32)


def to_int32(words: Tensor) -> Tensor:
    """Return the int32 with the same bits as int64 numbers in [0, 2**32)."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    rows, contraction = codes.shape[-2:]
    lead = codes.shape[:-2]
    if width == 1:
        neighbours = codes.reshape(*lead, 2, rows // 2, contraction // 16, 16).long()
        shift = _bit_positions(16, 1, codes.device) + 8 * torch.arange(2, dtype=torch.int32, device=codes.device).view(
            2, 1, 1, 1
        )
        words = (neighbours << shift).sum(-1).sum(-3)
    else:
        per_word = 32 // width
        neighbours = codes.reshape(*lead, rows, contraction // per_word, per_word).long()
        words = (neighbours << _bit_positions(per_word, width, codes.device)).sum(-1)
    return to_int32(words).transpose(-1, -2).flatten(-2)


def _unpack_plane(words: Tensor, width: int, rows: int, contraction: int) -> Tensor:
    # A right shift of int32 repeats the sign, but never below the bits that the mask keeps.
    lead = words.shape[:-1]
    if width == 1:
        grid = words.reshape(*lead, 1, contraction // 16, rows // 2).transpose(-1, -2).unsqueeze(-1)
        shift = _bit_positions(16, 1, words.device) + 8 * torch.arange(2, dtype=torch.int32, device=words.device).view(
            2, 1, 1, 1
        )
    else:
        grid = words.reshape(*lead, contraction * width // 32, rows).transpose(-1, -2).unsqueeze(-1)
        shift = _bit_positions(32 // width, width, words.device)
    return ((grid >> shift) & (2**width - 1)).to(torch.uint8).reshape(*lead, rows, contraction)


def pack_page(codes: Tensor, bits: int) -> Tensor:
    """Pack pages of codes into words, as attention reads them.

    Args:
        codes: uint8 [..., rows, contraction], each below 2**bits; rows even, contraction a multiple of 16. Keys
            have tokens as rows and channels as contraction, values channels as rows and tokens as contraction.
        bits: width of a code: 2, 3, 4 or 8.

    Returns:
        int32 [..., rows * contraction * bits // 32].

    Raises:
        ConfigError: another width, or a size that does not fit.
    """
    check_bits(bits)
    rows, contraction = codes.shape[-2:]
    if rows % 2 or contraction % 16:
        raise ConfigError(
            f"ottfx.reference: rows and contraction of a page must be multiples of 2 and of 16. "
            f"Got {[rows, contraction]!r}. Pad head_dim to a multiple of 16."
        )
    if bits != 3:
        return _pack_plane(codes, bits)
    return torch.cat([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], dim=-1)


def unpack_page(words: Tensor, bits: int, rows: int, contraction: int) -> Tensor:
    """Unpack pages of words: the inverse of `pack_page`.

    Args:
        words: int32 [..., rows * contraction * bits // 32].
        bits: width of a code: 2, 3, 4 or 8.
        rows: rows of a page.
        contraction: columns of a page.

    Returns:
        uint8 [..., rows, contraction].

    Raises:
        ConfigError: another width.
    """
    check_bits(bits)
    if bits != 3:
        return _unpack_plane(words, bits, rows, contraction)
    split = rows * contraction // 16
    low = _unpack_plane(words[..., :split], 2, rows, contraction)
    high = _unpack_plane(words[..., split:], 1, rows, contraction)
    return low | (high << 2)
