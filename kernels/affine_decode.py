"""Kernel of attention for a few query rows over paged affine storage (docs/storage.md).

Programs `0 .. splits - 1` of a (sequence, kv head) share the packed tokens, the `window_parts` last what is in full
precision or 8 bits; between them `seat_parts` share the seats of groups, unless the window is in 8 bits as well. Each
leaves a part for `ottfx/kernels/affine_combine.py`. With NEW_APART the one new token is
a part of its own, of which the last of them leaves the weight: its value is not rotated as the others are.
"""

import triton
import triton.language as tl

from ottfx.kernels.decode_coded_window import attend_coded_rows, attend_seats
from ottfx.kernels.decode_packed import attend_packed
from ottfx.kernels.decode_single import attend_window_once
from ottfx.kernels.decode_tile import query_channels
from ottfx.kernels.decode_window import attend_window
from ottfx.kernels.packing import is_steep

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "site", "q_len", "pages", "splits", "seat_parts", "window_parts",
        "stride_mask_batch", "stride_mask_head", "stride_mask_query",
    ]
)  # fmt: skip
def _decode_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr,
    key_codes_ptr, key_scale_ptr, key_zero_point_ptr, key_residual_ptr, key_row_scale_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_point_ptr, value_residual_ptr, value_row_scale_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr,
    seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr, key_order_ptr, partial_ptr,
    log_sum_ptr, stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_token,
    site, q_len, pages, splits, seat_parts, window_parts, softmax_scale,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, MIXED: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr,
    POOL_ROWS: tl.constexpr, PAGE_SEATS: tl.constexpr, MASK: tl.constexpr, ONE_MASK: tl.constexpr,
    SINGLE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
    WHOLE_TILES: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    # Inductor passes a Python float as fp64, and an integer without a known bound as int64.
    q_len, pages, splits = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(splits, tl.int32)
    seat_parts, window_parts = tl.cast(seat_parts, tl.int32), tl.cast(window_parts, tl.int32)
    score_factor = tl.cast(softmax_scale, tl.float32) * LOG2_E
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pair // NUM_KV_HEADS
    head = pair % NUM_KV_HEADS
    # Asked for first, as queries are found by it.
    key_channel = query_channels(key_order_ptr + pair * HEAD_DIM, MIXED, COLUMNS, HEAD_DIM, BLOCK_D)
    steep = is_steep(key_order_ptr + pair * HEAD_DIM, MIXED)
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    packed = tl.load(lengths_ptr + site * 3 + 2).to(tl.int32)

    # Column = one query token of one query head; heads vary fastest. A single one stands in all columns.
    rows = q_len * QUERIES_PER_KV
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if SINGLE:
        live_columns = column == 0
        column = column * 0
    else:
        live_columns = column < rows
    slot = (pair * rows + column) * (splits + seat_parts + window_parts + NEW_APART) + split
    query_token = (column // QUERIES_PER_KV).to(tl.int64)
    query_head = head * QUERIES_PER_KV + column % QUERIES_PER_KV
    query_offset = batch * stride_query_batch + query_head * stride_query_head + query_token * stride_query_token
    mask_ptr += batch * stride_mask_batch
    mask_offset = query_head * stride_mask_head + query_token * stride_mask_query

    if split < splits:
        tiles = tl.cdiv(packed, TILE)
        share = tl.cdiv(tiles, splits)
        first_tile = split * share
        if first_tile >= tiles:
            tl.store(log_sum_ptr + slot, tl.full([COLUMNS], float("-inf"), tl.float32), mask=live_columns)
        else:
            attend_packed(
                pair, head, first_tile, tl.minimum(first_tile + share, tiles), packed,
                query_ptr + batch * stride_query_batch, mask_ptr, score_factor, rows, slot, live_columns, mask_offset,
                key_channel, steep, key_codes_ptr, key_scale_ptr, key_zero_point_ptr,
                value_codes_ptr, value_scale_ptr, value_zero_point_ptr, partial_ptr, log_sum_ptr,
                stride_query_head, stride_query_token, stride_mask_token, pages,
                QUERIES_PER_KV, HEAD_DIM, KEY_BITS, VALUE_BITS, MIXED, SYMMETRIC, GROUP, MASK, ONE_MASK, SINGLE,
                COLUMNS, TILE, BLOCK_D, WHOLE_TILES, K_WIDTH,
            )  # fmt: skip
    elif key_residual_ptr.dtype.element_ty == tl.int8:
        attend_coded_rows(
            pair, batch, head, split - splits, window_parts, past, packed, q_len, pages, query_ptr, query_offset,
            key_ptr, value_ptr, mask_ptr, score_factor, rows, slot, live_columns, mask_offset,
            key_residual_ptr, key_row_scale_ptr, value_residual_ptr, value_row_scale_ptr,
            outlier_key_ptr, outlier_position_ptr, outlier_value_ptr,
            seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr,
            partial_ptr, log_sum_ptr,
            stride_query_batch, stride_query_head, stride_query_token, stride_key_batch, stride_key_head,
            stride_key_token, stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            QUERIES_PER_KV, HEAD_DIM, CAPACITY, POOL_ROWS, PAGE_SEATS, MASK, ONE_MASK, SINGLE, COLUMNS, BLOCK_D,
            NEW_APART, K_WIDTH,
        )  # fmt: skip
    elif PAGE_SEATS > 0 and split < splits + seat_parts:
        attend_seats(
            pair, batch, head, split - splits, seat_parts, packed, pages, query_ptr, mask_ptr, score_factor, rows, slot,
            live_columns, mask_offset,
            seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr,
            partial_ptr, log_sum_ptr,
            stride_query_batch, stride_query_head, stride_query_token, stride_mask_token,
            QUERIES_PER_KV, HEAD_DIM, PAGE_SEATS, MASK, ONE_MASK, SINGLE, COLUMNS, BLOCK_D, K_WIDTH,
        )  # fmt: skip
    elif SINGLE:
        attend_window_once(
            pair, batch, head, split - splits - seat_parts, window_parts, past, packed, q_len, query_ptr, query_offset,
            key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns, mask_offset,
            key_residual_ptr, value_residual_ptr,
            outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, partial_ptr, log_sum_ptr,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            HEAD_DIM, CAPACITY, POOL_ROWS, MASK, COLUMNS, BLOCK_D, NEW_APART,
        )  # fmt: skip
    else:
        attend_window(
            pair, batch, head, split - splits - seat_parts, window_parts, past, packed, q_len, query_ptr, query_offset,
            key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns, mask_offset,
            key_residual_ptr, value_residual_ptr,
            outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, partial_ptr, log_sum_ptr,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            HEAD_DIM, CAPACITY, POOL_ROWS, MASK, COLUMNS, BLOCK_D, NEW_APART,
        )  # fmt: skip
