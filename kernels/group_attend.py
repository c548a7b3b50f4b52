"""Launcher of attention over storage by groups (docs/storage.md): partial softmaxes, then their combination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ottfx.kernels.affine_combine import combine
from ottfx.kernels.group_split import _attend_groups_kernel
from ottfx.kernels.launch import at_most, dense_rows, launch, mask_strides, next_power_of_2, row_strides
from ottfx.kernels.sketch import sketch
from ottfx.kernels.token_attend import PROGRAMS, SPLITS


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
    arguments = {
        "radius_ptr": key_radius,
        "radius_scale_ptr": key_radius_scale,
        "radius_zero_ptr": key_radius_zero_point,
        "angle_ptr": key_angle,
        "angle_scale_ptr": key_angle_scale,
        "angle_zero_ptr": key_angle_zero_point,
        **dict.fromkeys(("sketch_ptr", "signs_ptr", "outlier_signs_ptr", "norms_ptr", "outliers_ptr"), lengths),
        "SKETCH": False,
        "KEY_BITS": 0,
        "OUTLIERS": 0,
        "RADIUS_BITS": radius_bits,
        "ANGLE_BITS": angle_bits,
    }
    values = (value_codes, value_scale, value_zero_point, value_residual)
    return _attend(
        query, key, value, mask, lengths, softmax_scale, arguments, key_residual, values, value_bits, group_size
    )


def attend_sketch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    softmax_scale: float,
    key_signs: Tensor,
    key_outlier_signs: Tensor,
    key_norms: Tensor,
    key_outliers: Tensor,
    key_residual: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor,
    value_residual: Tensor,
    key_bits: int,
    value_bits: int,
    group_size: int,
    seed_offset: int,
) -> Tensor:
    """Attend as `ottfx::qjl_attend` does, without a host sync.

    Args:
        query: as for `attend_pairs`, as are the five that follow.
        key: see `query`.
        value: see `query`.
        mask: see `query`.
        lengths: see `query`.
        softmax_scale: see `query`.
        key_signs: state, as the eight that follow; shapes in docs/storage.md.
        key_outlier_signs: state.
        key_norms: state.
        key_outliers: state.
        key_residual: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state.
        value_residual: state.
        key_bits: signs for each channel.
        value_bits: width of a value code.
        group_size: tokens of a group.
        seed_offset: that of the sketch's first rotation.

    Returns:
        As `attend_pairs`.
    """
    # Half precision holds an entry of the sketch better than bfloat16, and a sign exactly.
    dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
    names = ("radius", "radius_scale", "radius_zero", "angle", "angle_scale", "angle_zero")
    arguments = {
        **dict.fromkeys((f"{name}_ptr" for name in names), lengths),
        "sketch_ptr": sketch(key.shape[3], key_bits, dtype, key.device, seed_offset),
        "signs_ptr": key_signs,
        "outlier_signs_ptr": key_outlier_signs,
        "norms_ptr": key_norms,
        "outliers_ptr": key_outliers,
        "SKETCH": True,
        "KEY_BITS": key_bits,
        "OUTLIERS": key_outliers.shape[4],
        "RADIUS_BITS": 0,
        "ANGLE_BITS": 0,
    }
    values = (value_codes, value_scale, value_zero_point, value_residual)
    return _attend(
        query, key, value, mask, lengths, softmax_scale, arguments, key_residual, values, value_bits, group_size
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, softmax_scale: float,
    storage: Mapping[str, Any], key_residual: Tensor, values: tuple[Tensor, Tensor, Tensor, Tensor], value_bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    # `storage` are the arguments of the kernel that are of the keys of a scheme.
    value_codes, value_scale, value_zero_point, value_residual = values
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    rows = q_len * queries_per_kv
    exact = query.dtype == torch.float32
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, exact, storage["SKETCH"])
    row_blocks = -(-rows // block_m)
    most_splits = min(max(PROGRAMS // num_kv_heads, 4), SPLITS)
    # A long chunk has programs enough in its row blocks.
    splits = torch.sym_max(1, most_splits // row_blocks)
    all_rows = batch_size * num_kv_heads * rows
    partial = torch.empty((all_rows, splits + 1, head_dim), dtype=torch.float32, device=query.device)
    log_sum = torch.empty((all_rows, splits + 1), dtype=torch.float32, device=query.device)
    additive = mask is not None and mask.is_floating_point()
    arguments = {
        **storage,
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": lengths if mask is None else mask,
        "lengths_ptr": lengths,
        "key_residual_ptr": key_residual,
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_scale,
        "value_zero_point_ptr": value_zero_point,
        "value_residual_ptr": value_residual,
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        **row_strides(query=query, key=key, value=value),
        **mask_strides(mask),
        "q_len": q_len,
        "pages": value_codes.shape[2],
        "splits": splits,
        "softmax_scale": softmax_scale,
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "CAPACITY": key_residual.shape[2],
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
    combine(partial, log_sum, output, parts=splits + 1, most_parts=most_splits + 1, queries_per_kv=queries_per_kv)
    return output


def tile_sizes(rows: Any, head_dim: int, exact: bool, sketch: bool) -> tuple[int, int, int]:
    """Return query rows and tokens of a tile, and warps: what compiles for Hopper without spills.

    Args:
        rows: query rows of one kv head: q_len times query heads; may be symbolic.
        head_dim: channels.
        exact: whether products are in float32, which runs outside the tensor cores.
        sketch: whether keys are sketches, which take more registers.
    """
    few, wide = exact or at_most(rows, 16), head_dim > 128
    num_warps = 4 if few and not exact and not wide else 8
    if sketch:
        return 16 if few or wide else 32, 16, num_warps
    return 16 if few or wide else 64, 32, num_warps
