"""Device functions of decode attention: the softmax over tokens in full precision, and how a part is stored."""

import triton
import triton.language as tl

NOTHING_SEEN = tl.constexpr(-1e30)
LN_2 = tl.constexpr(0.6931471805599453)
DENSE_TILE = tl.constexpr(16)


@triton.jit
def window_share(CAPACITY: tl.constexpr, window_parts):
    """Tokens of the ring that one program reads."""
    STEPS: tl.constexpr = (CAPACITY + DENSE_TILE - 1) // DENSE_TILE
    return tl.cdiv(STEPS, window_parts) * DENSE_TILE


@triton.jit
def store_part(
    result, row_max, row_sum, partial_ptr, log_sum_ptr, slot, channel, live_columns,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Divide `result` [BLOCK_D, COLUMNS] by `row_sum`, store it, and its logarithm: base 2 inside, natural outside."""
    seen = (row_sum > 0.0) & live_columns
    total = tl.where(seen, row_sum, 1.0)
    log_sum = tl.where(seen, (row_max + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(log_sum_ptr + slot, log_sum, mask=live_columns)
    target = partial_ptr + slot[None, :] * HEAD_DIM + channel[:, None]
    tl.store(target, result / total[None, :], mask=seen[None, :] & (channel < HEAD_DIM)[:, None])


@triton.jit
def _score_dense(
    query, key_ptr, stride_key_token, row, live, column, mask_ptr, stride_mask_token, mask_offset, live_columns,
    score_factor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    # Scores of DENSE_TILE tokens [DENSE_TILE, COLUMNS], base 2, -inf where a query does not see one.
    channel = tl.arange(0, BLOCK_D)
    in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
    # [DENSE_TILE, BLOCK_D]
    key = tl.load(key_ptr + row[:, None] * stride_key_token + channel[None, :], mask=in_row, other=0.0)
    scores = tl.dot(key.to(query.dtype), query) * score_factor
    seen = live[:, None] & live_columns[None, :]
    if MASK:
        entry = mask_ptr + column.to(tl.int64)[:, None] * stride_mask_token + mask_offset[None, :]
        seen = seen & (tl.load(entry, mask=seen, other=0) != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attend_dense(
    query, key_ptr, stride_key_token, value_ptr, stride_value_token, row, live, column,
    mask_ptr, stride_mask_token, mask_offset, live_columns, score_factor, row_max, row_sum, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    # One step over DENSE_TILE tokens in full precision; query [BLOCK_D, COLUMNS], acc [BLOCK_D, COLUMNS].
    channel = tl.arange(0, BLOCK_D)
    in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
    scores = _score_dense(
        query, key_ptr, stride_key_token, row, live, column, mask_ptr, stride_mask_token, mask_offset, live_columns,
        score_factor, HEAD_DIM, BLOCK_D, MASK,
    )  # fmt: skip
    # [DENSE_TILE, BLOCK_D]
    value = tl.load(value_ptr + row[:, None] * stride_value_token + channel[None, :], mask=in_row, other=0.0)
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    weight = tl.exp2(scores - new_max[None, :])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weight, axis=0)
    acc = tl.dot(tl.trans(value.to(query.dtype)), weight.to(query.dtype), acc * decay[None, :])
    return new_max, row_sum, acc


@triton.jit
def _attend_exact(
    query, pair, batch, head, past, q_len, key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns, mask_offset,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr, row_max, row_sum, acc,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token, HEAD_DIM: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr, BLOCK_D: tl.constexpr,
    NEW_APART: tl.constexpr,
):  # fmt: skip
    # The outlier pool and the new tokens, joined to a running softmax.
    step = tl.arange(0, DENSE_TILE)
    for start in tl.range(0, POOL_ROWS, DENSE_TILE):
        seat = start + step
        position = tl.load(outlier_position_ptr + pair * POOL_ROWS + seat, mask=seat < POOL_ROWS, other=-1)
        row_max, row_sum, acc = _attend_dense(
            query, outlier_key_ptr + pair * POOL_ROWS * HEAD_DIM, HEAD_DIM,
            outlier_value_ptr + pair * POOL_ROWS * HEAD_DIM, HEAD_DIM,
            seat, (position >= 0) & (position < past), position,
            mask_ptr, stride_mask_token, mask_offset, live_columns, score_factor, row_max, row_sum, acc,
            HEAD_DIM, BLOCK_D, MASK,
        )  # fmt: skip
    new_key_ptr = key_ptr + batch * stride_key_batch + head * stride_key_head
    if NEW_APART:
        scores = _score_dense(
            query, new_key_ptr, stride_key_token, step, step < q_len, past + step,
            mask_ptr, stride_mask_token, mask_offset, live_columns, score_factor, HEAD_DIM, BLOCK_D, MASK,
        )  # fmt: skip
        tl.store(log_sum_ptr + slot + 1, tl.max(scores, axis=0) * LN_2, mask=live_columns)
    else:
        new_value_ptr = value_ptr + batch * stride_value_batch + head * stride_value_head
        for start in tl.range(0, q_len, DENSE_TILE):
            token = start + step
            row_max, row_sum, acc = _attend_dense(
                query, new_key_ptr, stride_key_token, new_value_ptr, stride_value_token,
                token, token < q_len, past + token,
                mask_ptr, stride_mask_token, mask_offset, live_columns, score_factor, row_max, row_sum, acc,
                HEAD_DIM, BLOCK_D, MASK,
            )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def _load_queries(query_ptr, query_offset, live_columns, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # [BLOCK_D, COLUMNS]
    channel = tl.arange(0, BLOCK_D)[:, None]
    return tl.load(
        query_ptr + query_offset[None, :] + channel, mask=live_columns[None, :] & (channel < HEAD_DIM), other=0.0
    )


@triton.jit
def attend_exact(
    pair, batch, head, past, q_len, query_ptr, query_offset, key_ptr, value_ptr, mask_ptr, score_factor, slot,
    live_columns, mask_offset, outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token, HEAD_DIM: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
):  # fmt: skip
    """Attend over the outlier pool and the new tokens; with NEW_APART only the new score is stored, behind `slot`.

    The result is a running softmax: the greatest scores (base 2) and the sums of weights, both [COLUMNS], and the
    values by their weights, float32 [BLOCK_D, COLUMNS].
    """
    return _attend_exact(
        _load_queries(query_ptr, query_offset, live_columns, HEAD_DIM, BLOCK_D), pair, batch, head, past, q_len,
        key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns, mask_offset,
        outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr,
        tl.full([COLUMNS], NOTHING_SEEN, tl.float32), tl.zeros([COLUMNS], tl.float32),
        tl.zeros([BLOCK_D, COLUMNS], tl.float32),
        stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
        stride_mask_token, HEAD_DIM, POOL_ROWS, MASK, BLOCK_D, NEW_APART,
    )  # fmt: skip


@triton.jit
def attend_window(
    pair, batch, head, part, window_parts, past, packed, q_len, query_ptr, query_offset, key_ptr, value_ptr, mask_ptr,
    score_factor, slot, live_columns, mask_offset, key_residual_ptr, value_residual_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, partial_ptr, log_sum_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_token,
    HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, POOL_ROWS: tl.constexpr, MASK: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, NEW_APART: tl.constexpr,
):  # fmt: skip
    """Attend over one share of the ring, the last part also as `attend_exact`; store it in `slot` [COLUMNS]."""
    query = _load_queries(query_ptr, query_offset, live_columns, HEAD_DIM, BLOCK_D)
    row_max = tl.full([COLUMNS], NOTHING_SEEN, tl.float32)
    row_sum = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    share = window_share(CAPACITY, window_parts)
    first = packed + part * share
    for start in tl.range(first, tl.minimum(first + share, past), DENSE_TILE):
        token = start + tl.arange(0, DENSE_TILE)
        row_max, row_sum, acc = _attend_dense(
            query, key_residual_ptr + pair * CAPACITY * HEAD_DIM, HEAD_DIM,
            value_residual_ptr + pair * CAPACITY * HEAD_DIM, HEAD_DIM, token % CAPACITY, token < past, token,
            mask_ptr, stride_mask_token, mask_offset, live_columns, score_factor, row_max, row_sum, acc,
            HEAD_DIM, BLOCK_D, MASK,
        )  # fmt: skip
    if part == window_parts - 1:
        row_max, row_sum, acc = _attend_exact(
            query, pair, batch, head, past, q_len, key_ptr, value_ptr, mask_ptr, score_factor, slot, live_columns,
            mask_offset, outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, log_sum_ptr, row_max, row_sum, acc,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token, stride_mask_token,
            HEAD_DIM, POOL_ROWS, MASK, BLOCK_D, NEW_APART,
        )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    store_part(acc, row_max, row_sum, partial_ptr, log_sum_ptr, slot, channel, live_columns, HEAD_DIM)
