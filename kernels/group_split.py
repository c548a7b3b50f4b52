"""Kernel of attention over storage by groups (docs/storage.md): the softmax over one share of the tokens.

Programs `0 .. splits - 1` of a (sequence, kv head) share the packed tokens, program `splits` takes the window and the
new tokens; each leaves a part for `ottfx/kernels/affine_combine.py`. Packed tokens are decoded a tile at a time, in
registers.
"""

import triton
import triton.language as tl

from ottfx.kernels.affine_split import attend_dense, load_values
from ottfx.kernels.packing import PAGE
from ottfx.kernels.pairs import load_pairs
from ottfx.kernels.sketch import load_sketched
from ottfx.kernels.token_softmax import accumulate, masked_scores


@triton.jit(
    do_not_specialize=["q_len", "pages", "splits", "stride_mask_batch", "stride_mask_head", "stride_mask_query"]
)
def _attend_groups_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr,
    radius_ptr, radius_scale_ptr, radius_zero_ptr, angle_ptr, angle_scale_ptr, angle_zero_ptr,
    sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr, key_residual_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_point_ptr, value_residual_ptr, partial_ptr, log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token, stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_token,
    q_len, pages, splits, softmax_scale,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    SKETCH: tl.constexpr, KEY_BITS: tl.constexpr, OUTLIERS: tl.constexpr,
    RADIUS_BITS: tl.constexpr, ANGLE_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    MASK: tl.constexpr, MASK_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Inductor passes a Python float as fp64, and an integer without a known bound as int64.
    q_len, pages, splits = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(splits, tl.int32)
    softmax_scale = tl.cast(softmax_scale, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pair // NUM_KV_HEADS
    head = pair % NUM_KV_HEADS
    past = tl.load(lengths_ptr).to(tl.int32)
    packed = tl.load(lengths_ptr + 2).to(tl.int32)

    # Heads vary fastest.
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = q_len * QUERIES_PER_KV
    live_rows = row < rows
    part = (pair * rows + row) * (splits + 1) + split
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(packed, BLOCK_N)
    share = tl.cdiv(tiles, splits)
    first_tile = split * share
    if (split < splits) & (first_tile >= tiles):
        tl.store(log_sum_ptr + part, row_max, mask=live_rows)
        return
    query_token = (row // QUERIES_PER_KV).to(tl.int64)
    query_head = head * QUERIES_PER_KV + row % QUERIES_PER_KV
    mask_ptr += batch * stride_mask_batch + query_head * stride_mask_head + query_token * stride_mask_query
    offset = batch * stride_query_batch + query_head * stride_query_head + query_token * stride_query_token
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    in_tile = live_rows[:, None] & (channel < HEAD_DIM)[None, :]

    if split < splits:
        PAIRS: tl.constexpr = HEAD_DIM // 2
        pair_channel = tl.arange(0, BLOCK_P)
        in_pairs = live_rows[:, None] & (pair_channel < PAIRS)[None, :]
        if SKETCH:
            # [BLOCK_M, BLOCK_D]
            first_query = tl.load(query_ptr + offset[:, None] + channel[None, :], mask=in_tile, other=0.0)
            second_query = first_query
        else:
            # [BLOCK_M, BLOCK_P]
            pointer = query_ptr + offset[:, None] + pair_channel[None, :]
            first_query = tl.load(pointer, mask=in_pairs, other=0.0)
            second_query = tl.load(pointer + PAIRS, mask=in_pairs, other=0.0)
        for tile in tl.range(first_tile, tl.minimum(first_tile + share, tiles)):
            start = tl.cast(tile * BLOCK_N, tl.int32)
            token = start + column
            live = token < packed
            page_row = start % PAGE
            slot = pair * pages + start // PAGE
            if SKETCH:
                key = load_sketched(
                    slot, page_row, live, sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr,
                    KEY_BITS, OUTLIERS, GROUP, HEAD_DIM, BLOCK_N, PRECISION,
                )  # fmt: skip
                scores = tl.dot(first_query, tl.trans(key.to(first_query.dtype)), input_precision=PRECISION)
            else:
                first, second = load_pairs(
                    slot, page_row, radius_ptr, radius_scale_ptr, radius_zero_ptr, angle_ptr, angle_scale_ptr,
                    angle_zero_ptr, RADIUS_BITS, ANGLE_BITS, GROUP, PAIRS, BLOCK_P, BLOCK_N,
                )  # fmt: skip
                scores = tl.dot(first_query, tl.trans(first.to(first_query.dtype)), input_precision=PRECISION)
                scores = tl.dot(second_query, tl.trans(second.to(first_query.dtype)), scores, input_precision=PRECISION)
            scores = masked_scores(
                scores, mask_ptr, stride_mask_token, token, live, live_rows, softmax_scale, MASK, MASK_FLOOR
            )
            value = load_values(
                value_codes_ptr + slot * (4 * HEAD_DIM * VALUE_BITS), value_scale_ptr + slot * (VALUE_GROUPS * PAGE),
                value_zero_point_ptr + slot * (VALUE_GROUPS * PAGE), page_row, live,
                VALUE_BITS, False, VALUE_GROUPS, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            row_max, row_sum, acc = accumulate(scores, value.to(first_query.dtype), row_max, row_sum, acc, PRECISION)
    else:
        query = tl.load(query_ptr + offset[:, None] + channel[None, :], mask=in_tile, other=0.0)
        ring_key_ptr = key_residual_ptr + pair * CAPACITY * HEAD_DIM
        ring_value_ptr = value_residual_ptr + pair * CAPACITY * HEAD_DIM
        for start in tl.range(packed, past, BLOCK_N):
            token = start + column
            row_max, row_sum, acc = attend_dense(
                query, ring_key_ptr, lengths_ptr, HEAD_DIM, ring_value_ptr, lengths_ptr, HEAD_DIM,
                token % CAPACITY, token < past, token, mask_ptr, stride_mask_token, live_rows, softmax_scale,
                row_max, row_sum, acc, HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
            )  # fmt: skip
        new_key_ptr = key_ptr + batch * stride_key_batch + head * stride_key_head
        new_value_ptr = value_ptr + batch * stride_value_batch + head * stride_value_head
        for start in tl.range(0, q_len, BLOCK_N):
            token = start + column
            first_new = tl.cast(start, tl.int64)
            row_max, row_sum, acc = attend_dense(
                query, new_key_ptr + first_new * stride_key_token, lengths_ptr, stride_key_token,
                new_value_ptr + first_new * stride_value_token, lengths_ptr, stride_value_token,
                column, token < q_len, past + token, mask_ptr, stride_mask_token, live_rows, softmax_scale,
                row_max, row_sum, acc, HEAD_DIM, BLOCK_D, MASK, MASK_FLOOR, PRECISION,
            )  # fmt: skip

    seen = (row_sum > 0.0) & live_rows
    row_sum = tl.where(seen, row_sum, 1.0)
    tl.store(log_sum_ptr + part, row_max + tl.log(row_sum), mask=live_rows)
    target = partial_ptr + part[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, acc / row_sum[:, None], mask=seen[:, None] & (channel < HEAD_DIM)[None, :])
