"""Codes of PolarQuant: a tree of angles over blocks of 16 rotated coordinates, and one radius a block. Plain torch.

Level 1 turns neighbouring coordinates into an angle on the circle and a length, each further level neighbouring lengths
into an angle in the first quadrant and a length. Angles are quantized level by level, each with one table for all; what
is left after four levels, the length of the block, is kept in fp16. No angle is computed: that the angle of (a, b) is
beyond a threshold is `b > tan(threshold) * a`.

Source: Han et al., PolarQuant, arXiv:2502.02617, definition 1, algorithm 1 and section 4 (the codebook that is known
beforehand).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ottfx.lloyd_max import polar_angles
from ottfx.reference import FINITE_MAX, make_finite
from ottfx.rotation import rotate
from ottfx.word_planes import entries, pack_plane, plane_words, unpack_plane

BLOCK = 16
"""Coordinates under one radius."""
UPPER_LEVELS = (2, 3, 4)
UPPER_BITS = 2
"""Bits of an angle of the upper levels."""
FIRST_BITS = (1, 2, 4)
"""Bits that an angle of level 1 may have."""


def angle_words(head_dim: int, first_bits: int) -> int:
    """Return the int32 words of the angles of level 1 of one token."""
    return plane_words(head_dim // 2, int(first_bits), 32)


def upper_bytes(head_dim: int) -> tuple[int, ...]:
    """Return the bytes that the angles of one token take at each of the upper levels."""
    return tuple(plane_words(head_dim >> level, UPPER_BITS, 8) for level in UPPER_LEVELS)


@lru_cache(maxsize=8)
def cosines(level: int, bits: int) -> tuple[float, ...]:
    """Return the cosines of the angles of a level within the first quadrant; their reverse are the sines.

    Angles lie symmetrically about pi / 4. One bit at level 1 leaves only the side: the angle is pi / 2.
    """
    if (level, bits) == (1, 1):
        return (0.0,)
    values = polar_angles(level, bits).values
    return tuple((math.cos(low) + math.sin(high)) / 2 for low, high in zip(values, reversed(values), strict=True))


@lru_cache(maxsize=8)
def slopes(level: int, bits: int) -> tuple[float, ...]:
    """Return the tangents of what separates the angles of a level within the first quadrant, ascending."""
    if (level, bits) == (1, 1):
        return ()
    return tuple(math.tan(threshold) for threshold in polar_angles(level, bits).thresholds)


def encode(x: Tensor, first_bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize tokens, each on its own.

    Args:
        x: float [batch, heads, tokens, head_dim], head_dim a multiple of 16; made finite first, arithmetic in fp32.
        first_bits: bits of an angle of level 1: 1, 2 or 4.
        seed: of the rotation.

    Returns:
        angles of level 1, int32 [batch, heads, tokens, angle_words]; those of the upper levels, uint8
        [batch, heads, tokens, sum(upper_bytes)]; radii fp16 [batch, heads, tokens, head_dim / 16].
    """
    # A tracer may take constants for symbols; a table is of one size.
    first_bits = int(first_bits)
    first, second, length = _pairs(rotate(make_finite(x), seed))
    code = _place(first.abs(), second.abs(), slopes(1, first_bits))
    if first_bits > 1:
        code = code | ((first < 0).long() << (first_bits - 2))
    planes = [pack_plane(code | ((second < 0).long() << (first_bits - 1)), first_bits, torch.int32)]
    for level in UPPER_LEVELS:
        first, second, length = _pairs(length)
        planes.append(pack_plane(_place(first, second, slopes(level, UPPER_BITS)), UPPER_BITS, torch.uint8))
    return planes[0], torch.cat(planes[1:], dim=-1), length.clamp(max=FINITE_MAX).half()


def decode(angles: Tensor, upper: Tensor, radius: Tensor, first_bits: int) -> Tensor:
    """Return fp32 [..., head_dim], rotated, of what `encode` returns."""
    first_bits, head_dim = int(first_bits), radius.shape[-1] * BLOCK
    length, stop = radius.float(), upper.shape[-1]
    for level, size in reversed(list(zip(UPPER_LEVELS, upper_bytes(head_dim), strict=True))):
        place = unpack_plane(upper.narrow(-1, stop - size, size), UPPER_BITS, head_dim >> level)
        length = _join(*_sides(place, length, cosines(level, UPPER_BITS)))
        stop -= size
    code = unpack_plane(angles, first_bits, head_dim // 2)
    count = len(cosines(1, first_bits))
    first, second = _sides(code & (count - 1), length, cosines(1, first_bits))
    if first_bits == 1:
        second = length
    else:
        first = torch.where((code & count) != 0, -first, first)
    return _join(first, torch.where((code >> (first_bits - 1)) != 0, -second, second))


def _pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Neighbours, and their length.
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second, (first.square() + second.square()).sqrt()


def _place(first: Tensor, second: Tensor, slopes: Sequence[float]) -> Tensor:
    place = torch.zeros_like(first, dtype=torch.int64)
    for slope in slopes:
        place = place + (second > slope * first)
    return place


def _sides(place: Tensor, length: Tensor, cosines: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return length * entries(place, cosines), length * entries(place, cosines[::-1])


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=-1).flatten(-2)
