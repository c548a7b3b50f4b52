"""Device functions of attention over a tile of tokens: masked scores, the running softmax, new tokens.

A row is one query token of one query head. What a row has seen so far are `row_max` and `row_sum` [BLOCK_M] and `acc`
[BLOCK_M, BLOCK_D], float32; a row that has seen nothing has a maximum of -inf and a sum of 0.
"""

import triton
import triton.language as tl


@triton.jit
def masked_scores(
    scores, mask_ptr, stride_mask_token, token, live, live_rows, softmax_scale,
    MASK: tl.constexpr, MASK_FLOOR: tl.constexpr,
):  # fmt: skip
    """Scaled scores [BLOCK_M, BLOCK_N] of `token` int32 [BLOCK_N], -inf where a row may not see.

    MASK is 0 for none, 1 for bool, 2 for an additive one that hides at MASK_FLOOR; `mask_ptr` [BLOCK_M] points to
    rows of it.
    """
    scores *= softmax_scale
    if MASK > 0:
        pointer = mask_ptr[:, None] + token.to(tl.int64)[None, :] * stride_mask_token
        shown = tl.load(pointer, mask=live_rows[:, None] & live[None, :], other=0)
        if MASK == 1:
            scores = tl.where(shown != 0, scores, float("-inf"))
        else:
            bias = shown.to(tl.float32)
            scores = tl.where(bias > MASK_FLOOR, scores + bias, float("-inf"))
    return tl.where(live[None, :], scores, float("-inf"))


@triton.jit
def accumulate(scores, value, row_max, row_sum, acc, PRECISION: tl.constexpr):
    """Take a tile of values [BLOCK_N, BLOCK_D] with its scores into the running softmax."""
    peak = tl.maximum(row_max, tl.max(scores, axis=1))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(scores - base[:, None])
    decay = tl.exp(row_max - base)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return peak, row_sum * decay + tl.sum(weight, axis=1), acc


@triton.jit
def attend_new(
    query, key_ptr, value_ptr, stride_key_token, stride_value_token, past, q_len,
    mask_ptr, stride_mask_token, live_rows, softmax_scale, row_max, row_sum, acc,
    HEAD_DIM: tl.constexpr, MASK: tl.constexpr, MASK_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take the new tokens, which are dense, into the running softmax; pointers are those of this kv head."""
    channel = tl.arange(0, BLOCK_D)
    in_row = channel < HEAD_DIM
    for start in tl.range(0, q_len, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        live = token < q_len
        row = token.to(tl.int64)
        # [BLOCK_D, BLOCK_N]
        key = tl.load(
            key_ptr + row[None, :] * stride_key_token + channel[:, None],
            mask=live[None, :] & in_row[:, None],
            other=0.0,
        )
        scores = tl.dot(query, key.to(query.dtype), input_precision=PRECISION)
        scores = masked_scores(
            scores, mask_ptr, stride_mask_token, past + token, live, live_rows, softmax_scale, MASK, MASK_FLOOR
        )
        # [BLOCK_N, BLOCK_D]
        value = tl.load(
            value_ptr + row[:, None] * stride_value_token + channel[None, :],
            mask=live[:, None] & in_row[None, :],
            other=0.0,
        )
        row_max, row_sum, acc = accumulate(scores, value.to(query.dtype), row_max, row_sum, acc, PRECISION)
    return row_max, row_sum, acc
