"""Kernel that joins the partial softmax results of one query row."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["q_len", "parts"])
def _combine_kernel(
    partial_ptr, log_sum_ptr, output_ptr, q_len, parts,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, parts = tl.cast(q_len, tl.int32), tl.cast(parts, tl.int32)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    log_sum = tl.load(log_sum_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    # A part that saw nothing wrote no result.
    seen = log_sum > float("-inf")
    peak = tl.max(log_sum, axis=0)
    weight = tl.where(seen, tl.exp(log_sum - tl.where(peak > float("-inf"), peak, 0.0)), 0.0)
    offset = (row * parts + part)[:, None] * HEAD_DIM + channel[None, :]
    # [BLOCK_PARTS, BLOCK_D]
    partial = tl.load(partial_ptr + offset, mask=seen[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    total = tl.sum(weight, axis=0)
    result = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)

    rows = q_len * QUERIES_PER_KV
    pair = row // rows
    query_token = row % rows // QUERIES_PER_KV
    query_head = pair * QUERIES_PER_KV + row % QUERIES_PER_KV
    target = output_ptr + (query_head * q_len + query_token) * HEAD_DIM + channel
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=channel < HEAD_DIM)
