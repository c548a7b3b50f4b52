"""Launcher of attention over paged affine storage (`kivi`, `ott`): partial softmaxes, then their combination."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ottfx.kernels.affine_combine import combine
from ottfx.kernels.affine_decode import _decode_kernel
from ottfx.kernels.affine_split import _attend_kernel
from ottfx.kernels.decode_plan import K_WIDTH, MOST_ROWS, TILE, decode_plan
from ottfx.kernels.launch import at_most, dense_rows, launch, mask_strides, next_power_of_2, row_strides
from ottfx.kernels.rotate import NO_SEED, rotate

PAGE = 128
HALVES = (torch.float16, torch.bfloat16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    softmax_scale: float,
    *,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero_point: Tensor,
    key_residual: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor | None,
    value_residual: Tensor,
    outlier_key: Tensor | None = None,
    outlier_position: Tensor | None = None,
    outlier_value: Tensor | None = None,
    seat_key: Tensor | None = None,
    seat_key_scale: Tensor | None = None,
    seat_row: Tensor | None = None,
    seat_value: Tensor | None = None,
    seat_value_scale: Tensor | None = None,
    key_order: Tensor | None = None,
    key_residual_scale: Tensor | None = None,
    value_residual_scale: Tensor | None = None,
    key_bits: int,
    value_bits: int,
    rotate_values: bool = False,
) -> Tensor:
    """Attend over stored and new tokens: the section *attend* of docs/storage.md, without a host sync.

    Lengths are read on the device; the grid depends on shapes alone. State tensors are contiguous.

    Args:
        query: fp16, bf16 or fp32 [batch, num_heads, q_len, head_dim], any strides; head_dim a multiple of 16,
            num_heads a multiple of num_kv_heads.
        key: new tokens [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        mask: bool (True = attend) or additive float, 4-D with last size past + q_len and the other three either
            full or 1; or None.
        lengths: int64 [sites, 3]: past, packed keys, packed values, in tokens, before the append of `key`.
        site: row of `lengths`.
        softmax_scale: factor on query @ key^T.
        key_codes: state; shapes in docs/storage.md.
        key_scale: state.
        key_zero_point: state.
        key_residual: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state, or None for grids around 0.
        value_residual: state.
        outlier_key: state of the pool, all three or none; zero rows are allowed.
        outlier_position: state of the pool.
        outlier_value: state of the pool.
        seat_key: state of the seats of groups; all five or none.
        seat_key_scale: state of the seats.
        seat_row: state of the seats.
        seat_value: state of the seats.
        seat_value_scale: state of the seats.
        key_order: state, if key codes are of mixed widths.
        key_residual_scale: state, if the window is in 8 bits; `value_residual_scale` alike.
        value_residual_scale: see `key_residual_scale`.
        key_bits: width of a key code: 2, 3, 4 or 8.
        value_bits: width of a value code.
        rotate_values: whether stored values are rotated (`ottfx/rotation.py`); new ones and the result are not.

    Returns:
        Shape of `query`, contiguous. A query that may attend to nothing gives 0.
    """
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    rows = q_len * queries_per_kv
    pool_rows = 0 if outlier_key is None else outlier_key.shape[2]
    page_seats = 0 if seat_row is None else seat_row.shape[3]
    additive = mask is not None and mask.is_floating_point()
    decodes = query.dtype in HALVES and value_scale.shape[3] == 1 and at_most(rows, MOST_ROWS) and not additive
    # The value of one new token need not be rotated: it joins what was rotated back.
    new_apart = rotate_values and decodes and at_most(q_len, 1)
    if rotate_values and not new_apart:
        value = rotate(value, False, value.dtype)
    key_row_scale = lengths if key_residual_scale is None else key_residual_scale
    value_row_scale = lengths if value_residual_scale is None else value_residual_scale
    output = torch.empty((batch_size, num_heads, q_len, head_dim), dtype=query.dtype, device=query.device)
    arguments: dict[str, Any] = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "mask_ptr": lengths if mask is None else mask,
        "lengths_ptr": lengths,
        "key_codes_ptr": key_codes,
        "key_scale_ptr": key_scale,
        "key_zero_point_ptr": key_zero_point,
        "key_residual_ptr": key_residual,
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_scale,
        "value_zero_point_ptr": value_scale if value_zero_point is None else value_zero_point,
        "key_row_scale_ptr": key_row_scale,
        "value_residual_ptr": value_residual,
        "value_row_scale_ptr": value_row_scale,
        "outlier_key_ptr": outlier_key if pool_rows else key_residual,
        "outlier_position_ptr": outlier_position if pool_rows else lengths,
        "outlier_value_ptr": outlier_value if pool_rows else value_residual,
        "seat_key_ptr": seat_key if page_seats else key_residual,
        "seat_key_scale_ptr": seat_key_scale if page_seats else key_row_scale,
        "seat_row_ptr": seat_row if page_seats else lengths,
        "seat_value_ptr": seat_value if page_seats else value_residual,
        "seat_value_scale_ptr": seat_value_scale if page_seats else value_row_scale,
        "key_order_ptr": lengths if key_order is None else key_order,
        **row_strides(query=query, key=key, value=value),
        **mask_strides(mask),
        "site": site,
        "q_len": q_len,
        "pages": key_codes.shape[2],
        "softmax_scale": softmax_scale,
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "CAPACITY": key_residual.shape[2],
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "MIXED": key_order is not None,
        "SYMMETRIC": value_zero_point is None,
        "GROUP": PAGE // key_scale.shape[3],
        "POOL_ROWS": pool_rows,
        "PAGE_SEATS": page_seats,
    }
    if decodes:
        plan = decode_plan(
            pairs=batch_size * num_kv_heads,
            num_kv_heads=num_kv_heads,
            rows=rows,
            head_dim=head_dim,
            bits=(key_bits, value_bits),
            group_size=arguments["GROUP"],
            ring_rows=arguments["CAPACITY"],
            pages=arguments["pages"],
            page_seats=page_seats,
            coded_window=key_residual.dtype == torch.int8,
            rotated=rotate_values,
        )
        arguments |= {
            "MASK": mask is not None,
            "ONE_MASK": mask is not None and mask.shape[1] == 1 and at_most(q_len, 1),
            "SINGLE": plan.single,
            "COLUMNS": plan.columns,
            "TILE": TILE,
            "BLOCK_D": plan.block_d,
            "seat_parts": plan.seat_parts,
            "window_parts": plan.window_parts,
            "NEW_APART": new_apart,
            # With a pool both halves are packed by whole groups (docs/storage.md).
            "WHOLE_TILES": outlier_key is not None and arguments["GROUP"] % TILE == 0,
            "K_WIDTH": K_WIDTH,
        }
        kernel, num_warps, max_registers = _decode_kernel, 1, plan.max_registers
        splits, extra, most_written = plan.splits, plan.seat_parts + plan.window_parts, plan.most_parts
        row_blocks = plan.row_blocks
    else:
        exact = query.dtype == torch.float32
        block_m, block_n, num_warps = tile_sizes(rows, head_dim, (key_bits, value_bits), exact)
        row_blocks = -(-rows // block_m)
        # Enough programs to fill a GPU at batch 1; a long chunk has them in its row blocks already.
        most_splits = min(max(256 // num_kv_heads, 4), 32)
        splits, extra, most_written = torch.sym_max(1, most_splits // row_blocks), 1, most_splits + 1
        arguments |= {
            "VALUE_GROUPS": value_scale.shape[3],
            "MASK": 0 if mask is None else 2 if additive else 1,
            "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if mask is not None and additive else 0.0,
            "PRECISION": "ieee" if exact else "tf32",
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_D": next_power_of_2(head_dim),
        }
        kernel, max_registers = _attend_kernel, None
    # What the programs leave, and the new token's weight.
    parts, most_parts = splits + extra + int(new_apart), most_written + int(new_apart)
    all_rows = batch_size * num_kv_heads * rows
    partial = torch.empty((all_rows, parts, head_dim), dtype=torch.float32, device=query.device)
    log_sum = torch.empty((all_rows, parts), dtype=torch.float32, device=query.device)
    arguments |= {"partial_ptr": partial, "log_sum_ptr": log_sum, "splits": splits}
    # More stages would send the words through shared memory.
    grid = (batch_size * num_kv_heads, splits + extra, row_blocks)
    launch(kernel, grid, arguments, num_warps, 1, max_registers)
    combine(
        partial, log_sum, output, parts=parts, most_parts=most_parts, queries_per_kv=queries_per_kv,
        rotation=NO_SEED.value if rotate_values else None, new_value=value if new_apart else None,
    )  # fmt: skip
    return output


def tile_sizes(rows: Any, head_dim: int, bits: tuple[int, int], exact: bool) -> tuple[int, int, int]:
    """Return query rows and tokens of a tile, and warps: the largest that compile for Hopper without spills.

    Args:
        rows: query rows of one kv head: q_len times query heads; may be symbolic.
        head_dim: channels.
        bits: widths of key and value codes.
        exact: whether products are in float32, which runs outside the tensor cores.
    """
    if exact:
        return 16, 32, 8
    if at_most(rows, 16):
        return 16, 32 if head_dim > 128 or 3 in bits else 64, 4
    return 32 if head_dim > 128 else 64, 32, 8
