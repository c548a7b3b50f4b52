"""Device functions on keys in pairs of channels: radius and angle (`ottfx/pair_codes.py` defines them).

There is neither an arcus tangent nor a cosine that every compiler and the interpreter have, so both are series here,
to the last places of float32.
"""

import math

import triton
import triton.language as tl

from ottfx.kernels.affine_pack import store_value_codes
from ottfx.kernels.packing import FINITE_MAX, load_value_codes, make_finite, reciprocal
from ottfx.kernels.window import load_real, load_tokens

PI = tl.constexpr(math.pi)
TAN_EIGHTH_TURN = tl.constexpr(math.tan(math.pi / 8))


@triton.jit
def angle_of(first, second):
    """Angle of (first, second), float32 in 0 .. 2 pi; 0 for (0, 0)."""
    a, b = tl.abs(first), tl.abs(second)
    larger = tl.maximum(a, b)
    ratio = tl.div_rn(tl.minimum(a, b), tl.where(larger == 0.0, 1.0, larger))
    # arctan(x) = pi / 4 + arctan((x - 1) / (x + 1)) leaves |x| < 0.42 to the series.
    folded = ratio > TAN_EIGHTH_TURN
    x = tl.where(folded, tl.div_rn(ratio - 1.0, ratio + 1.0), ratio)
    square = x * x
    series = 1.0 / 15 - square * (1.0 / 17)
    series = 1.0 / 11 - square * (1.0 / 13 - square * series)
    series = 1.0 / 7 - square * (1.0 / 9 - square * series)
    series = 1.0 / 3 - square * (1.0 / 5 - square * series)
    angle = x - x * square * series + tl.where(folded, PI / 4, 0.0)
    angle = tl.where(b > a, PI / 2 - angle, angle)
    angle = tl.where(first < 0.0, PI - angle, angle)
    return tl.where(second < 0.0, 2 * PI - angle, angle)


@triton.jit
def unit_vector(angle):
    """Cosine and sine, float32, of angles in 0 .. 2 pi."""
    # Series of half the angle from pi, at most pi / 2, then doubled.
    half = (angle - PI) * 0.5
    square = half * half
    sine = 1.0 / 362880 - square * (1.0 / 39916800)
    sine = 1.0 / 120 - square * (1.0 / 5040 - square * sine)
    sine = half * (1.0 - square * (1.0 / 6 - square * sine))
    cosine = 1.0 / 3628800 - square * (1.0 / 479001600)
    cosine = 1.0 / 720 - square * (1.0 / 40320 - square * cosine)
    cosine = 1.0 - square * (0.5 - square * (1.0 / 24 - square * cosine))
    return 2.0 * sine * sine - 1.0, -2.0 * sine * cosine


@triton.jit
def _load_polar(
    new_ptr, stride_token, ring_ptr, token, past, pair_channel, in_pairs,
    CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    # Radius and angle [16, COLUMNS] of 16 tokens that all exist.
    live = token >= 0
    first = load_tokens(
        new_ptr, stride_token, ring_ptr, ring_ptr, token, past, live, pair_channel, in_pairs, CAPACITY, HEAD_DIM
    )
    second = load_tokens(
        new_ptr, stride_token, ring_ptr, ring_ptr, token, past, live, pair_channel + HEAD_DIM // 2, in_pairs,
        CAPACITY, HEAD_DIM,
    )  # fmt: skip
    first, second = make_finite(first), make_finite(second)
    radius = tl.sqrt_rn(first * first + second * second)
    return tl.minimum(radius, FINITE_MAX), tl.where(radius == 0.0, 0.0, angle_of(first, second))


@triton.jit
def _cells(low, high, BITS: tl.constexpr):
    # Width of a cell and lower end, float16, of ranges in float32; `ottfx.pair_codes.quantize_cells`.
    zero_point = low.to(tl.float16)
    scale = (high - zero_point.to(tl.float32)) * (1.0 / (1 << BITS))
    return tl.minimum(tl.maximum(scale, 0.0), FINITE_MAX).to(tl.float16), zero_point


@triton.jit
def _cell_of(x, scale, zero_point, real, BITS: tl.constexpr):
    cell = tl.floor((x - zero_point.to(tl.float32)[None, :]) * reciprocal(scale)[None, :])
    cell = tl.minimum(tl.maximum(cell, 0.0), (1 << BITS) - 1.0)
    return tl.where(real[:, None], cell, 0.0).to(tl.int32)


@triton.jit
def store_pairs(
    pair, start, key_ptr, stride_key_token, ring_ptr, valid_ptr, ring_valid_ptr, past, pages,
    radius_ptr, radius_scale_ptr, radius_zero_ptr, angle_ptr, angle_scale_ptr, angle_zero_ptr,
    RADIUS_BITS: tl.constexpr, ANGLE_BITS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_QUARTER: tl.constexpr,
):  # fmt: skip
    """Quantize and store the keys of one group, which begins at token `start`; `pair` is (sequence, kv head)."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = 2 * BLOCK_QUARTER
    # Two halves, each padded, as `store_value_codes` takes them.
    column = tl.arange(0, COLUMNS)
    in_pairs = column % BLOCK_QUARTER < PAIRS // 2
    pair_channel = column // BLOCK_QUARTER * (PAIRS // 2) + column % BLOCK_QUARTER
    step = tl.arange(0, 16)
    radius_low = tl.full([COLUMNS], FINITE_MAX, tl.float32)
    radius_high = tl.full([COLUMNS], -FINITE_MAX, tl.float32)
    angle_low, angle_high = radius_low, radius_high
    count = 0
    for offset in tl.range(0, GROUP, 16):
        token = start + offset + step
        real = load_real(valid_ptr, ring_valid_ptr, token, past, token >= 0, CAPACITY, HAS_VALID)
        radius, angle = _load_polar(
            key_ptr, stride_key_token, ring_ptr, token, past, pair_channel, in_pairs, CAPACITY, HEAD_DIM
        )
        count += tl.sum(real.to(tl.int32), axis=0)
        radius_low = tl.minimum(radius_low, tl.min(tl.where(real[:, None], radius, FINITE_MAX), axis=0))
        radius_high = tl.maximum(radius_high, tl.max(tl.where(real[:, None], radius, -FINITE_MAX), axis=0))
        angle_low = tl.minimum(angle_low, tl.min(tl.where(real[:, None], angle, FINITE_MAX), axis=0))
        angle_high = tl.maximum(angle_high, tl.max(tl.where(real[:, None], angle, -FINITE_MAX), axis=0))
    known = count > 0
    radius_scale, radius_zero = _cells(tl.where(known, radius_low, 0.0), tl.where(known, radius_high, 0.0), RADIUS_BITS)
    angle_scale, angle_zero = _cells(tl.where(known, angle_low, 0.0), tl.where(known, angle_high, 0.0), ANGLE_BITS)

    slot = pair * pages + start // 128
    constant = (slot * (128 // GROUP) + start % 128 // GROUP) * PAIRS + pair_channel
    tl.store(radius_scale_ptr + constant, radius_scale, mask=in_pairs)
    tl.store(radius_zero_ptr + constant, radius_zero, mask=in_pairs)
    tl.store(angle_scale_ptr + constant, angle_scale, mask=in_pairs)
    tl.store(angle_zero_ptr + constant, angle_zero, mask=in_pairs)
    for offset in tl.range(0, GROUP, 16):
        token = start + offset + step
        real = load_real(valid_ptr, ring_valid_ptr, token, past, token >= 0, CAPACITY, HAS_VALID)
        radius, angle = _load_polar(
            key_ptr, stride_key_token, ring_ptr, token, past, pair_channel, in_pairs, CAPACITY, HEAD_DIM
        )
        strip = (start + offset) % 128 // 16
        page_ptr = radius_ptr + slot * (4 * PAIRS * RADIUS_BITS)
        codes = _cell_of(radius, radius_scale, radius_zero, real, RADIUS_BITS)
        store_value_codes(page_ptr, codes, token >= 0, strip, RADIUS_BITS, PAIRS, BLOCK_QUARTER)
        page_ptr = angle_ptr + slot * (4 * PAIRS * ANGLE_BITS)
        codes = _cell_of(angle, angle_scale, angle_zero, real, ANGLE_BITS)
        store_value_codes(page_ptr, codes, token >= 0, strip, ANGLE_BITS, PAIRS, BLOCK_QUARTER)


@triton.jit
def _centres(
    codes_ptr, scale_ptr, zero_ptr, row, BITS: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Float32 [BLOCK_N, BLOCK_P]: centres of the cells of BLOCK_N tokens from row `row` of a page on.
    SPAN: tl.constexpr = GROUP if GROUP < BLOCK_N else BLOCK_N
    GROUPS: tl.constexpr = BLOCK_N // SPAN
    codes = load_value_codes(codes_ptr, row, BITS, PAIRS, BLOCK_P, BLOCK_N).to(tl.float32)
    pair = tl.arange(0, BLOCK_P)
    group = row // GROUP + tl.arange(0, GROUPS)
    offset = group[:, None] * PAIRS + pair[None, :]
    in_pairs = (group >= 0)[:, None] & (pair < PAIRS)[None, :]
    # [GROUPS, BLOCK_P]
    scale = tl.load(scale_ptr + offset, mask=in_pairs, other=0.0).to(tl.float32)
    zero_point = tl.load(zero_ptr + offset, mask=in_pairs, other=0.0).to(tl.float32)
    centre = zero_point[:, None, :] + (tl.reshape(codes, [GROUPS, SPAN, BLOCK_P]) + 0.5) * scale[:, None, :]
    return tl.reshape(centre, [BLOCK_N, BLOCK_P])


@triton.jit
def load_pairs(
    slot, row, radius_ptr, radius_scale_ptr, radius_zero_ptr, angle_ptr, angle_scale_ptr, angle_zero_ptr,
    RADIUS_BITS: tl.constexpr, ANGLE_BITS: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both channels of each pair, float32 [BLOCK_N, BLOCK_P], of tokens from row `row` of the page `slot` on."""
    constants = slot * (128 // GROUP * PAIRS)
    radius = _centres(
        radius_ptr + slot * (4 * PAIRS * RADIUS_BITS), radius_scale_ptr + constants, radius_zero_ptr + constants, row,
        RADIUS_BITS, GROUP, PAIRS, BLOCK_P, BLOCK_N,
    )  # fmt: skip
    angle = _centres(
        angle_ptr + slot * (4 * PAIRS * ANGLE_BITS), angle_scale_ptr + constants, angle_zero_ptr + constants, row,
        ANGLE_BITS, GROUP, PAIRS, BLOCK_P, BLOCK_N,
    )  # fmt: skip
    cosine, sine = unit_vector(angle)
    return radius * cosine, radius * sine
