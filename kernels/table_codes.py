"""Device functions on codes of a sign and a place in a table of magnitudes (`ottfx/turbo_codes.py` defines them).

Tables are constants of the kernel, at most 8 ascending numbers `T0 .. T7`: an entry is chosen by selects in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ottfx.kernels.launch import next_power_of_2
from ottfx.kernels.word_planes import load_plane, store_plane


@triton.jit
def entry(
    index, COUNT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
):  # fmt: skip
    """Float32 entries of the first COUNT (2, 4 or 8) of a table; index int32, below COUNT."""
    odd = (index & 1) != 0
    value = tl.where(odd, T1, T0)
    if COUNT > 2:
        value = tl.where((index & 2) != 0, tl.where(odd, T3, T2), value)
    if COUNT > 4:
        upper = tl.where((index & 2) != 0, tl.where(odd, T7, T6), tl.where(odd, T5, T4))
        value = tl.where((index & 4) != 0, upper, value)
    return value.to(tl.float32)


@triton.jit
def nearest(
    size, COUNT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
):  # fmt: skip
    """Int32 places of the nearest of the first COUNT entries of a table; the lower of two that are equally near."""
    index = (size > 0.5 * (T0 + T1)).to(tl.int32)
    if COUNT > 2:
        index += (size > 0.5 * (T1 + T2)).to(tl.int32) + (size > 0.5 * (T2 + T3)).to(tl.int32)
    if COUNT > 4:
        index += (size > 0.5 * (T3 + T4)).to(tl.int32) + (size > 0.5 * (T4 + T5)).to(tl.int32)
        index += (size > 0.5 * (T5 + T6)).to(tl.int32) + (size > 0.5 * (T6 + T7)).to(tl.int32)
    return index


@triton.jit
def load_signed(
    token_ptr, norm_ptr, live, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
):  # fmt: skip
    """Rotated tokens, float32 [ROWS, BLOCK_D]: norm, sign and table entry.

    `token_ptr` and `norm_ptr` [ROWS] point to the words and the norm of a token. Tokens not `live` give 0, channels
    behind HEAD_DIM any finite number.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    if BITS == 3:
        LOW: tl.constexpr = (HEAD_DIM + 15) // 16
        place = load_plane(token_ptr, live, LOW, 32, 2, ROWS, BLOCK_D)
        negative = load_plane(token_ptr + LOW, live, (HEAD_DIM + 31) // 32, 32, 1, ROWS, BLOCK_D) != 0
    else:
        code = load_plane(token_ptr, live, HEAD_DIM * BITS // 32, 32, BITS, ROWS, BLOCK_D)
        place = code & (HALF - 1)
        negative = code >= HALF
    norm = tl.load(norm_ptr, mask=live, other=0.0).to(tl.float32)[:, None]
    size = entry(place, HALF, T0, T1, T2, T3, T4, T5, T6, T7) * norm
    return tl.where(negative, -size, size)


@triton.jit
def store_signed(
    token_ptr, place, negative, live,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pack places int32 and signs int32 (1 is negative) [ROWS, BLOCK_D] into the words of `live` tokens.

    Channels behind HEAD_DIM must be 0.
    """
    if BITS == 3:
        LOW: tl.constexpr = (HEAD_DIM + 15) // 16
        store_plane(token_ptr, place, live, LOW, 32, 2, ROWS, BLOCK_D)
        store_plane(token_ptr + LOW, negative, live, (HEAD_DIM + 31) // 32, 32, 1, ROWS, BLOCK_D)
    else:
        code = place | (negative << (BITS - 1))
        store_plane(token_ptr, code, live, HEAD_DIM * BITS // 32, 32, BITS, ROWS, BLOCK_D)


def padded_channels(head_dim: int) -> int:
    """Return the channels of a tile: a power of two, and whole words of signs."""
    return max(next_power_of_2(head_dim), 32)


def table_constants(first: int, size: int, table: Sequence[float]) -> dict[str, float]:
    """Return a table as `size` constants of a kernel, from `T<first>` on; the last number fills up."""
    return {f"T{first + place}": table[min(place, len(table) - 1)] for place in range(size)}
