"""Device functions on trees of angles over blocks of 16 coordinates (`ottfx/polar_codes.py` defines them).

Four numbers describe a level: of slopes, the first three; of cosines, all, the sines being their reverse. Level 1 has
`T0 .. T3`, level 2 `T4 .. T7`, level 3 `T8 .. T11`, level 4 `T12 .. T15`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ottfx.kernels.launch import next_power_of_2
from ottfx.kernels.table_codes import table_constants
from ottfx.kernels.word_planes import load_plane, store_plane


@triton.jit
def _choose(place, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    # Float32 numbers A .. D at places 0 .. 3.
    odd = (place & 1) != 0
    return tl.where((place & 2) != 0, tl.where(odd, D, C), tl.where(odd, B, A)).to(tl.float32)


@triton.jit
def _children(
    place, length, ROWS: tl.constexpr, COUNT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # The two lengths under each of [ROWS, COUNT], as [ROWS, 2 * COUNT].
    pair = tl.join(length * _choose(place, A, B, C, D), length * _choose(place, D, C, B, A))
    return tl.reshape(pair, [ROWS, 2 * COUNT])


@triton.jit
def load_blocks(
    angle_ptr, upper_ptr, radius_ptr, live,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
    T8: tl.constexpr, T9: tl.constexpr, T10: tl.constexpr, T11: tl.constexpr,
    T12: tl.constexpr, T13: tl.constexpr, T14: tl.constexpr, T15: tl.constexpr,
):  # fmt: skip
    """Rotated tokens, float32 [ROWS, BLOCK_D]; the pointers [ROWS] are those of a token, the numbers are cosines.

    Tokens not `live` and channels behind HEAD_DIM give 0.
    """
    BLOCKS: tl.constexpr = HEAD_DIM // 16
    TILE: tl.constexpr = BLOCK_D // 16
    block = tl.arange(0, TILE)
    in_blocks = live[:, None] & (block < BLOCKS)[None, :]
    # [ROWS, TILE]
    length = tl.load(radius_ptr[:, None] + block[None, :], mask=in_blocks, other=0.0).to(tl.float32)
    THIRD: tl.constexpr = (BLOCKS + 1) // 2
    place = load_plane(upper_ptr + BLOCKS + THIRD, live, (BLOCKS + 3) // 4, 8, 2, ROWS, TILE)
    length = _children(place, length, ROWS, TILE, T12, T13, T14, T15)
    place = load_plane(upper_ptr + BLOCKS, live, THIRD, 8, 2, ROWS, 2 * TILE)
    length = _children(place, length, ROWS, 2 * TILE, T8, T9, T10, T11)
    place = load_plane(upper_ptr, live, BLOCKS, 8, 2, ROWS, 4 * TILE)
    length = _children(place, length, ROWS, 4 * TILE, T4, T5, T6, T7)
    code = load_plane(angle_ptr, live, (BLOCKS * BITS + 3) // 4, 32, BITS, ROWS, 8 * TILE)
    if BITS == 1:
        first = length * 0.0
        second = length
    elif BITS == 2:
        first = length * T0
        second = first
    else:
        first = length * _choose(code, T0, T1, T2, T3)
        second = length * _choose(code, T3, T2, T1, T0)
    if BITS > 1:
        first = tl.where((code & (1 << (BITS - 2))) != 0, -first, first)
    second = tl.where((code & (1 << (BITS - 1))) != 0, -second, second)
    return tl.reshape(tl.join(first, second), [ROWS, BLOCK_D])


@triton.jit
def _pairs(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    # Neighbours of [ROWS, 2 * COUNT], and their length.
    first, second = tl.split(tl.reshape(x, [ROWS, COUNT, 2]))
    return first, second, tl.sqrt_rn(first * first + second * second)


@triton.jit
def _place(first, second, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    # How many of three slopes the angle of (first, second), both positive, is beyond.
    beyond = (second > A * first).to(tl.int32) + (second > B * first).to(tl.int32)
    return beyond + (second > C * first).to(tl.int32)


@triton.jit
def store_blocks(
    x, angle_ptr, upper_ptr, radius_ptr, live,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
    T8: tl.constexpr, T9: tl.constexpr, T10: tl.constexpr, T11: tl.constexpr,
    T12: tl.constexpr, T13: tl.constexpr, T14: tl.constexpr, T15: tl.constexpr,
):  # fmt: skip
    """Quantize and store rotated tokens, float32 [ROWS, BLOCK_D], 0 behind HEAD_DIM; the numbers are slopes.

    The pointers [ROWS] are those of a token. Radii are at most MOST.
    """
    BLOCKS: tl.constexpr = HEAD_DIM // 16
    TILE: tl.constexpr = BLOCK_D // 16
    THIRD: tl.constexpr = (BLOCKS + 1) // 2
    first, second, length = _pairs(x, ROWS, 8 * TILE)
    code = (second < 0.0).to(tl.int32) << (BITS - 1)
    if BITS > 1:
        code |= (first < 0.0).to(tl.int32) << (BITS - 2)
    if BITS > 2:
        code |= _place(tl.abs(first), tl.abs(second), T0, T1, T2)
    store_plane(angle_ptr, code, live, (BLOCKS * BITS + 3) // 4, 32, BITS, ROWS, 8 * TILE)
    first, second, length = _pairs(length, ROWS, 4 * TILE)
    store_plane(upper_ptr, _place(first, second, T4, T5, T6), live, BLOCKS, 8, 2, ROWS, 4 * TILE)
    first, second, length = _pairs(length, ROWS, 2 * TILE)
    store_plane(upper_ptr + BLOCKS, _place(first, second, T8, T9, T10), live, THIRD, 8, 2, ROWS, 2 * TILE)
    first, second, length = _pairs(length, ROWS, TILE)
    place = _place(first, second, T12, T13, T14)
    store_plane(upper_ptr + BLOCKS + THIRD, place, live, (BLOCKS + 3) // 4, 8, 2, ROWS, TILE)
    block = tl.arange(0, TILE)
    in_blocks = live[:, None] & (block < BLOCKS)[None, :]
    tl.store(radius_ptr[:, None] + block[None, :], tl.minimum(length, MOST).to(tl.float16), mask=in_blocks)


def padded_blocks(head_dim: int) -> int:
    """Return the channels of a tile: a power of two, and whole bytes at every level."""
    return max(next_power_of_2(head_dim), 64)


def level_constants(levels: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the slopes or cosines of the four levels as constants of a kernel; missing ones are 0."""
    constants: dict[str, float] = {}
    for level, table in enumerate(levels):
        constants |= table_constants(4 * level, 4, [*table, 0.0])
    return constants
