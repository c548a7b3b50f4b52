"""Device functions that choose narrower grids than the range where that leaves a smaller error.

Candidates and errors are defined in `ottfx/grid_search.py`.
"""

import triton
import triton.language as tl

from ottfx.kernels.packing import FINITE_MAX, ROUND_MAGIC, group_constants, reciprocal, steps_of, symmetric_steps

CANDIDATES = tl.constexpr(7)
HALF_CUT = tl.constexpr(5 / 128)
HALF_CUT_OF_ONE_BIT = tl.constexpr(7 / 128)
SYMMETRIC_CUT = tl.constexpr(3 / 32)


@triton.jit
def search_range(x, taking_part, low, high, levels, GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Scale and zero point, float16 [GROUPS, CHUNK], of keys float32 [GROUPS, GROUP, CHUNK].

    `taking_part` bool [GROUPS, GROUP, 1 or CHUNK]; `low`, `high` float32 [GROUPS, CHUNK] are their range; `levels` is
    the highest code, float32 [GROUPS, CHUNK].
    """
    cut = tl.where(levels == 1.0, HALF_CUT_OF_ONE_BIT, HALF_CUT)
    best_scale, best_zero_point = group_constants(low, high, levels)
    best_error = tl.full([GROUPS, CHUNK], float("inf"), tl.float32)
    for index in tl.range(0, CANDIDATES):
        margin = (high - low) * (cut * tl.cast(index, tl.float32))
        scale, zero_point = group_constants(low + margin, high - margin, levels)
        wide_scale = tl.broadcast_to(scale.to(tl.float32)[:, None, :], [GROUPS, GROUP, CHUNK])
        wide_zero = tl.broadcast_to(zero_point.to(tl.float32)[:, None, :], [GROUPS, GROUP, CHUNK])
        per_step = tl.broadcast_to(reciprocal(scale)[:, None, :], [GROUPS, GROUP, CHUNK])
        steps = steps_of(x, wide_zero, per_step, tl.broadcast_to(levels[:, None, :], [GROUPS, GROUP, CHUNK]))
        error = (steps + ROUND_MAGIC - ROUND_MAGIC) * wide_scale + wide_zero - x
        square = tl.where(taking_part, error * error, 0.0)
        total = tl.sum(square * square, axis=1)
        better = total < best_error
        best_error = tl.where(better, total, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero_point = tl.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


@triton.jit
def symmetric_scale(x, taking_part, largest, LEVELS: tl.constexpr, SEARCH: tl.constexpr):
    """Scale, float16 [ROWS, GROUPS], of grids around 0 for values float32 [ROWS, GROUPS, MEMBERS].

    `taking_part` bool [ROWS, GROUPS, 1 or MEMBERS]; `largest` float32 [ROWS, GROUPS] is their largest magnitude.
    """
    best_scale = tl.minimum(largest * (2 / LEVELS), FINITE_MAX).to(tl.float16)
    if SEARCH:
        best_error = tl.full(largest.shape, float("inf"), tl.float32)
        for index in tl.range(0, CANDIDATES):
            narrowed = largest * (1.0 - tl.cast(index, tl.float32) * SYMMETRIC_CUT)
            scale = tl.minimum(narrowed * (2 / LEVELS), FINITE_MAX).to(tl.float16)
            steps = symmetric_steps(x, tl.broadcast_to(reciprocal(scale)[:, :, None], x.shape), LEVELS)
            rounded = steps + ROUND_MAGIC - ROUND_MAGIC - LEVELS / 2
            error = rounded * tl.broadcast_to(scale.to(tl.float32)[:, :, None], x.shape) - x
            square = tl.where(taking_part, error * error, 0.0)
            total = tl.sum(square * square, axis=2)
            better = total < best_error
            best_error = tl.where(better, total, best_error)
            best_scale = tl.where(better, scale, best_scale)
    return best_scale
