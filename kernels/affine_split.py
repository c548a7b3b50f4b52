"""Kernel of attention over paged affine storage: the softmax over one share of the tokens.

Every program holds all query heads of one kv head. Splits `0 .. splits - 1` share the packed tokens; split `splits`
reads what is not in pages: ring, outlier pool, seats and new tokens. Keys and values are dequantized in registers,
a tile at a time. Storage: docs/storage.md.
"""

import triton
import triton.language as tl

from ottfx.kernels.packing import PAGE, STEEP_MARK, is_steep, load_key_codes, load_value_codes
from ottfx.kernels.token_softmax import accumulate, masked_scores
from ottfx.kernels.window import load_rows


@triton.jit
def attend_dense(
    query, key_ptr, key_row_scale_ptr, stride_key_token, value_ptr, value_row_scale_ptr, stride_value_token,
    row, live, column,
    mask_row_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, MASK_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take tokens in full precision into the running softmax; `row` int32 [BLOCK_N] counts from where pointers are."""
    channel = tl.arange(0, BLOCK_D)
    in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
    # [BLOCK_N, BLOCK_D]
    key = load_rows(key_ptr, key_row_scale_ptr, row[:, None] * stride_key_token + channel[None, :], row, in_row, live)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
    scores = masked_scores(
        scores, mask_row_ptr, stride_mask_token, column, live, live_rows, softmax_scale, MASK, MASK_FLOOR
    )
    value = load_rows(
        value_ptr, value_row_scale_ptr, row[:, None] * stride_value_token + channel[None, :], row, in_row, live
    )
    return accumulate(scores, value.to(query.dtype), row_max, row_sum, acc, PRECISION)


@triton.jit
def _load_keys(
    codes_ptr, scale_ptr, zero_point_ptr, row, live, steep,
    BITS: tl.constexpr, MIXED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Float32 [BLOCK_D, BLOCK_N]; the pointers are those of a page. `live` [BLOCK_N] guards the constants.
    SPAN: tl.constexpr = GROUP if GROUP < BLOCK_N else BLOCK_N
    GROUPS: tl.constexpr = BLOCK_N // SPAN
    codes = load_key_codes(codes_ptr, row, steep, BITS, MIXED, HEAD_DIM, BLOCK_D, BLOCK_N).to(tl.float32)
    channel = tl.arange(0, BLOCK_D)
    group = row // GROUP + tl.arange(0, GROUPS)
    offset = group[None, :] * HEAD_DIM + channel[:, None]
    in_row = (channel < HEAD_DIM)[:, None] & (group >= 0)[None, :]
    # [BLOCK_D, GROUPS]
    scale = tl.load(scale_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
    zero_point = tl.load(zero_point_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
    grouped = tl.reshape(codes, [BLOCK_D, GROUPS, SPAN]) * scale[:, :, None] + zero_point[:, :, None]
    return tl.reshape(grouped, [BLOCK_D, BLOCK_N])


@triton.jit
def load_values(
    codes_ptr, scale_ptr, zero_point_ptr, row, live,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Values float32 [BLOCK_N, BLOCK_D] of the tokens from row `row` on; the pointers are those of a page."""
    codes = load_value_codes(codes_ptr, row, BITS, HEAD_DIM, BLOCK_D, BLOCK_N).to(tl.float32)
    token = row + tl.arange(0, BLOCK_N)
    if (HEAD_DIM == BLOCK_D) | (GROUPS == 1):
        SPAN: tl.constexpr = BLOCK_D // GROUPS
        offset = tl.arange(0, GROUPS)[None, :] * 128 + token[:, None]
        # [BLOCK_N, GROUPS]
        scale = tl.abs(tl.load(scale_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32))
        if SYMMETRIC:
            zero_point = scale * (-0.5 * ((1 << BITS) - 1))
        else:
            zero_point = tl.load(zero_point_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32)
        grouped = tl.reshape(codes, [BLOCK_N, GROUPS, SPAN]) * scale[:, :, None] + zero_point[:, :, None]
        values = tl.reshape(grouped, [BLOCK_N, BLOCK_D])
    else:
        channel = tl.arange(0, BLOCK_D)
        offset = (channel // (HEAD_DIM // GROUPS) * 128)[None, :] + token[:, None]
        in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
        # [BLOCK_N, BLOCK_D]
        scale = tl.abs(tl.load(scale_ptr + offset, mask=in_row, other=0.0).to(tl.float32))
        if SYMMETRIC:
            zero_point = scale * (-0.5 * ((1 << BITS) - 1))
        else:
            zero_point = tl.load(zero_point_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        values = codes * scale + zero_point
    return values


@triton.jit(
    do_not_specialize=[
        "site", "q_len", "pages", "splits", "stride_mask_batch", "stride_mask_head", "stride_mask_query",
    ]
)  # fmt: skip
def _attend_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr,
    key_codes_ptr, key_scale_ptr, key_zero_point_ptr, key_residual_ptr, key_row_scale_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_point_ptr, value_residual_ptr, value_row_scale_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr,
    seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr, key_order_ptr, partial_ptr,
    log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_token,
    site, q_len, pages, splits, softmax_scale,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, MIXED: tl.constexpr, SYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    POOL_ROWS: tl.constexpr, PAGE_SEATS: tl.constexpr, MASK: tl.constexpr, MASK_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes a Python float as fp64, and an integer without a known bound as int64.
    q_len, pages, splits = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(splits, tl.int32)
    softmax_scale = tl.cast(softmax_scale, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pair // NUM_KV_HEADS
    head = pair % NUM_KV_HEADS
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    packed = tl.load(lengths_ptr + site * 3 + 2).to(tl.int32)

    # Row = one query token of one query head; heads vary fastest.
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = q_len * QUERIES_PER_KV
    live_rows = row < rows
    slot_row = (pair * rows + row) * (splits + 1) + split
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(packed, BLOCK_N)
    share = tl.cdiv(tiles, splits)
    first_tile = split * share
    if (split < splits) & (first_tile >= tiles):
        tl.store(log_sum_ptr + slot_row, row_max, mask=live_rows)
        return
    query_token = (row // QUERIES_PER_KV).to(tl.int64)
    query_head = head * QUERIES_PER_KV + row % QUERIES_PER_KV
    channel = tl.arange(0, BLOCK_D)
    query_offset = batch * stride_query_batch + query_head * stride_query_head + query_token * stride_query_token
    # [BLOCK_M, BLOCK_D]
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :],
        mask=live_rows[:, None] & (channel < HEAD_DIM)[None, :],
        other=0.0,
    )
    mask_row_ptr = (
        mask_ptr + batch * stride_mask_batch + query_head * stride_mask_head + query_token * stride_mask_query
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)

    if split < splits:
        stored_query = query
        steep = is_steep(key_order_ptr + pair * HEAD_DIM, MIXED)
        if MIXED:
            ordered = tl.load(key_order_ptr + pair * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=-1)
            source = tl.where(ordered < 0, channel, ordered.to(tl.int32) % STEEP_MARK)
            stored_query = tl.load(
                query_ptr + query_offset[:, None] + source[None, :],
                mask=live_rows[:, None] & (channel < HEAD_DIM)[None, :],
                other=0.0,
            )
        for tile in tl.range(first_tile, tl.minimum(first_tile + share, tiles)):
            start = tile * BLOCK_N
            page_row = start % PAGE
            slot = pair * pages + start // PAGE
            token = start + column
            stored = token < packed
            # The sign of the first value scale marks a token that is in the pool.
            mark_ptr = value_scale_ptr + slot * (VALUE_GROUPS * 128) + page_row + column
            mark = tl.load(mark_ptr, mask=stored, other=0.0).to(tl.int16, bitcast=True)
            key = _load_keys(
                key_codes_ptr + slot * (4 * HEAD_DIM * KEY_BITS),
                key_scale_ptr + slot * (128 // GROUP * HEAD_DIM),
                key_zero_point_ptr + slot * (128 // GROUP * HEAD_DIM),
                page_row, stored, steep, KEY_BITS, MIXED, GROUP, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            scores = tl.dot(stored_query, key.to(query.dtype), input_precision=PRECISION)
            scores = masked_scores(
                scores,
                mask_row_ptr,
                stride_mask_token,
                token,
                stored & (mark >= 0),
                live_rows,
                softmax_scale,
                MASK,
                MASK_FLOOR,
            )
            value = load_values(
                value_codes_ptr + slot * (4 * HEAD_DIM * VALUE_BITS),
                value_scale_ptr + slot * (VALUE_GROUPS * 128),
                value_zero_point_ptr + slot * (VALUE_GROUPS * 128),
                page_row, stored, VALUE_BITS, SYMMETRIC, VALUE_GROUPS, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            row_max, row_sum, acc = accumulate(scores, value.to(query.dtype), row_max, row_sum, acc, PRECISION)
    else:
        ring_key_ptr = key_residual_ptr + pair * CAPACITY * HEAD_DIM
        ring_value_ptr = value_residual_ptr + pair * CAPACITY * HEAD_DIM
        key_row_scale_ptr += pair * CAPACITY
        value_row_scale_ptr += pair * CAPACITY
        for start in tl.range(packed, past, BLOCK_N):
            token = start + column
            row_max, row_sum, acc = attend_dense(
                query, ring_key_ptr, key_row_scale_ptr, HEAD_DIM, ring_value_ptr, value_row_scale_ptr, HEAD_DIM,
                token % CAPACITY, token < past, token,
                mask_row_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
                HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
            )  # fmt: skip
        if POOL_ROWS > 0:
            pool_key_ptr = outlier_key_ptr + pair * POOL_ROWS * HEAD_DIM
            pool_value_ptr = outlier_value_ptr + pair * POOL_ROWS * HEAD_DIM
            for start in tl.range(0, POOL_ROWS, BLOCK_N):
                seat = start + column
                position = tl.load(outlier_position_ptr + pair * POOL_ROWS + seat, mask=seat < POOL_ROWS, other=-1)
                row_max, row_sum, acc = attend_dense(
                    query, pool_key_ptr, key_row_scale_ptr, HEAD_DIM, pool_value_ptr, value_row_scale_ptr, HEAD_DIM,
                    seat, (position >= 0) & (position < past), position,
                    mask_row_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
                    HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
                )  # fmt: skip
        if PAGE_SEATS > 0:
            first_seat = pair * pages * PAGE_SEATS
            seats = tl.cdiv(packed, PAGE) * PAGE_SEATS
            for start in tl.range(0, seats, BLOCK_N):
                seat = start + column
                in_page = tl.load(seat_row_ptr + first_seat + seat, mask=seat < seats, other=-1).to(tl.int32)
                position = seat // PAGE_SEATS * PAGE + in_page
                row_max, row_sum, acc = attend_dense(
                    query, seat_key_ptr + first_seat * HEAD_DIM, seat_key_scale_ptr + first_seat, HEAD_DIM,
                    seat_value_ptr + first_seat * HEAD_DIM, seat_value_scale_ptr + first_seat, HEAD_DIM,
                    seat, (in_page >= 0) & (position < packed), position,
                    mask_row_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
                    HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
                )  # fmt: skip
        new_key_ptr = key_ptr + batch * stride_key_batch + head * stride_key_head
        new_value_ptr = value_ptr + batch * stride_value_batch + head * stride_value_head
        for start in tl.range(0, q_len, BLOCK_N):
            token = start + column
            first = tl.cast(start, tl.int64)
            row_max, row_sum, acc = attend_dense(
                query, new_key_ptr + first * stride_key_token, key_row_scale_ptr, stride_key_token,
                new_value_ptr + first * stride_value_token, value_row_scale_ptr, stride_value_token,
                column, token < q_len, past + token,
                mask_row_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
                HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
            )  # fmt: skip

    seen = (row_sum > 0.0) & live_rows
    row_sum = tl.where(seen, row_sum, 1.0)
    tl.store(log_sum_ptr + slot_row, row_max + tl.log(row_sum), mask=live_rows)
    acc = acc / row_sum[:, None]
    target = partial_ptr + slot_row[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, acc, mask=seen[:, None] & (channel < HEAD_DIM)[None, :])
