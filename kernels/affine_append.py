"""Launcher of the append of paged affine storage (`kivi`, `ott`); arguments as those of `affine_cache.append`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ottfx.kernels.affine_select import _select_outliers_kernel
from ottfx.kernels.affine_store import _store_tokens_kernel
from ottfx.kernels.encode_pages import encode_pages
from ottfx.kernels.group_seats import seat_tokens
from ottfx.kernels.key_order import order_channels
from ottfx.kernels.launch import at_most, channel_chunk, dense_rows, launch, next_power_of_2, row_strides
from ottfx.kernels.rotate import block_size, rotate

PAGE = 128
STRIP = 16
"""Tokens of a word of 2-bit value codes; those that one program packs."""
RING_ROWS = 16
"""Tokens that one program writes into the ring."""

MOST_STORING = 792
"""Programs of a launch that store tokens: two rounds of what an H100 runs at once. Each takes several items in turn."""
MOST_SELECTING = 264
"""Programs of a launch that select outliers, likewise."""


def append(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    lengths: Tensor,
    site: int,
    *,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero_point: Tensor,
    key_residual: Tensor,
    residual_valid: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor | None,
    value_residual: Tensor,
    outlier_key: Tensor | None = None,
    outlier_position: Tensor | None = None,
    outlier_value: Tensor | None = None,
    value_outlier_position: Tensor | None = None,
    spill_count: Tensor | None = None,
    seat_key: Tensor | None = None,
    seat_key_scale: Tensor | None = None,
    seat_row: Tensor | None = None,
    seat_value: Tensor | None = None,
    seat_value_scale: Tensor | None = None,
    value_seat_row: Tensor | None = None,
    key_order: Tensor | None = None,
    key_residual_scale: Tensor | None = None,
    value_residual_scale: Tensor | None = None,
    key_bits: int,
    value_bits: int,
    group_size: int,
    key_window: int,
    key_step: int,
    value_window: int,
    value_step: int,
    outlier_capacity: int = 0,
    score_norm: int = 1,
    replacement: str = "rest",
    mask_replaced: bool = True,
    range_search: bool = False,
    rotate_values: bool = False,
) -> None:
    """Store new tokens and pack what became due: the section *append* of docs/storage.md, without a host sync.

    State tensors are contiguous and mutated; their shapes are in docs/storage.md. Lengths are read on the device.

    Args:
        key: fp16, bf16 or fp32 [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        valid: bool [batch, q_len], False for padding, or None.
        lengths: int64 [sites, 3]: past, packed keys, packed values, in tokens.
        site: row of `lengths`.
        key_codes: state.
        key_scale: state.
        key_zero_point: state.
        key_residual: state.
        residual_valid: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state, or None for grids around 0.
        value_residual: state.
        outlier_key: state of the pool; all five or none.
        outlier_position: state of the pool.
        outlier_value: state of the pool.
        value_outlier_position: state of the pool.
        spill_count: state of the pool.
        seat_key: state of the seats of groups; all six or none, and not with a pool.
        seat_key_scale: state of the seats.
        seat_row: state of the seats.
        seat_value: state of the seats.
        seat_value_scale: state of the seats.
        value_seat_row: state of the seats.
        key_order: state, if key codes are of mixed widths.
        key_residual_scale: state, if the window is in 8 bits; then keys and values have one schedule.
        value_residual_scale: see `key_residual_scale`.
        key_bits: width of a key code: 2, 3, 4 or 8.
        value_bits: width of a value code.
        group_size: tokens of a key group: 32, 64 or 128.
        key_window: newest tokens that stay in full precision, by the schedule of the keys.
        key_step: tokens that are packed together, a multiple of `group_size`.
        value_window: `key_window` of the values.
        value_step: `key_step` of the values.
        outlier_capacity: seats of the pool; 0 traces nothing.
        score_norm: 1 or 2: the norm of a key that is its score.
        replacement: "rest" or "group": whose mean stands in an outlier's slot.
        mask_replaced: whether such slots are marked as not attended.
        range_search: whether grids may be narrower than the range of their group.
        rotate_values: whether values are stored rotated (`ottfx/rotation.py`).
    """
    key, value = dense_rows(key), dense_rows(value)
    batch_size, num_kv_heads, q_len, head_dim = key.shape
    # A step whose token goes to the ring, and is not packed at once, rotates it on the way.
    rotates_row = rotate_values and at_most(q_len, 1) and min(key_window, value_window) > 0
    if rotate_values and not rotates_row:
        value = rotate(value, False, value.dtype)
    ring = key_residual.shape[2]
    chunk = channel_chunk(head_dim)
    traces = outlier_capacity > 0 and outlier_key is not None
    every_seat = {
        "seat_key": seat_key, "seat_key_scale": seat_key_scale, "seat_row": seat_row,
        "seat_value": seat_value, "seat_value_scale": seat_value_scale, "value_seat_row": value_seat_row,
    }  # fmt: skip
    seats = {name: tensor for name, tensor in every_seat.items() if tensor is not None}
    seated = bool(seats)
    keeps_apart = traces or seated
    most_keys_due = -(-q_len // key_step) * key_step
    # Sizes are known up to a bound when a step is compiled: one that never fills a page needs no encoder.
    encodes = head_dim & (head_dim - 1) == 0 and not at_most(q_len, PAGE)
    # Two more than there can be: a size that is known not to be 1 needs no guard.
    most_pages = q_len // PAGE + 2
    replaced = hard = score = lengths
    if encodes:
        hard = torch.empty((batch_size, num_kv_heads, most_pages), dtype=torch.int8, device=key.device)
    if encodes and traces:
        score = torch.empty((batch_size, num_kv_heads, most_keys_due), dtype=torch.float32, device=key.device)
    if keeps_apart:
        replaced = torch.empty((batch_size, num_kv_heads, most_keys_due), dtype=torch.int8, device=key.device)
    common: dict[str, Any] = {
        "key_ptr": key,
        "value_ptr": value,
        "valid_ptr": lengths if valid is None else valid.contiguous(),
        "lengths_ptr": lengths,
        "replaced_ptr": replaced,
        "hard_ptr": hard,
        "key_residual_ptr": key_residual,
        "key_row_scale_ptr": lengths if key_residual_scale is None else key_residual_scale,
        "value_residual_ptr": value_residual,
        "value_row_scale_ptr": lengths if value_residual_scale is None else value_residual_scale,
        "residual_valid_ptr": residual_valid,
        **row_strides(key=key, value=value),
        "site": site,
        "q_len": q_len,
        "flags_per_head": most_keys_due,
        "most_pages": most_pages,
        "pairs": batch_size * num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "CAPACITY": ring,
        "GROUP": group_size,
        "HAS_VALID": valid is not None,
        "ENCODED": encodes,
        "CHUNK": chunk,
    }
    codes = {
        "key_order_ptr": lengths if key_order is None else key_order,
        "MIXED": key_order is not None,
        "SYMMETRIC": value_zero_point is None,
        "SEARCH": range_search,
    }
    if value_zero_point is None:
        value_zero_point = value_scale
    # The encoder needs the order; without it, whoever keeps tokens apart decides the order in the same launch.
    orders_apart = encodes or not keeps_apart
    if key_order is not None and orders_apart:
        order_channels(common, key_order, key_window, key_step)
    if seated:
        seat_tokens(
            common, seats, key_order, window=key_window, step=key_step, norm=score_norm,
            orders=key_order is not None and not orders_apart,
        )  # fmt: skip
    if encodes:
        encode_pages(
            common, score, key_codes, key_scale, key_zero_point, value_codes, value_scale, value_zero_point,
            bits=(key_bits, value_bits), windows=(key_window, value_window), steps=(key_step, value_step),
            norm=score_norm, traces=traces, seated=seated, codes=codes,
        )  # fmt: skip
    if traces:
        assert outlier_key is not None
        arguments = common | {
            "outlier_key_ptr": outlier_key,
            "outlier_position_ptr": outlier_position,
            "outlier_value_ptr": outlier_value,
            "value_outlier_position_ptr": value_outlier_position,
            "spill_count_ptr": spill_count,
            "score_ptr": score,
            "WINDOW": key_window,
            "STEP": key_step,
            "SEATS": outlier_capacity,
            "SPILL": outlier_key.shape[2] - outlier_capacity,
            "BLOCK_SEATS": max(next_power_of_2(outlier_capacity), 4),
            "NORM": score_norm,
            "key_order_ptr": codes["key_order_ptr"],
            "ORDERS": codes["MIXED"] and not orders_apart,
            "BLOCK_D": next_power_of_2(head_dim),
        }
        grid = (torch.sym_min(batch_size * num_kv_heads, MOST_SELECTING),)
        launch(_select_outliers_kernel, grid, arguments, num_warps=4, num_stages=1)

    one_schedule = (key_window, key_step) == (value_window, value_step)
    # Behind the encoder most pages are done, and an item is a whole one: all chunks of channels, all strips.
    key_parts, value_parts = (head_dim // chunk, PAGE // STRIP) if encodes else (1, 1)
    pack = (
        common
        | codes
        | {
            "key_codes_ptr": key_codes,
            "key_scale_ptr": key_scale,
            "key_zero_point_ptr": key_zero_point,
            "value_codes_ptr": value_codes,
            "value_scale_ptr": value_scale,
            "value_zero_point_ptr": value_zero_point,
            "pages": key_codes.shape[2],
            "KEY_BITS": key_bits,
            "VALUE_BITS": value_bits,
            "VALUE_GROUPS": value_scale.shape[3],
            "KEY_WINDOW": key_window,
            "KEY_STEP": key_step,
            "VALUE_WINDOW": value_window,
            "VALUE_STEP": value_step,
            "HAS_OUTLIERS": keeps_apart,
            "SEATED": seated,
            "MEAN_OF_REST": replacement == "rest",
            "MARK": mask_replaced or seated,
            "WRITE_BACK": not one_schedule,
            "KEY_PARTS": key_parts,
            "VALUE_PARTS": value_parts,
            "ROTATED": block_size(head_dim) if rotates_row else 1,
            "BLOCK_HALF": next_power_of_2(head_dim // 2),
            "BLOCK_D": next_power_of_2(head_dim),
            "RING_ROWS": RING_ROWS,
        }
    )
    key_items = _most_blocks(q_len, key_step, PAGE) * (head_dim // chunk // key_parts)
    value_items = _most_blocks(q_len, value_step, STRIP * value_parts)
    # With write-back every row of the ring may change, otherwise only those of the new tokens.
    ring_items = -(-(torch.sym_min(q_len, ring) if one_schedule else ring) // RING_ROWS)
    # One launch will do if no new token takes the row of one that is still to be packed.
    unpacked = max(key_window + key_step, value_window + value_step) - 1
    in_one_launch = one_schedule and at_most(q_len, ring - unpacked)
    pack["ONE_TOKEN"] = in_one_launch and at_most(q_len, 1)
    if pack["ONE_TOKEN"]:
        launches = [(key_items, value_items, 0)]
    elif in_one_launch:
        launches = [(key_items, value_items, ring_items)]
    else:
        launches = [(key_items, value_items, 0), (0, 0, ring_items)]
    for items in launches:
        arguments = pack | dict(zip(("key_items", "value_items", "ring_items"), items, strict=True))
        grid = (torch.sym_min(batch_size * num_kv_heads * sum(items), MOST_STORING),)
        launch(_store_tokens_kernel, grid, arguments, num_warps=4, num_stages=1)


def _most_blocks(q_len: Any, step: int, size: int) -> Any:
    # Blocks of `size` tokens that the tokens due in one call can touch. They end on a multiple of step.
    due = -(-q_len // step) * step
    return (due + 2 * size - 1 - math.gcd(step, size)) // size
