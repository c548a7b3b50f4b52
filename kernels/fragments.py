"""Device functions that turn the words of a page into operands of the tensor cores without moving a bit between lanes.

A code in the low mantissa bits of a float16 with exponent 0 is the number `code * 2**-24`, and tensor cores multiply it
exactly. So one AND makes two operands of a word (docs/storage.md: even elements are in its low half, odd ones in the
high half), scaled by a power of two that the other operand takes back. One warp holds a tile: lane `4 * n + c` has
the rows of its `n` (0..7) and the contraction elements of its `c` (0..3), which is where a 16x8x16 product wants them.
"""

import torch
import triton
import triton.language as tl

SUBNORMAL = tl.constexpr(16777216.0)
"""2**24: what a code as a subnormal float16 is short of."""


@triton.jit
def halves(words):
    """Int32 [...] as the two float16 of its halves [..., 2]."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


# The interpreter has no assembler, and that of other makers' GPUs is another one.
_WITHOUT_PTX = tl.constexpr(bool(triton.knobs.runtime.interpret) or torch.version.hip is not None)


@triton.jit
def byte_halves(words, ODD: tl.constexpr):
    """Bytes 0 and 2 of int32 words, or 1 and 3, each in a half of its own: `words & 0x00FF00FF`, or of `words >> 8`.

    One instruction. From the shift a compiler makes four, as it takes the halves for two numbers.
    """
    if _WITHOUT_PTX:
        return ((words >> 8) if ODD else words) & 0x00FF00FF
    elif ODD:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [words], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x4240;", "=r,r", [words], tl.int32, True, 1)


@triton.jit
def pair_halves(first, second, UPPER: tl.constexpr):
    """Int32 with the low halves of two words, that of `first` below, or with their upper halves; one instruction."""
    if _WITHOUT_PTX:
        if UPPER:
            return ((first >> 16) & 0xFFFF) | (second & -65536)
        else:
            return (first & 0xFFFF) | (second << 16)
    elif UPPER:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [first, second], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], tl.int32, True, 1)


@triton.jit
def _pair3(words, plane, SHIFT: tl.constexpr):
    # As `halves`, of the codes that have two bits at 2 * SHIFT of `words` and the third at SHIFT of `plane`.
    low: tl.constexpr = 0x00030003 << (2 * SHIFT)
    high: tl.constexpr = 0x00040004 << (2 * SHIFT)
    return halves((words & low) | ((plane << (SHIFT + 2)) & high))


# Nibble j: where elements 2 * j and 2 * j + 1 of a word of mixed widths begin in their half, behind a shift by 10, and
# how much later they do with steep widths.
_GRADUAL_LIFTS = tl.constexpr(0x54209740)
_STEEP_DELAYS = tl.constexpr(0x00100100)


@triton.jit
def lift_exponent(element, steep, BITS: tl.constexpr, MIXED: tl.constexpr):
    """K int32, where `subnormal_codes` has `element` of a run of neighbours too large by 2**k; at most 9."""
    if MIXED:
        place = element % 16 // 2 * 4
        # A constant on the left of a tensor is none to the interpreter. Where both are alike it stays a constant.
        delay = tl.where(steep, ((element * 0 + _STEEP_DELAYS) >> place) & 15, 0)
        return (((element * 0 + _GRADUAL_LIFTS) >> place) & 15) + delay
    elif BITS == 2:
        position = element % 16 // 2
        return 2 * tl.where(position < 5, position, position - 5)
    elif BITS == 3:
        return element % 8 // 2 * 2
    elif BITS == 4:
        return element // 2 % 2 * 4
    else:
        return element * 0


@triton.jit
def power_of_2(exponent):
    """2**exponent, float32, for an int32 from -126 to 127."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


LEAST_UNIT = tl.constexpr(5.9604644775390625e-08)
"""2**-24: no float16 is smaller."""


@triton.jit
def larger_unit(unit, scale):
    """The unit, a power of two, in which no `scale` float32 [T, C] so far is more than 1, and one over it."""
    largest = tl.max(tl.max(scale, axis=0), axis=0)
    above = ((largest.to(tl.int32, bitcast=True) >> 23) + 1) << 23
    unit_now = tl.maximum(unit, above.to(tl.float32, bitcast=True))
    inverse_now = ((254 << 23) - unit_now.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return unit_now, inverse_now


@triton.jit
def subnormal_codes(words, plane, steep, BITS: tl.constexpr, MIXED: tl.constexpr):
    """Codes of neighbouring elements as float16, each `code * 2**(lift_exponent(element) - 24)`.

    `words` int32 [C, N, R, W] hold W words of a run; `plane` [C, N, R, W] the words of the 1-bit plane if BITS is 3.
    MIXED words have elements of 4 bits to 1 in the place of 2-bit ones (docs/storage.md, `Mixed words`); which, says
    `steep`, one number.
    The result is [C, N, R, 32 // BITS * W / 4, 4], for 3 bits as for 2.
    """
    PER_WORD: tl.constexpr = 16 if BITS < 4 else 32 // BITS
    if MIXED:
        upper = words >> 10
        first = tl.join(
            tl.join(halves(words & 0x000F000F), halves(words & tl.where(steep, 0x00F000F0, 0x00700070))),
            tl.join(halves(words & tl.where(steep, 0x01000100, 0x01800180)), halves(words & 0x02000200)),
        )
        second = tl.join(
            tl.join(
                halves(upper & tl.where(steep, 0x00070007, 0x00030003)),
                halves(upper & tl.where(steep, 0x00080008, 0x000C000C)),
            ),
            tl.join(halves(upper & 0x00100010), halves(upper & 0x00200020)),
        )
        run = tl.permute(tl.join(first, second), [0, 1, 2, 3, 7, 6, 5, 4])
    elif BITS == 2:
        upper = words >> 10
        first = tl.join(
            tl.join(halves(words & 0x00030003), halves(words & 0x000C000C)),
            tl.join(halves(words & 0x00300030), halves(words & 0x00C000C0)),
        )
        second = tl.join(
            tl.join(halves(words & 0x03000300), halves(upper & 0x00030003)),
            tl.join(halves(upper & 0x000C000C), halves(upper & 0x00300030)),
        )
        run = tl.permute(tl.join(first, second), [0, 1, 2, 3, 7, 6, 5, 4])
    elif BITS == 3:
        upper = words >> 8
        upper_plane = plane >> 4
        first = tl.join(
            tl.join(_pair3(words, plane, 0), _pair3(words, plane, 1)),
            tl.join(_pair3(words, plane, 2), _pair3(words, plane, 3)),
        )
        second = tl.join(
            tl.join(_pair3(upper, upper_plane, 0), _pair3(upper, upper_plane, 1)),
            tl.join(_pair3(upper, upper_plane, 2), _pair3(upper, upper_plane, 3)),
        )
        run = tl.permute(tl.join(first, second), [0, 1, 2, 3, 7, 6, 5, 4])
    elif BITS == 4:
        upper = words >> 8
        run = tl.join(
            tl.join(halves(words & 0x000F000F), halves(words & 0x00F000F0)),
            tl.join(halves(upper & 0x000F000F), halves(upper & 0x00F000F0)),
        )
        run = tl.permute(run, [0, 1, 2, 3, 6, 5, 4])
    else:
        run = tl.permute(
            tl.join(halves(byte_halves(words, False)), halves(byte_halves(words, True))), [0, 1, 2, 3, 5, 4]
        )
    return tl.reshape(run, [4, 8, words.shape[2], words.shape[3] * PER_WORD // 4, 4])


@triton.jit
def left_operand(run, GROUPS: tl.constexpr, K_WIDTH: tl.constexpr):
    """Runs [C 4, N 8, R, H, 4] as the left operand [R * 8, 16 * H], or [GROUPS, R * 8 / GROUPS, 16 * H]."""
    ROWS: tl.constexpr = run.shape[2] * 8
    DEPTH: tl.constexpr = run.shape[3] * 16
    if K_WIDTH == 4:
        run = tl.permute(run, [2, 1, 3, 0, 4])
    else:
        run = tl.permute(tl.reshape(run, [4, 8, ROWS // 8, DEPTH // 8, 2]), [2, 1, 3, 0, 4])
    if GROUPS == 1:
        return tl.reshape(run, [ROWS, DEPTH])
    else:
        return tl.reshape(run, [GROUPS, ROWS // GROUPS, DEPTH])


@triton.jit
def right_operand(columns, K_WIDTH: tl.constexpr):
    """Natural order [K, N] as the right operand of `left_operand`: contraction index `(h, c, e)` for `c, h, e`."""
    DEPTH: tl.constexpr = columns.shape[0]
    N: tl.constexpr = columns.shape[1]
    order = tl.permute(tl.reshape(columns, [4, DEPTH // (4 * K_WIDTH), K_WIDTH, N]), [1, 0, 2, 3])
    return tl.reshape(order, [DEPTH, N])
