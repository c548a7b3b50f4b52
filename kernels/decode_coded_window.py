"""Device functions of decode attention: the programs that read a window in 8 bits, and the seats of groups."""

import triton
import triton.language as tl

from ottfx.kernels.decode_coded import attend_rows, key_operands
from ottfx.kernels.decode_packed import WEIGHT_UNIT
from ottfx.kernels.decode_single import attend_exact_once
from ottfx.kernels.decode_window import DENSE_TILE, NOTHING_SEEN, attend_exact, store_part
from ottfx.kernels.fragments import LEAST_UNIT, SUBNORMAL, power_of_2
from ottfx.kernels.packing import PAGE


@triton.jit
def attend_coded_rows(
    pair, batch, head, part, window_parts, past, packed, q_len, pages, query_ptr, query_offset, key_ptr, value_ptr,
    mask_ptr, score_factor, rows, slot, live_columns, mask_offset,
    key_residual_ptr, key_row_scale_ptr, value_residual_ptr, value_row_scale_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr,
    seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr, partial_ptr, log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, POOL_ROWS: tl.constexpr,
    PAGE_SEATS: tl.constexpr, MASK: tl.constexpr, ONE_MASK: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    """`attend_window` over a ring of int8 and the seats, which its programs share evenly."""
    queries, zero_scores, exponent = key_operands(
        query_ptr + batch * stride_query_batch, head, rows, stride_query_head, stride_query_token,
        QUERIES_PER_KV, SINGLE, COLUMNS, HEAD_DIM, BLOCK_D, K_WIDTH,
    )  # fmt: skip
    score_unit = power_of_2(exponent) * (score_factor * SUBNORMAL)
    unit = LEAST_UNIT
    row_max = tl.full([COLUMNS], NOTHING_SEEN, tl.float32)
    row_sum = tl.zeros([8, COLUMNS], tl.float32)
    weight_sum = tl.zeros([8, COLUMNS], tl.float32)
    acc = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    # The programs share all tiles evenly: first those of the window, then those of the seats.
    seats = tl.cdiv(packed, PAGE) * PAGE_SEATS
    window_tiles = tl.cdiv(past - packed, DENSE_TILE)
    share = tl.cdiv(window_tiles + tl.cdiv(seats, DENSE_TILE), window_parts) * DENSE_TILE
    first = part * share
    ring = pair * CAPACITY
    unit, row_max, row_sum, weight_sum, acc = attend_rows(
        first, tl.minimum(first + share, past - packed), packed % CAPACITY, packed,
        key_residual_ptr + ring * HEAD_DIM, key_row_scale_ptr + ring,
        value_residual_ptr + ring * HEAD_DIM, value_row_scale_ptr + ring, seat_row_ptr,
        queries, zero_scores, score_unit, mask_ptr, mask_offset, live_columns, stride_mask_token,
        unit, row_max, row_sum, weight_sum, acc,
        CAPACITY, 0, HEAD_DIM, MASK, ONE_MASK or SINGLE, COLUMNS, BLOCK_D, K_WIDTH,
    )  # fmt: skip
    if PAGE_SEATS > 0:
        first -= window_tiles * DENSE_TILE
        last = tl.minimum(first + share, seats)
        if last > 0:
            at = pair * pages * PAGE_SEATS
            unit, row_max, row_sum, weight_sum, acc = attend_rows(
                tl.maximum(first, 0), last, 0, packed,
                seat_key_ptr + at * HEAD_DIM, seat_key_scale_ptr + at,
                seat_value_ptr + at * HEAD_DIM, seat_value_scale_ptr + at, seat_row_ptr + at,
                queries, zero_scores, score_unit, mask_ptr, mask_offset, live_columns, stride_mask_token,
                unit, row_max, row_sum, weight_sum, acc,
                0, PAGE_SEATS, HEAD_DIM, MASK, ONE_MASK or SINGLE, COLUMNS, BLOCK_D, K_WIDTH,
            )  # fmt: skip
    row_sum = tl.sum(row_sum, axis=0)
    acc = (acc - tl.sum(weight_sum, axis=0)[None, :] * (128 / SUBNORMAL)) * (unit * (SUBNORMAL * WEIGHT_UNIT))
    if part == window_parts - 1:
        attend: tl.constexpr = attend_exact_once if SINGLE else attend_exact
        exact_max, exact_sum, exact = attend(
            pair, batch, head, past, q_len, query_ptr, query_offset, key_ptr, value_ptr, mask_ptr, score_factor,
            slot, live_columns, mask_offset, outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            HEAD_DIM, POOL_ROWS, MASK, COLUMNS, BLOCK_D, NEW_APART,
        )  # fmt: skip
        exact = _by_lane(exact, BLOCK_D)
        new_max = tl.maximum(row_max, exact_max)
        decay, share_of_exact = tl.exp2(row_max - new_max), tl.exp2(exact_max - new_max)
        row_sum = row_sum * decay + exact_sum * share_of_exact
        acc = acc * decay[None, :] + exact * share_of_exact[None, :]
        row_max = new_max
    channel = _lane_channels(BLOCK_D)
    store_part(acc, row_max, row_sum, partial_ptr, log_sum_ptr, slot, channel, live_columns, HEAD_DIM)


@triton.jit
def attend_seats(
    pair, batch, head, part, seat_parts, packed, pages, query_ptr, mask_ptr, score_factor, rows, slot,
    live_columns, mask_offset,
    seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr, partial_ptr, log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token, stride_mask_token,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SEATS: tl.constexpr, MASK: tl.constexpr,
    ONE_MASK: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend over one share of the seats, where the window is read by other programs; store it in `slot`."""
    queries, zero_scores, exponent = key_operands(
        query_ptr + batch * stride_query_batch, head, rows, stride_query_head, stride_query_token,
        QUERIES_PER_KV, SINGLE, COLUMNS, HEAD_DIM, BLOCK_D, K_WIDTH,
    )  # fmt: skip
    score_unit = power_of_2(exponent) * (score_factor * SUBNORMAL)
    seats = tl.cdiv(packed, PAGE) * PAGE_SEATS
    share = tl.cdiv(tl.cdiv(seats, DENSE_TILE), seat_parts) * DENSE_TILE
    at = pair * pages * PAGE_SEATS
    unit = LEAST_UNIT
    unit, row_max, row_sum, weight_sum, acc = attend_rows(
        part * share, tl.minimum(part * share + share, seats), 0, packed,
        seat_key_ptr + at * HEAD_DIM, seat_key_scale_ptr + at,
        seat_value_ptr + at * HEAD_DIM, seat_value_scale_ptr + at, seat_row_ptr + at,
        queries, zero_scores, score_unit, mask_ptr, mask_offset, live_columns, stride_mask_token,
        unit, tl.full([COLUMNS], NOTHING_SEEN, tl.float32), tl.zeros([8, COLUMNS], tl.float32),
        tl.zeros([8, COLUMNS], tl.float32), tl.zeros([BLOCK_D, COLUMNS], tl.float32),
        0, PAGE_SEATS, HEAD_DIM, MASK, ONE_MASK or SINGLE, COLUMNS, BLOCK_D, K_WIDTH,
    )  # fmt: skip
    acc = (acc - tl.sum(weight_sum, axis=0)[None, :] * (128 / SUBNORMAL)) * (unit * (SUBNORMAL * WEIGHT_UNIT))
    channel = _lane_channels(BLOCK_D)
    store_part(acc, row_max, tl.sum(row_sum, axis=0), partial_ptr, log_sum_ptr, slot, channel, live_columns, HEAD_DIM)


@triton.jit
def _lane_channels(BLOCK_D: tl.constexpr):
    # Row R * 8 + n of the product with values is channel R of those of n.
    r = tl.arange(0, BLOCK_D)
    return r % 8 * (BLOCK_D // 8) + r // 8


@triton.jit
def _by_lane(values, BLOCK_D: tl.constexpr):
    # Rows by channel -> in the order of the product with values.
    COLUMNS: tl.constexpr = values.shape[1]
    values = tl.permute(tl.reshape(values, [8, BLOCK_D // 8, COLUMNS]), [1, 0, 2])
    return tl.reshape(values, [BLOCK_D, COLUMNS])
