"""Attention over storage by tokens (docs/storage.md): kernel and launcher.

Programs `0 .. splits - 1` of a (sequence, kv head) share the stored tokens, program `splits` takes the new ones; each
leaves a part for `ottfx/kernels/affine_combine.py`. Stored tokens are decoded a tile at a time, in registers, and stay
rotated: queries are rotated before, the result is rotated back after the combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.affine_combine import _combine_kernel
from ottfx.kernels.launch import at_most, dense_rows, launch, next_power_of_2
from ottfx.kernels.rotate import rotate
from ottfx.kernels.table_codes import load_signed, padded_channels, table_constants
from ottfx.kernels.token_softmax import accumulate, attend_new, masked_scores

SPLITS = 32
"""Most programs that share the stored tokens of one (sequence, kv head)."""
PROGRAMS = 256
"""Programs of one sequence that fill a GPU."""


@triton.jit(
    do_not_specialize=["q_len", "pages", "splits", "stride_mask_batch", "stride_mask_head", "stride_mask_query"]
)
def _attend_tokens_kernel(
    query_ptr, rotated_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr,
    key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, partial_ptr, log_sum_ptr,
    stride_query_batch, stride_query_head, stride_query_token, stride_key_batch, stride_key_head, stride_key_token,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_token,
    q_len, pages, splits, softmax_scale,
    NUM_KV_HEADS: tl.constexpr, QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr,
    MASK: tl.constexpr, MASK_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    K4: tl.constexpr, K5: tl.constexpr, K6: tl.constexpr, K7: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    V4: tl.constexpr, V5: tl.constexpr, V6: tl.constexpr, V7: tl.constexpr,
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
        first_slot = pair * pages * 128
        for tile in tl.range(first_tile, tl.minimum(first_tile + share, tiles)):
            token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            live = token < past
            slot = first_slot + token
            key = load_signed(
                key_codes_ptr + slot * KEY_WORDS, live, KEY_BITS, HEAD_DIM, BLOCK_N, BLOCK_D,
                K0, K1, K2, K3, K4, K5, K6, K7,
            )  # fmt: skip
            key *= tl.load(key_scale_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
            scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
            scores = masked_scores(
                scores, mask_ptr, stride_mask_token, token, live, live_rows, softmax_scale, MASK, MASK_FLOOR
            )
            value = load_signed(
                value_codes_ptr + slot * VALUE_WORDS, live, VALUE_BITS, HEAD_DIM, BLOCK_N, BLOCK_D,
                V0, V1, V2, V3, V4, V5, V6, V7,
            )  # fmt: skip
            value *= tl.load(value_scale_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
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


def attend_turbo(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    softmax_scale: float,
    key_codes: Tensor,
    key_norm: Tensor,
    value_codes: Tensor,
    value_norm: Tensor,
    key_bits: int,
    value_bits: int,
    key_table: Sequence[float],
    value_table: Sequence[float],
    seed_offset: int,
) -> Tensor:
    """Attend as `ottfx::turbo_attend` does.

    Args:
        query: [batch, num_heads, q_len, head_dim], any strides.
        key: new tokens [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, or None.
        lengths: int64 [1, 3]: those of this site.
        softmax_scale: factor on query @ key^T.
        key_codes: state, as the three that follow; shapes in docs/storage.md.
        key_norm: state.
        value_codes: state.
        value_norm: state.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        key_table: ascending magnitudes of keys; `value_table` of values.
        value_table: see `key_table`.
        seed_offset: that of the rotation's seed.

    Returns:
        Shape and dtype of `query`, contiguous. A query that may attend to nothing gives 0.
    """
    arguments = {
        "key_codes_ptr": key_codes,
        "key_scale_ptr": key_norm,
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_norm,
        "pages": key_codes.shape[2],
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_WORDS": key_codes.shape[4],
        "VALUE_WORDS": value_codes.shape[4],
        "BLOCK_D": padded_channels(key.shape[-1]),
        **table_constants("K", key_table),
        **table_constants("V", value_table),
    }
    return _attend(_attend_tokens_kernel, query, key, value, mask, lengths, softmax_scale, arguments, seed_offset)


def _attend(
    kernel: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, softmax_scale: float,
    storage: Mapping[str, Any], seed_offset: int,
) -> Tensor:  # fmt: skip
    # `storage` are the arguments of the kernel that are of the scheme.
    query, key = dense_rows(query), dense_rows(key)
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    rows = q_len * queries_per_kv
    bits = max(storage["KEY_BITS"], storage["VALUE_BITS"])
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, bits, query.dtype == torch.float32)
    row_blocks = -(-rows // block_m)
    most_splits = min(max(PROGRAMS // num_kv_heads, 4), SPLITS)
    # A long chunk has programs enough in its row blocks.
    splits = torch.sym_max(1, most_splits // row_blocks)
    all_rows = batch_size * num_kv_heads * rows
    partial = torch.empty((all_rows, splits + 1, head_dim), dtype=torch.float32, device=query.device)
    log_sum = torch.empty((all_rows, splits + 1), dtype=torch.float32, device=query.device)
    additive = mask is not None and mask.is_floating_point()
    strides = (0, 0, 0, 0) if mask is None else _mask_strides(mask)
    arguments = {
        **storage,
        "query_ptr": query,
        "rotated_ptr": rotate(query, False, query.dtype, seed_offset),
        "key_ptr": key,
        "value_ptr": rotate(value, False, query.dtype, seed_offset),
        "mask_ptr": lengths if mask is None else mask,
        "lengths_ptr": lengths,
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "stride_query_batch": query.stride(0),
        "stride_query_head": query.stride(1),
        "stride_query_token": query.stride(2),
        "stride_key_batch": key.stride(0),
        "stride_key_head": key.stride(1),
        "stride_key_token": key.stride(2),
        "stride_mask_batch": strides[0],
        "stride_mask_head": strides[1],
        "stride_mask_query": strides[2],
        "stride_mask_token": strides[3],
        "q_len": q_len,
        "splits": splits,
        "softmax_scale": softmax_scale,
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "MASK": 0 if mask is None else 2 if additive else 1,
        "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if mask is not None and additive else 0.0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    launch(kernel, (batch_size * num_kv_heads, splits + 1, row_blocks), arguments, num_warps, 1)
    rotated = torch.empty((batch_size, num_heads, q_len, head_dim), dtype=torch.float32, device=query.device)
    block_d = min(next_power_of_2(head_dim), 128)
    arguments = {
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "output_ptr": rotated,
        "q_len": q_len,
        "parts": splits + 1,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "BLOCK_PARTS": next_power_of_2(most_splits + 1),
        "BLOCK_D": block_d,
    }
    launch(_combine_kernel, (all_rows, -(-head_dim // block_d)), arguments, num_warps=4, num_stages=1)
    return rotate(rotated, True, query.dtype, seed_offset)


def tile_sizes(rows: Any, head_dim: int, bits: int, exact: bool) -> tuple[int, int, int]:
    """Return query rows and tokens of a tile, and warps: what compiles for Hopper without spills.

    Args:
        rows: query rows of one kv head: q_len times query heads; may be symbolic.
        head_dim: channels.
        bits: the widest code. Choosing from a larger table takes more registers.
        exact: whether products are in float32, which runs outside the tensor cores.
    """
    if exact:
        return 16, 32, 8
    if at_most(rows, 16):
        return 16, 32 if head_dim > 128 or bits > 3 else 64, 8 if head_dim > 128 or bits > 3 else 4
    return (16, 32, 8) if head_dim > 128 else (64, 32, 8)


def _mask_strides(mask: Tensor) -> tuple[Any, ...]:
    # A size of 1 is every row; the last axis is never broadcast.
    return tuple(0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3)) + (mask.stride(3),)
