"""Device functions on the words of a page: unpack them to codes, pack codes into them, quantize a group.

The order of the words is defined in docs/storage.md: element `i` of a word sits at bit
`width * (i // 2) + 16 * (i % 2)`, and words run along the axis that attention contracts.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(128)
FINITE_MAX = tl.constexpr(65504.0)
# 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to an integer, ties to even.
ROUND_MAGIC = tl.constexpr(12582912.0)
LOWER_ROW_BITS = tl.constexpr(0x00FF00FF)
UPPER_ROW_BITS = tl.constexpr(-0x00FF0100)
# Nibble j is that of elements 2 * j and 2 * j + 1 of a word of mixed widths (docs/storage.md, `Mixed words`).
_GRADUAL_WIDTHS = tl.constexpr(0x11221234)
_GRADUAL_POSITIONS = tl.constexpr(0xFECA9740 - (1 << 32))
_STEEP_WIDTHS = tl.constexpr(0x11131144)
_STEEP_POSITIONS = tl.constexpr(0xFEDA9840 - (1 << 32))
STEEP_MARK = tl.constexpr(16384)


@triton.jit
def bit_position(element, WIDTH: tl.constexpr):
    """Bit of a word where an element begins."""
    return WIDTH * (element // 2) + 16 * (element % 2)


@triton.jit
def is_steep(order_ptr, MIXED: tl.constexpr):
    """Whether a head has steep widths, by its order of channels; a constant without one."""
    if MIXED:
        return tl.load(order_ptr).to(tl.int32) >= STEEP_MARK
    else:
        return False


@triton.jit
def mixed_width(element, steep):
    """Bits of an element of a word of mixed widths."""
    return (tl.where(steep, _STEEP_WIDTHS, _GRADUAL_WIDTHS) >> (element // 2 * 4)) & 15


@triton.jit
def mixed_position(element, steep):
    """Bit of a word of mixed widths where an element begins."""
    start = (tl.where(steep, _STEEP_POSITIONS, _GRADUAL_POSITIONS) >> (element // 2 * 4)) & 15
    return start + 16 * (element % 2)


@triton.jit
def highest_codes(channel, steep):
    """Float32: the highest code of stored channels whose words are of mixed widths."""
    return ((1 << mixed_width(channel % 16, steep)) - 1).to(tl.float32)


@triton.jit
def unpack_mixed(words, steep, STRIPS: tl.constexpr, ROWS: tl.constexpr):
    """Words of mixed widths int32 [STRIPS, ROWS] to codes int32 [STRIPS * 16, ROWS]."""
    element = tl.arange(0, 16)
    mask = (1 << mixed_width(element, steep)) - 1
    codes = (words[:, None, :] >> mixed_position(element, steep)[None, :, None]) & mask[None, :, None]
    return tl.reshape(codes, [STRIPS * 16, ROWS])


@triton.jit
def pack_mixed(codes, steep, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes int32 [ROWS, COLUMNS] to words of mixed widths int32 [ROWS, COLUMNS // 16]."""
    neighbours = tl.reshape(codes, [ROWS, COLUMNS // 16, 16])
    return tl.sum(neighbours << mixed_position(tl.arange(0, 16), steep)[None, None, :], axis=2)


@triton.jit
def unpack_words(words, WIDTH: tl.constexpr, PER_WORD: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr):
    """Words int32 [STRIPS, ROWS] to codes int32 [STRIPS * PER_WORD, ROWS]."""
    shift = bit_position(tl.arange(0, PER_WORD), WIDTH)
    codes = (words[:, None, :] >> shift[None, :, None]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, [STRIPS * PER_WORD, ROWS])


@triton.jit
def load_key_codes(
    page_ptr, row, steep, BITS: tl.constexpr, MIXED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes int32 [BLOCK_D, BLOCK_N] of BLOCK_N tokens (at most 64) from row `row` on, a multiple of BLOCK_N.

    `steep` is that of `is_steep`.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    STRIPS: tl.constexpr = BLOCK_D // PER_WORD
    strip = tl.arange(0, STRIPS)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    # [STRIPS, BLOCK_N]
    words = tl.load(page_ptr + strip * 128 + row + column, mask=strip < HEAD_DIM // PER_WORD, other=0)
    if MIXED:
        codes = unpack_mixed(words, steep, STRIPS, BLOCK_N)
    else:
        codes = unpack_words(words, WIDTH, PER_WORD, STRIPS, BLOCK_N)
    if BITS == 3:
        strip16 = tl.arange(0, BLOCK_D // 16)[:, None]
        plane_ptr = page_ptr + HEAD_DIM * 8
        # [BLOCK_D // 16, BLOCK_N]
        plane = tl.load(plane_ptr + strip16 * 64 + row % 64 + column, mask=strip16 < HEAD_DIM // 16, other=0)
        codes += unpack_words(plane >> (row // 64 * 8), 1, 16, BLOCK_D // 16, BLOCK_N) * 4
    return codes


@triton.jit
def load_value_codes(
    page_ptr, row, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Codes int32 [BLOCK_N, BLOCK_D] of BLOCK_N tokens from row `row` on, a multiple of BLOCK_N."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    STRIPS: tl.constexpr = BLOCK_N // PER_WORD
    strip = row // PER_WORD + tl.arange(0, STRIPS)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    # [STRIPS, BLOCK_D]
    words = tl.load(page_ptr + strip * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0)
    codes = unpack_words(words, WIDTH, PER_WORD, STRIPS, BLOCK_D)
    if BITS == 3:
        HALF: tl.constexpr = HEAD_DIM // 2
        strip16 = row // 16 + tl.arange(0, BLOCK_N // 16)[:, None]
        plane_ptr = page_ptr + HEAD_DIM * 8
        # [BLOCK_N // 16, BLOCK_D]
        plane = tl.load(plane_ptr + strip16 * HALF + channel % HALF, mask=channel < HEAD_DIM, other=0)
        codes += unpack_words(plane >> (channel // HALF * 8), 1, 16, BLOCK_N // 16, BLOCK_D) * 4
    return codes


@triton.jit
def load_key_code(page_ptr, row, channel, live, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Code int32 of each (row, channel) of a page, one gathered word each; for the few rows of a write-back."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    word = tl.load(page_ptr + channel // PER_WORD * 128 + row, mask=live, other=0)
    code = (word >> bit_position(channel % PER_WORD, WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        plane = tl.load(page_ptr + HEAD_DIM * 8 + channel // 16 * 64 + row % 64, mask=live, other=0)
        code += ((plane >> (bit_position(channel % 16, 1) + row // 64 * 8)) & 1) * 4
    return code


@triton.jit
def pack_columns(codes, WIDTH: tl.constexpr, PER_WORD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes int32 [ROWS, COLUMNS] to words int32 [ROWS, COLUMNS // PER_WORD]."""
    shift = bit_position(tl.arange(0, PER_WORD), WIDTH)
    neighbours = tl.reshape(codes, [ROWS, COLUMNS // PER_WORD, PER_WORD])
    return tl.sum(neighbours << shift[None, None, :], axis=2)


@triton.jit
def pack_rows(codes, WIDTH: tl.constexpr, PER_WORD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes int32 [ROWS, COLUMNS] to words int32 [ROWS // PER_WORD, COLUMNS]."""
    shift = bit_position(tl.arange(0, PER_WORD), WIDTH)
    neighbours = tl.reshape(codes, [ROWS // PER_WORD, PER_WORD, COLUMNS])
    return tl.sum(neighbours << shift[None, :, None], axis=1)


@triton.jit
def make_finite(x):
    """Float32 with NaN -> 0 and everything else clamped to +-65504."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -FINITE_MAX), FINITE_MAX)


@triton.jit
def group_constants(low, high, levels):
    """Scale and zero point, float16, of groups with ranges `low .. high` in float32, clamped to finite ones.

    `levels` is the highest code: one number, or a float32 tile that fits `low`.
    """
    zero_point = tl.minimum(tl.maximum(low, -FINITE_MAX), FINITE_MAX).to(tl.float16)
    width = high - zero_point.to(tl.float32)
    scale = tl.div_rn(width, tl.zeros(width.shape, tl.float32) + levels)
    scale = tl.minimum(tl.maximum(scale, 0.0), FINITE_MAX).to(tl.float16)
    return scale, zero_point


@triton.jit
def reciprocal(scale):
    """Float32 1 / scale, 0 where the scale is 0."""
    wide = scale.to(tl.float32)
    return tl.where(wide == 0.0, 0.0, tl.div_rn(tl.full(wide.shape, 1.0, tl.float32), tl.where(wide == 0.0, 1.0, wide)))


@triton.jit
def steps_of(x, zero_point, per_step, levels):
    """How many steps above the zero point, 0 .. levels and not yet rounded; float32 tiles of one shape."""
    return tl.minimum(tl.maximum((x - zero_point) * per_step, 0.0), levels)


@triton.jit
def symmetric_steps(x, per_step, LEVELS: tl.constexpr):
    """As `steps_of`, of a grid around 0: `(code - LEVELS / 2) * scale`."""
    return tl.minimum(tl.maximum(x * per_step + LEVELS / 2, 0.0), LEVELS)


@triton.jit
def code_bits(steps):
    """Round steps to codes; int32 whose low bits are the code, above them those of ROUND_MAGIC."""
    return (steps + ROUND_MAGIC).to(tl.int32, bitcast=True)


def _excess(width: int) -> int:
    # What the high bits of ROUND_MAGIC add up to in a word of unmasked `code_bits`, as int32.
    total = sum(0x4B400000 << (width * (i // 2) + 16 * (i % 2)) for i in range(32 // width)) % 2**32
    return total - 2**32 if total >= 2**31 else total


_EXCESS_2 = tl.constexpr(_excess(2))
_EXCESS_4 = tl.constexpr(_excess(4))
_EXCESS_8 = tl.constexpr(_excess(8))


@triton.jit
def code_excess(WIDTH: tl.constexpr):
    """What a sum of shifted `code_bits`, one for each place of a word, has too much."""
    return _EXCESS_2 if WIDTH == 2 else (_EXCESS_4 if WIDTH == 4 else _EXCESS_8)


@triton.jit
def codes_of(steps):
    """Codes int32 of steps that are not yet rounded."""
    return code_bits(steps) & 255
