"""Device functions that choose narrower grids than the range where that leaves a smaller error.

Candidates and errors are defined in `ottfx/grid_search.py`.
"""

import triton
import triton.language as tl

from ottfx.kernels.packing import FINITE_MAX, group_constants

CANDIDATES = tl.constexpr(7)
HALF_CUT = tl.constexpr(5 / 128)
HALF_CUT_OF_ONE_BIT = tl.constexpr(7 / 128)
SYMMETRIC_CUT = tl.constexpr(3 / 32)


@triton.jit
def _distance(x, middle, step, levels, WIDEST: tl.constexpr):
    # Of `x` from the nearest point of its grid; the sign means nothing. A grid is folded in its middle until a single
    # point is left; narrow ones are not in the first folds. `middle`, `step` and `levels` have a size of 1 by members.
    distance = x - tl.broadcast_to(middle, x.shape)
    half_points = (1 << WIDEST) * 0.5
    for _ in tl.static_range(WIDEST):
        offset = tl.where(levels >= half_points, step * (half_points * 0.5), 0.0)
        distance = tl.abs(distance) - tl.broadcast_to(offset, x.shape)
        half_points *= 0.5
    return distance


@triton.jit
def search_range(
    x, taking_part, low, high, levels, GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    WIDEST: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """Scale and zero point, float16 [GROUPS, CHUNK], of keys float32 [GROUPS, GROUP, CHUNK].

    `taking_part` bool [GROUPS, GROUP, 1 or CHUNK]; `low`, `high` float32 [GROUPS, CHUNK] are their range; `levels` is
    the highest code, float32 [GROUPS, CHUNK], of at most WIDEST bits. With REPLACE those that take no part stand at
    `low`, whose errors are taken off again: fewer instructions, and registers for a second `x`.
    """
    if REPLACE:
        absent = GROUP - tl.sum(taking_part.to(tl.float32), axis=1) + tl.zeros([GROUPS, CHUNK], tl.float32)
        x = tl.where(taking_part, x, low[:, None, :])
    cut = tl.where(levels == 1.0, HALF_CUT_OF_ONE_BIT, HALF_CUT)
    best_scale, best_zero_point = group_constants(low, high, levels)
    best_error = tl.full([GROUPS, CHUNK], float("inf"), tl.float32)
    wide_levels = levels[:, None, :]
    for index in tl.range(0, CANDIDATES):
        margin = (high - low) * (cut * tl.cast(index, tl.float32))
        scale, zero_point = group_constants(low + margin, high - margin, levels)
        step = scale.to(tl.float32)[:, None, :]
        middle = wide_levels * 0.5 * step + zero_point.to(tl.float32)[:, None, :]
        distance = _distance(x, middle, step, wide_levels, WIDEST)
        square = distance * distance
        if not REPLACE:
            square = tl.where(taking_part, square, 0.0)
        total = tl.sum(square * square, axis=1)
        if REPLACE:
            of_low = _distance(low[:, None, :], middle, step, wide_levels, WIDEST)
            of_low = tl.reshape(of_low * of_low, [GROUPS, CHUNK])
            total -= absent * (of_low * of_low)
        better = total < best_error
        best_error = tl.where(better, total, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero_point = tl.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


@triton.jit
def symmetric_scale(x, taking_part, largest, BITS: tl.constexpr, SEARCH: tl.constexpr):
    """Scale, float16 [ROWS, GROUPS], of grids of BITS around 0 for values float32 [ROWS, GROUPS, MEMBERS].

    `taking_part` bool [ROWS, GROUPS, 1 or MEMBERS]; `largest` float32 [ROWS, GROUPS] is their largest magnitude.
    """
    per_level: tl.constexpr = 2 / ((1 << BITS) - 1)
    best_scale = tl.minimum(largest * per_level, FINITE_MAX).to(tl.float16)
    if SEARCH:
        best_error = tl.full(largest.shape, float("inf"), tl.float32)
        for index in tl.range(0, CANDIDATES):
            narrowed = largest * (1.0 - tl.cast(index, tl.float32) * SYMMETRIC_CUT)
            scale = tl.minimum(narrowed * per_level, FINITE_MAX).to(tl.float16)
            step = scale.to(tl.float32)[:, :, None]
            distance = x
            offset = step * ((1 << BITS) * 0.25)
            for _ in tl.static_range(BITS):
                distance = tl.abs(distance) - tl.broadcast_to(offset, x.shape)
                offset *= 0.5
            square = tl.where(taking_part, distance * distance, 0.0)
            total = tl.sum(square * square, axis=2)
            better = total < best_error
            best_error = tl.where(better, total, best_error)
            best_scale = tl.where(better, scale, best_scale)
    return best_scale
