"""Kernel and launcher that join the partial softmax results of one query row."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import launch

ONE_WARP = 1024
"""Numbers that one warp of the combination joins."""


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


def combine(
    partial: Tensor, log_sum: Tensor, output: Tensor, *, parts: Any, queries_per_kv: int, block_parts: int, block_d: int
) -> None:
    """Join the parts of all query rows.

    Args:
        partial: fp32 [rows, parts, head_dim]: rows of a (sequence, kv head) together, query heads vary fastest.
        log_sum: fp32 [rows, parts]: logarithm of the sum of a part's weights, -inf where it saw nothing.
        output: [batch, num_heads, q_len, head_dim], contiguous; written. A row that saw nothing gets 0.
        parts: parts of a row; may be symbolic.
        queries_per_kv: query heads of one kv head.
        block_parts: a power of two, at least `parts`.
        block_d: channels of a program, a power of two.
    """
    q_len, head_dim = output.shape[2:]
    arguments = {
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "output_ptr": output,
        "q_len": q_len,
        "parts": parts,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "BLOCK_PARTS": block_parts,
        "BLOCK_D": block_d,
    }
    num_warps = 1 if block_parts * block_d <= ONE_WARP else 4
    launch(_combine_kernel, (partial.shape[0], -(-head_dim // block_d)), arguments, num_warps, num_stages=1)
