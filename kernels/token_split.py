"""Kernel of attention over storage by tokens (docs/storage.md): the softmax over one share of the tokens.

Programs `0 .. splits - 1` of a (sequence, kv head) share the stored tokens, program `splits` takes the new ones; each
leaves a part for `ottfx/kernels/affine_combine.py`. Stored tokens are decoded a tile at a time, in registers, and stay
rotated: queries come rotated as well.
"""

import triton
import triton.language as tl

from ottfx.kernels.packing import PAGE
from ottfx.kernels.polar_codes import load_blocks
from ottfx.kernels.table_codes import load_signed
from ottfx.kernels.token_softmax import accumulate, attend_new, masked_scores


@triton.jit(
    do_not_specialize=["q_len", "pages", "splits", "stride_mask_batch", "stride_mask_head", "stride_mask_query"]
)
def _attend_tokens_kernel(
    query_ptr, rotated_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr,
    key_codes_ptr, key_upper_ptr, key_scale_ptr, value_codes_ptr, value_upper_ptr, value_scale_ptr,
    partial_ptr, log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token, stride_key_batch, stride_key_head, stride_key_token,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_token,
    q_len, pages, splits, softmax_scale,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    POLAR: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr, UPPER_BYTES: tl.constexpr,
    MASK: tl.constexpr, MASK_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
    T8: tl.constexpr, T9: tl.constexpr, T10: tl.constexpr, T11: tl.constexpr,
    T12: tl.constexpr, T13: tl.constexpr, T14: tl.constexpr, T15: tl.constexpr,
):  # fmt: skip
    # Inductor passes a Python float as fp64, and an integer without a known bound as int64.
    q_len, splits = tl.cast(q_len, tl.int32), tl.cast(splits, tl.int32)
    softmax_scale = tl.cast(softmax_scale, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pair // NUM_KV_HEADS
    head = pair % NUM_KV_HEADS
    past = tl.load(lengths_ptr).to(tl.int32)

    # Heads vary fastest.
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = q_len * QUERIES_PER_KV
    live_rows = row < rows
    part = (pair * rows + row) * (splits + 1) + split
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(past, BLOCK_N)
    share = tl.cdiv(tiles, splits)
    first_tile = split * share
    if (split < splits) & (first_tile >= tiles):
        tl.store(log_sum_ptr + part, row_max, mask=live_rows)
        return
    query_token = (row // QUERIES_PER_KV).to(tl.int64)
    query_head = head * QUERIES_PER_KV + row % QUERIES_PER_KV
    mask_ptr += batch * stride_mask_batch + query_head * stride_mask_head + query_token * stride_mask_query
    channel = tl.arange(0, BLOCK_D)
    in_tile = live_rows[:, None] & (channel < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if split < splits:
        rotated_row = (pair * QUERIES_PER_KV + row % QUERIES_PER_KV) * q_len + query_token
        # [BLOCK_M, BLOCK_D]
        query = tl.load(rotated_ptr + rotated_row[:, None] * HEAD_DIM + channel[None, :], mask=in_tile, other=0.0)
        first_slot = pair * pages * PAGE
        for tile in tl.range(first_tile, tl.minimum(first_tile + share, tiles)):
            token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            live = token < past
            slot = first_slot + token
            if POLAR:
                key = load_blocks(
                    key_codes_ptr + slot * KEY_WORDS, key_upper_ptr + slot * UPPER_BYTES,
                    key_scale_ptr + slot * (HEAD_DIM // 16), live, KEY_BITS, HEAD_DIM, BLOCK_N, BLOCK_D,
                    T0, T1, T2, T3, T4, T5, T6, T7, T8, T9, T10, T11, T12, T13, T14, T15,
                )  # fmt: skip
            else:
                key = load_signed(
                    key_codes_ptr + slot * KEY_WORDS, key_scale_ptr + slot, live, KEY_BITS, HEAD_DIM, BLOCK_N, BLOCK_D,
                    T0, T1, T2, T3, T4, T5, T6, T7,
                )  # fmt: skip
            scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
            scores = masked_scores(
                scores, mask_ptr, stride_mask_token, token, live, live_rows, softmax_scale, MASK, MASK_FLOOR
            )
            if POLAR:
                value = load_blocks(
                    value_codes_ptr + slot * VALUE_WORDS, value_upper_ptr + slot * UPPER_BYTES,
                    value_scale_ptr + slot * (HEAD_DIM // 16), live, VALUE_BITS, HEAD_DIM, BLOCK_N, BLOCK_D,
                    T0, T1, T2, T3, T4, T5, T6, T7, T8, T9, T10, T11, T12, T13, T14, T15,
                )  # fmt: skip
            else:
                value = load_signed(
                    value_codes_ptr + slot * VALUE_WORDS, value_scale_ptr + slot, live, VALUE_BITS, HEAD_DIM, BLOCK_N,
                    BLOCK_D, T8, T9, T10, T11, T12, T13, T14, T15,
                )  # fmt: skip
            row_max, row_sum, acc = accumulate(scores, value.to(query.dtype), row_max, row_sum, acc, PRECISION)
    else:
        offset = batch * stride_query_batch + query_head * stride_query_head + query_token * stride_query_token
        query = tl.load(query_ptr + offset[:, None] + channel[None, :], mask=in_tile, other=0.0)
        # New values come rotated, and contiguous.
        row_max, row_sum, acc = attend_new(
            query, key_ptr + batch * stride_key_batch + head * stride_key_head, value_ptr + pair * q_len * HEAD_DIM,
            stride_key_token, HEAD_DIM, past, q_len, mask_ptr, stride_mask_token, live_rows, softmax_scale,
            row_max, row_sum, acc, HEAD_DIM, MASK, MASK_FLOOR, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    seen = (row_sum > 0.0) & live_rows
    row_sum = tl.where(seen, row_sum, 1.0)
    tl.store(log_sum_ptr + part, row_max + tl.log(row_sum), mask=live_rows)
    target = partial_ptr + part[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, acc / row_sum[:, None], mask=seen[:, None] & (channel < HEAD_DIM)[None, :])
