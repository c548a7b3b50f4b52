"""Device functions of decode attention for a single query row: the tokens that are not packed.

One row has nothing for the tensor cores to share, and this warp has no other: products are summed by the lanes, in
float32. Loads of the next rows are under way while these are worked on.
"""

import triton
import triton.language as tl

from ottfx.kernels.decode_window import LN_2, NOTHING_SEEN, store_part, window_share

ROWS = tl.constexpr(8)
"""Tokens of a step: with 16 the registers do not hold those of the next step as well."""


@triton.jit
def _load_rows(
    key_ptr, stride_key_token, value_ptr, stride_value_token, row, live, column, mask_ptr, stride_mask_token, channel,
    HEAD_DIM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
    # [ROWS, BLOCK_D]
    key = tl.load(key_ptr + row[:, None] * stride_key_token + channel[None, :], mask=in_row, other=0.0)
    value = tl.load(value_ptr + row[:, None] * stride_value_token + channel[None, :], mask=in_row, other=0.0)
    if MASK:
        live = live & (tl.load(mask_ptr + column.to(tl.int64) * stride_mask_token, mask=live, other=0) != 0)
    return key, value, live


@triton.jit
def _attend_rows(query, key, value, live, score_factor, row_max, row_sum, acc):
    # query float32 [BLOCK_D], acc [ROWS, BLOCK_D]: what each row has added; row_sum [ROWS] alike, row_max a number.
    scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1) * score_factor
    scores = tl.where(live, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    weight = tl.exp2(scores - new_max)
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + weight
    acc = acc * decay + weight[:, None] * value.to(tl.float32)
    return new_max, row_sum, acc


@triton.jit
def _attend_exact_once(
    query, pair, batch, head, past, q_len, key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr, row_max, row_sum, acc,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token, HEAD_DIM: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
):  # fmt: skip
    # The outlier pool and the new tokens, joined to a running softmax.
    channel = tl.arange(0, BLOCK_D)
    step = tl.arange(0, ROWS)
    outlier_key_ptr += pair * POOL_ROWS * HEAD_DIM
    outlier_value_ptr += pair * POOL_ROWS * HEAD_DIM
    for start in tl.range(0, POOL_ROWS, ROWS):
        seat = start + step
        position = tl.load(outlier_position_ptr + pair * POOL_ROWS + seat, mask=seat < POOL_ROWS, other=-1)
        pool_key, pool_value, seen = _load_rows(
            outlier_key_ptr, HEAD_DIM, outlier_value_ptr, HEAD_DIM, seat, (position >= 0) & (position < past), position,
            mask_ptr, stride_mask_token, channel, HEAD_DIM, MASK,
        )  # fmt: skip
        row_max, row_sum, acc = _attend_rows(query, pool_key, pool_value, seen, score_factor, row_max, row_sum, acc)
    key_ptr += batch * stride_key_batch + head * stride_key_head
    if NEW_APART:
        new_key = tl.load(key_ptr + channel, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        score = tl.sum(new_key * query, axis=0) * (score_factor * LN_2)
        if MASK:
            is_seen = tl.load(mask_ptr + past.to(tl.int64) * stride_mask_token) != 0
            score = tl.where(is_seen, score, float("-inf"))
        tl.store(log_sum_ptr + slot + 1, tl.zeros([COLUMNS], tl.float32) + score, mask=live_columns)
    else:
        new_key, new_value, is_new = _load_rows(
            key_ptr, stride_key_token, value_ptr + batch * stride_value_batch + head * stride_value_head,
            stride_value_token, step, step < q_len, past + step, mask_ptr, stride_mask_token, channel, HEAD_DIM, MASK,
        )  # fmt: skip
        row_max, row_sum, acc = _attend_rows(query, new_key, new_value, is_new, score_factor, row_max, row_sum, acc)
    return row_max, row_sum, acc


@triton.jit
def _load_query(query_ptr, query_offset, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # Float32 [BLOCK_D]; all offsets are one.
    channel = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + tl.max(query_offset, axis=0) + channel, mask=channel < HEAD_DIM, other=0.0)
    return query.to(tl.float32)


@triton.jit
def attend_exact_once(
    pair, batch, head, past, q_len, query_ptr, query_offset, key_ptr, value_ptr, mask_ptr, score_factor, slot,
    live_columns, mask_offset, outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token, HEAD_DIM: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
):  # fmt: skip
    """`attend_exact` for one query row; the result is [BLOCK_D, 1], the others are numbers."""
    row_max, row_sum, acc = _attend_exact_once(
        _load_query(query_ptr, query_offset, HEAD_DIM, BLOCK_D), pair, batch, head, past, q_len, key_ptr, value_ptr,
        mask_ptr + tl.max(mask_offset, axis=0), score_factor, slot, live_columns,
        outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr,
        tl.max(tl.full([1], NOTHING_SEEN, tl.float32), axis=0), tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, BLOCK_D], tl.float32),
        stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
        stride_mask_token, HEAD_DIM, POOL_ROWS, MASK, COLUMNS, BLOCK_D, NEW_APART,
    )  # fmt: skip
    return row_max, tl.sum(row_sum, axis=0), tl.sum(acc, axis=0)[:, None]


@triton.jit
def attend_window_once(
    pair, batch, head, part, window_parts, past, packed, q_len, query_ptr, query_offset, key_ptr, value_ptr, mask_ptr,
    score_factor, slot, live_columns, mask_offset, key_residual_ptr, value_residual_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, partial_ptr, log_sum_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token,
    HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
):  # fmt: skip
    """`attend_window` for one query row, which stands in all columns."""
    channel = tl.arange(0, BLOCK_D)
    step = tl.arange(0, ROWS)
    query = _load_query(query_ptr, query_offset, HEAD_DIM, BLOCK_D)
    mask_ptr += tl.max(mask_offset, axis=0)
    row_max = tl.max(tl.full([1], NOTHING_SEEN, tl.float32), axis=0)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    key_residual_ptr += pair * CAPACITY * HEAD_DIM
    value_residual_ptr += pair * CAPACITY * HEAD_DIM
    share = window_share(CAPACITY, window_parts)
    first = packed + part * share
    last = tl.minimum(first + share, past)
    token = first + step
    key, value, live = _load_rows(
        key_residual_ptr, HEAD_DIM, value_residual_ptr, HEAD_DIM, token % CAPACITY, token < last, token,
        mask_ptr, stride_mask_token, channel, HEAD_DIM, MASK,
    )  # fmt: skip
    for start in tl.range(first, last, ROWS):
        token = start + ROWS + step
        next_key, next_value, next_live = _load_rows(
            key_residual_ptr, HEAD_DIM, value_residual_ptr, HEAD_DIM, token % CAPACITY, token < last, token,
            mask_ptr, stride_mask_token, channel, HEAD_DIM, MASK,
        )  # fmt: skip
        row_max, row_sum, acc = _attend_rows(query, key, value, live, score_factor, row_max, row_sum, acc)
        key, value, live = next_key, next_value, next_live
    if part == window_parts - 1:
        row_max, row_sum, acc = _attend_exact_once(
            query, pair, batch, head, past, q_len, key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns,
            outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr, row_max, row_sum, acc,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            HEAD_DIM, POOL_ROWS, MASK, COLUMNS, BLOCK_D, NEW_APART,
        )  # fmt: skip
    # In column 0; the other columns are not live.
    result = tl.broadcast_to(tl.sum(acc, axis=0)[:, None], [BLOCK_D, COLUMNS])
    total = tl.zeros([COLUMNS], tl.float32) + tl.sum(row_sum, axis=0)
    store_part(
        result, tl.zeros([COLUMNS], tl.float32) + row_max, total, partial_ptr, log_sum_ptr, slot, channel,
        live_columns, HEAD_DIM,
    )  # fmt: skip
