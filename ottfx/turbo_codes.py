"""Codes of TurboQuant: a norm, and for each coordinate of the rotated unit vector an entry of one table. Plain torch.

A code is a sign and a place in the ascending table of magnitudes: the sign is the highest bit. Words are planes of
codes (`ottfx/word_planes.py`).

Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1 (the quantizer for mean squared error).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.lloyd_max import sphere_magnitudes
from ottfx.reference import FINITE_MAX, make_finite, reciprocal
from ottfx.rotation import rotate
from ottfx.word_planes import entries, pack_plane, plane_words, unpack_plane

CODE_BITS = (2, 3, 4)
_PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,)}
"""Widths of the planes of words: with 3 bits, magnitudes and behind them signs."""


def words_per_token(head_dim: int, bits: int) -> int:
    """Return the int32 words of one token: `head_dim * bits / 32`, each plane rounded up to whole words."""
    return sum(plane_words(head_dim, width, 32) for width in _PLANES[bits])


def channels(words: int, bits: int) -> int:
    """Return the head_dim, a multiple of 16, whose tokens take so many words."""
    return words * 32 // bits // 16 * 16


def encode(x: Tensor, bits: int, norm_correction: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Quantize tokens, each on its own.

    Args:
        x: float [batch, heads, tokens, head_dim]; made finite first, arithmetic in fp32.
        bits: width of a code: 2, 3 or 4.
        norm_correction: scale what is read back to the norm of `x`, instead of the unit vector before it is quantized.
        seed: of the rotation.

    Returns:
        words int32 [batch, heads, tokens, words_per_token]; norm fp16 [batch, heads, tokens], at most 65504.
    """
    # A tracer may take constants for symbols; a table is of one size.
    bits = int(bits)
    x = make_finite(x)
    table = sphere_magnitudes(x.shape[-1], bits)
    norm = x.square().sum(-1).sqrt()
    unit = rotate(x, seed) * reciprocal(norm).unsqueeze(-1)
    magnitude = sum((unit.abs() > threshold).to(torch.int64) for threshold in table.thresholds)
    assert isinstance(magnitude, Tensor)
    if norm_correction:
        norm = norm / entries(magnitude, table.values).square().sum(-1).sqrt()
    return _pack(magnitude, (unit < 0).to(torch.int64), bits), norm.clamp(max=FINITE_MAX).half()


def decode(words: Tensor, norm: Tensor, bits: int, head_dim: int) -> Tensor:
    """Return fp32 [..., head_dim], rotated, of words int32 [..., words_per_token] and norms fp16 [...]."""
    bits, planes, start = int(bits), [], 0
    for width in _PLANES[bits]:
        count = plane_words(head_dim, width, 32)
        planes.append(unpack_plane(words.narrow(-1, start, count), width, head_dim))
        start += count
    code = planes[0] if len(planes) == 1 else planes[0] | (planes[1] << 2)
    half = 2 ** (bits - 1)
    value = entries(code & (half - 1), sphere_magnitudes(head_dim, bits).values)
    return torch.where(code >= half, -value, value) * norm.float().unsqueeze(-1)


def _pack(magnitude: Tensor, negative: Tensor, bits: int) -> Tensor:
    if bits == 3:
        return torch.cat([pack_plane(magnitude, 2, torch.int32), pack_plane(negative, 1, torch.int32)], dim=-1)
    return pack_plane(magnitude | (negative << (bits - 1)), bits, torch.int32)
