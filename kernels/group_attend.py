"""Launcher of attention over storage by groups (docs/storage.md): partial softmaxes, then their combination."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ottfx.kernels.affine_combine import _combine_kernel
from ottfx.kernels.group_split import _attend_groups_kernel
from ottfx.kernels.launch import at_most, dense_rows, launch, next_power_of_2
from ottfx.kernels.token_attend import PROGRAMS, SPLITS, mask_strides


def attend_pairs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    softmax_scale: float,
    key_radius: Tensor,
    key_radius_scale: Tensor,
    key_radius_zero_point: Tensor,
    key_angle: Tensor,
    key_angle_scale: Tensor,
    key_angle_zero_point: Tensor,
    key_residual: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor,
    value_residual: Tensor,
    radius_bits: int,
    angle_bits: int,
    value_bits: int,
    group_size: int,
) -> Tensor:
    """Attend as `ottfx::polar_pairs_attend` does, without a host sync.

    Args:
        query: [batch, num_heads, q_len, head_dim], any strides.
        key: new tokens [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, or None.
        lengths: int64 [1, 3]: those of this site.
        softmax_scale: factor on query @ key^T.
        key_radius: state, as the ten that follow; shapes in docs/storage.md.
        key_radius_scale: state.
        key_radius_zero_point: state.
        key_angle: state.
        key_angle_scale: state.
        key_angle_zero_point: state.
        key_residual: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state.
        value_residual: state.
        radius_bits: width of a radius code; `angle_bits` of an angle code, `value_bits` of a value code.
        angle_bits: see `radius_bits`.
        value_bits: see `radius_bits`.
        group_size: tokens of a group.

    Returns:
        Shape and dtype of `query`, contiguous. A query that may attend to nothing gives 0.
    """
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    rows = q_len * queries_per_kv
    exact = query.dtype == torch.float32
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, exact)
    row_blocks = -(-rows // block_m)
    most_splits = min(max(PROGRAMS // num_kv_heads, 4), SPLITS)
    # A long chunk has programs enough in its row blocks.
    splits = torch.sym_max(1, most_splits // row_blocks)
    all_rows = batch_size * num_kv_heads * rows
    partial = torch.empty((all_rows, splits + 1, head_dim), dtype=torch.float32, device=query.device)
    log_sum = torch.empty((all_rows, splits + 1), dtype=torch.float32, device=query.device)
    additive = mask is not None and mask.is_floating_point()
    strides = (0, 0, 0, 0) if mask is None else mask_strides(mask)
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": lengths if mask is None else mask,
        "lengths_ptr": lengths,
        "radius_ptr": key_radius,
        "radius_scale_ptr": key_radius_scale,
        "radius_zero_ptr": key_radius_zero_point,
        "angle_ptr": key_angle,
        "angle_scale_ptr": key_angle_scale,
        "angle_zero_ptr": key_angle_zero_point,
        "key_residual_ptr": key_residual,
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_scale,
        "value_zero_point_ptr": value_zero_point,
        "value_residual_ptr": value_residual,
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "stride_query_batch": query.stride(0),
        "stride_query_head": query.stride(1),
        "stride_query_token": query.stride(2),
        "stride_key_batch": key.stride(0),
        "stride_key_head": key.stride(1),
        "stride_key_token": key.stride(2),
        "stride_value_batch": value.stride(0),
        "stride_value_head": value.stride(1),
        "stride_value_token": value.stride(2),
        "stride_mask_batch": strides[0],
        "stride_mask_head": strides[1],
        "stride_mask_query": strides[2],
        "stride_mask_token": strides[3],
        "q_len": q_len,
        "pages": value_codes.shape[2],
        "splits": splits,
        "softmax_scale": softmax_scale,
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "CAPACITY": key_residual.shape[2],
        "RADIUS_BITS": radius_bits,
        "ANGLE_BITS": angle_bits,
        "VALUE_BITS": value_bits,
        "GROUP": group_size,
        "VALUE_GROUPS": value_scale.shape[3],
        "MASK": 0 if mask is None else 2 if additive else 1,
        "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if mask is not None and additive else 0.0,
        "PRECISION": "ieee" if exact else "tf32",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_P": max(next_power_of_2(head_dim // 2), 16),
    }
    grid = (batch_size * num_kv_heads, splits + 1, row_blocks)
    launch(_attend_groups_kernel, grid, arguments, num_warps, num_stages=1)
    output = torch.empty((batch_size, num_heads, q_len, head_dim), dtype=query.dtype, device=query.device)
    block_d = min(next_power_of_2(head_dim), 128)
    arguments = {
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        "output_ptr": output,
        "q_len": q_len,
        "parts": splits + 1,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "BLOCK_PARTS": next_power_of_2(most_splits + 1),
        "BLOCK_D": block_d,
    }
    launch(_combine_kernel, (all_rows, -(-head_dim // block_d)), arguments, num_warps=4, num_stages=1)
    return output


def tile_sizes(rows: Any, head_dim: int, exact: bool) -> tuple[int, int, int]:
    """Return query rows and tokens of a tile, and warps: what compiles for Hopper without spills.

    Args:
        rows: query rows of one kv head: q_len times query heads; may be symbolic.
        head_dim: channels.
        exact: whether products are in float32, which runs outside the tensor cores.
    """
    if exact or at_most(rows, 16):
        return 16, 32, 8 if exact or head_dim > 128 else 4
    return 16 if head_dim > 128 else 64, 32, 8
