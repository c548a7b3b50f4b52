"""Kernels and launcher that join the partial softmax results of one query row."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import launch, next_power_of_2
from ottfx.kernels.rotate import block_size, rotate_rows_back

MOST_COMBINED = 4096
"""Numbers that a program joins, where parts are few enough for its 16 channels."""
MOST_IN_BLOCK = 8192
"""Numbers that it holds at once otherwise."""
MOST_IN_ROW = 32768
"""Numbers that a program holds at once that joins all channels of a row."""
LEAST_PEAK = tl.constexpr(-1e30)
"""The greatest logarithm where nothing was seen."""


@triton.jit
def _load_parts(log_sum_ptr, partial_ptr, part, written, channel, HEAD_DIM: tl.constexpr):
    # Float32 [M, N] and [M, N, BLOCK_D] of the parts [M, N]; a part that saw nothing wrote no result.
    log_sum = tl.load(log_sum_ptr + part, mask=part < written, other=float("-inf"))
    inside = (part < written)[:, :, None] & (channel < HEAD_DIM)[None, None, :]
    return log_sum, tl.load(partial_ptr + part[:, :, None] * HEAD_DIM + channel[None, None, :], mask=inside, other=0.0)


@triton.jit
def _join(log_sum, partial, peak, total, result):
    # Take parts into M running softmaxes: numbers [M], results [M, BLOCK_D].
    new_peak = tl.maximum(peak, tl.max(log_sum, axis=1))
    weight = tl.exp(log_sum - new_peak[:, None])
    decay = tl.exp(peak - new_peak)
    partial = tl.where(weight[:, :, None] > 0.0, partial, 0.0)
    result = result * decay[:, None] + tl.sum(partial * weight[:, :, None], axis=1)
    return new_peak, total * decay + tl.sum(weight, axis=1), result


@triton.jit
def _store_row(
    output_ptr, result, row, channel, q_len, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    rows = q_len * QUERIES_PER_KV
    query_token = row % rows // QUERIES_PER_KV
    query_head = row // rows * QUERIES_PER_KV + row % QUERIES_PER_KV
    target = output_ptr + (query_head * q_len + query_token) * HEAD_DIM + channel
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=channel < HEAD_DIM)


@triton.jit(do_not_specialize=["q_len", "parts"])
def _combine_kernel(
    partial_ptr, log_sum_ptr, output_ptr, q_len, parts,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, CHUNK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, parts = tl.cast(q_len, tl.int32), tl.cast(parts, tl.int32)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (channel < HEAD_DIM)[None, :]
    log_sum_ptr += row * parts
    partial_ptr += row * parts * HEAD_DIM
    every = tl.arange(0, BLOCK_PARTS)
    log_sum = tl.load(log_sum_ptr + every, mask=every < parts, other=float("-inf"))
    # [CHUNK_PARTS, BLOCK_D]: under way while the weights are found.
    part = tl.arange(0, CHUNK_PARTS)
    offset = part[:, None] * HEAD_DIM + channel[None, :]
    partial = tl.load(partial_ptr + offset, mask=(part < parts)[:, None] & in_row, other=0.0)
    peak = tl.max(log_sum, axis=0)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    weights = tl.exp(log_sum - peak)
    total = tl.sum(weights, axis=0)
    if CHUNK_PARTS == BLOCK_PARTS:
        weight = weights
    else:
        weight = tl.exp(tl.load(log_sum_ptr + part, mask=part < parts, other=float("-inf")) - peak)
    # A part that saw nothing wrote no result.
    result = tl.sum(tl.where((weight > 0.0)[:, None], partial, 0.0) * weight[:, None], axis=0)
    if CHUNK_PARTS < BLOCK_PARTS:
        for start in tl.range(CHUNK_PARTS, parts, CHUNK_PARTS):
            later = tl.cast(start, tl.int32) + part
            weight = tl.exp(tl.load(log_sum_ptr + later, mask=later < parts, other=float("-inf")) - peak)
            seen = (weight > 0.0)[:, None] & in_row
            partial = tl.load(partial_ptr + later[:, None] * HEAD_DIM + channel[None, :], mask=seen, other=0.0)
            result += tl.sum(partial * weight[:, None], axis=0)
    _store_row(
        output_ptr, result / tl.where(total > 0.0, total, 1.0), row, channel, q_len, QUERIES_PER_KV, HEAD_DIM
    )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "parts"])
def _combine_rotated_kernel(
    partial_ptr, log_sum_ptr, value_ptr, output_ptr, stride_value_batch, stride_value_head, q_len, parts,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr,
    OFFSET: tl.constexpr, NEW_APART: tl.constexpr, BLOCK_PARTS: tl.constexpr, CHUNK_PARTS: tl.constexpr,
    AT_A_TIME: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, parts = tl.cast(q_len, tl.int32), tl.cast(parts, tl.int32)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    log_sum_ptr += row * parts
    partial_ptr += row * parts * HEAD_DIM
    # Of the new token there is a weight only.
    written = parts - NEW_APART
    # AT_A_TIME softmaxes over parts of their own, rotated back each: warps that hold one wait for each other once.
    part = tl.arange(0, AT_A_TIME)[:, None] * (CHUNK_PARTS // AT_A_TIME)
    part += tl.arange(0, CHUNK_PARTS // AT_A_TIME)[None, :]
    log_sum, partial = _load_parts(log_sum_ptr, partial_ptr, part, written, channel, HEAD_DIM)
    peak = tl.full([AT_A_TIME], LEAST_PEAK, tl.float32)
    total = tl.zeros([AT_A_TIME], tl.float32)
    result = tl.zeros([AT_A_TIME, BLOCK_D], tl.float32)
    peak, total, result = _join(log_sum, partial, peak, total, result)
    if CHUNK_PARTS < BLOCK_PARTS:
        for start in tl.range(CHUNK_PARTS, written, CHUNK_PARTS):
            later = tl.cast(start, tl.int32) + part
            log_sum, partial = _load_parts(log_sum_ptr, partial_ptr, later, written, channel, HEAD_DIM)
            peak, total, result = _join(log_sum, partial, peak, total, result)
    result = rotate_rows_back(result, SIZE, OFFSET, AT_A_TIME, BLOCK_D)
    most = tl.max(peak, axis=0)
    if NEW_APART:
        new_log_sum = tl.load(log_sum_ptr + written)
        most = tl.maximum(most, new_log_sum)
    decay = tl.exp(peak - most)
    total = tl.sum(total * decay, axis=0)
    result = tl.sum(result * decay[:, None], axis=0)
    if NEW_APART:
        pair = row // (q_len * QUERIES_PER_KV)
        value_ptr += pair // NUM_KV_HEADS * stride_value_batch + pair % NUM_KV_HEADS * stride_value_head
        value = tl.load(value_ptr + channel, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        weight = tl.exp(new_log_sum - most)
        total += weight
        result += weight * value
    _store_row(
        output_ptr, result / tl.where(total > 0.0, total, 1.0), row, channel, q_len, QUERIES_PER_KV, HEAD_DIM
    )  # fmt: skip


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
        new_value: [batch, num_kv_heads, 1, head_dim], only where `partial` is rotated: the result of the last part,
            which left its weight only. It is not rotated.
    """
    q_len, head_dim = output.shape[2:]
    block_parts = next_power_of_2(most_parts)
    arguments = {
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "output_ptr": output,
        "q_len": q_len,
        "parts": parts,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "BLOCK_PARTS": block_parts,
    }
    if rotation is None:
        sizes, num_warps = block_sizes(block_parts, head_dim)
        grid = (partial.shape[0], -(-head_dim // sizes["BLOCK_D"]))
        launch(_combine_kernel, grid, arguments | sizes, num_warps, num_stages=1)
        return
    sizes, num_warps = row_sizes(block_parts, head_dim)
    arguments |= {
        "value_ptr": partial if new_value is None else new_value,
        "stride_value_batch": 0 if new_value is None else new_value.stride(0),
        "stride_value_head": 0 if new_value is None else new_value.stride(1),
        "NUM_KV_HEADS": output.shape[1] // queries_per_kv,
        "SIZE": block_size(head_dim),
        "OFFSET": rotation,
        "NEW_APART": new_value is not None,
    }
    launch(_combine_rotated_kernel, (partial.shape[0],), arguments | sizes, num_warps, num_stages=1)


def block_sizes(block_parts: int, head_dim: int) -> tuple[dict[str, int], int]:
    """Return the sizes of a program that joins some of the channels, and its warps: measured on an H100.

    Args:
        block_parts: parts at the most, a power of two.
        head_dim: channels.
    """
    row = next_power_of_2(head_dim)
    if block_parts * row <= 1024:
        return {"CHUNK_PARTS": block_parts, "BLOCK_D": row}, 1
    block_d = min(max(MOST_COMBINED // block_parts, 16), 64, row)
    chunk_parts = min(block_parts, MOST_IN_BLOCK // block_d)
    return {"CHUNK_PARTS": chunk_parts, "BLOCK_D": block_d}, 2 if chunk_parts * block_d <= 2048 else 4


def row_sizes(block_parts: int, head_dim: int) -> tuple[dict[str, int], int]:
    """Return the sizes of a program that joins all channels of a row, and its warps: measured on an H100.

    Args:
        block_parts: parts at the most, a power of two.
        head_dim: channels.
    """
    block_d = next_power_of_2(head_dim)
    chunk_parts = min(block_parts, max(MOST_IN_ROW // block_d, 1))
    numbers = chunk_parts * block_d
    num_warps = 1 if numbers <= 4096 else 4 if numbers <= 16384 else 8
    # A lane loads 16 bytes. With few parts each, more softmaxes are found sooner.
    at_a_time = num_warps * 128 // block_d * (2 if num_warps == 4 and numbers <= 8192 else 1)
    sizes = {"CHUNK_PARTS": chunk_parts, "AT_A_TIME": min(max(at_a_time, 1), chunk_parts), "BLOCK_D": block_d}
    return sizes, num_warps
