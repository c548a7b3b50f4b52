"""Kernel and launcher that join the partial softmax results of one query row."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import launch, next_power_of_2
from ottfx.kernels.rotate import block_size, rotate_rows_back

MOST_COMBINED = 8192
"""Numbers that a program of the combination holds at once, where its rows are cut into blocks of channels."""
MOST_IN_ROW = 32768
"""Numbers that it holds where a row is one block: many parts are those of few rows, which wait for each other."""
ONE_WARP = 1024
"""Numbers that one warp of the combination joins."""


@triton.jit(do_not_specialize=["q_len", "parts"])
def _combine_kernel(
    partial_ptr, log_sum_ptr, value_ptr, output_ptr, stride_value_batch, stride_value_head, q_len, parts,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr,
    OFFSET: tl.constexpr, NEW_APART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, CHUNK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, parts = tl.cast(q_len, tl.int32), tl.cast(parts, tl.int32)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = channel < HEAD_DIM
    every = tl.arange(0, BLOCK_PARTS)
    log_sum = tl.load(log_sum_ptr + row * parts + every, mask=every < parts, other=float("-inf"))
    # Of the new token there is a weight only.
    written = parts - NEW_APART
    AT_ONCE: tl.constexpr = BLOCK_PARTS <= CHUNK_PARTS
    if AT_ONCE:
        # Under way while the weights are found.
        offset = (row * parts + every)[:, None] * HEAD_DIM + channel[None, :]
        partial = tl.load(partial_ptr + offset, mask=(every < written)[:, None] & in_row[None, :], other=0.0)
    peak = tl.max(log_sum, axis=0)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    weight = tl.exp(log_sum - peak)
    total = tl.sum(weight, axis=0)
    # A part that saw nothing wrote no result.
    if AT_ONCE:
        result = tl.sum(tl.where((weight > 0.0)[:, None], partial, 0.0) * weight[:, None], axis=0)
    else:
        result = tl.zeros([BLOCK_D], tl.float32)
        for start in tl.range(0, written, CHUNK_PARTS):
            part = tl.cast(start, tl.int32) + tl.arange(0, CHUNK_PARTS)
            its_log_sum = tl.load(log_sum_ptr + row * parts + part, mask=part < written, other=float("-inf"))
            weight = tl.exp(its_log_sum - peak)
            offset = (row * parts + part)[:, None] * HEAD_DIM + channel[None, :]
            # [CHUNK_PARTS, BLOCK_D]
            partial = tl.load(partial_ptr + offset, mask=(weight > 0.0)[:, None] & in_row[None, :], other=0.0)
            result += tl.sum(partial * weight[:, None], axis=0)
    rows = q_len * QUERIES_PER_KV
    pair = row // rows
    if SIZE > 1:
        result = tl.reshape(rotate_rows_back(result[None, :], SIZE, OFFSET, 1, BLOCK_D), [BLOCK_D])
    if NEW_APART:
        value_ptr += pair // NUM_KV_HEADS * stride_value_batch + pair % NUM_KV_HEADS * stride_value_head
        value = tl.load(value_ptr + channel, mask=in_row, other=0.0).to(tl.float32)
        result += tl.exp(tl.load(log_sum_ptr + row * parts + written) - peak) * value
    result = result / tl.where(total > 0.0, total, 1.0)
    query_token = row % rows // QUERIES_PER_KV
    query_head = pair * QUERIES_PER_KV + row % QUERIES_PER_KV
    target = output_ptr + (query_head * q_len + query_token) * HEAD_DIM + channel
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=in_row)


def combine(
    partial: Tensor,
    log_sum: Tensor,
    output: Tensor,
    *,
    parts: Any,
    most_parts: int,
    queries_per_kv: int,
    rotation: int | None = None,
    new_value: Tensor | None = None,
) -> None:
    """Join the parts of all query rows.

    Args:
        partial: fp32 [rows, parts, head_dim]: rows of a (sequence, kv head) together, query heads vary fastest.
        log_sum: fp32 [rows, parts]: logarithm of the sum of a part's weights, -inf where it saw nothing.
        output: [batch, num_heads, q_len, head_dim], contiguous; written. A row that saw nothing gets 0.
        parts: parts of a row; may be symbolic.
        most_parts: an upper bound of `parts` that is no symbol.
        queries_per_kv: query heads of one kv head.
        rotation: `partial` is to be rotated back (`ottfx/rotation.py`) with the seed of this offset, or `NO_SEED`.
        new_value: [batch, num_kv_heads, 1, head_dim]: the result of the last part, which left its weight only. It is
            not rotated.
    """
    q_len, head_dim = output.shape[2:]
    block_parts = next_power_of_2(most_parts)
    # Channels that are rotated together belong to one program.
    block_d = next_power_of_2(head_dim) if rotation is not None else combine_channels(block_parts, head_dim)
    chunk_parts = min(block_parts, (MOST_COMBINED if rotation is None else MOST_IN_ROW) // block_d)
    arguments = {
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "value_ptr": partial if new_value is None else new_value,
        "output_ptr": output,
        "stride_value_batch": 0 if new_value is None else new_value.stride(0),
        "stride_value_head": 0 if new_value is None else new_value.stride(1),
        "q_len": q_len,
        "parts": parts,
        "NUM_KV_HEADS": output.shape[1] // queries_per_kv,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "SIZE": 1 if rotation is None else block_size(head_dim),
        "OFFSET": rotation or 0,
        "NEW_APART": new_value is not None,
        "BLOCK_PARTS": block_parts,
        "CHUNK_PARTS": chunk_parts,
        "BLOCK_D": block_d,
    }
    numbers = chunk_parts * block_d
    num_warps = 1 if numbers <= ONE_WARP else 4 if numbers <= MOST_COMBINED else 8
    launch(_combine_kernel, (partial.shape[0], -(-head_dim // block_d)), arguments, num_warps, num_stages=1)


def combine_channels(parts: int, head_dim: int) -> int:
    """Return how many channels a program combines at once, a power of two: what fits its registers."""
    return min(max(MOST_COMBINED // parts, 16), next_power_of_2(head_dim))
