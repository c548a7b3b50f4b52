"""Append of paged affine storage in plain torch: the definition of what `kivi` and `ott` store, and their CPU path.

Layout and rules: `docs/storage.md`. Every function is traceable with a symbolic q_len and batch and with an unbacked
number of pages: positions are device tensors, and sizes follow from q_len alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ottfx.affine_grids import code_keys, code_values, decide_order
from ottfx.affine_pages import write_keys, write_values
from ottfx.affine_schedule import due_range, ring_positions, window_index
from ottfx.group_seats import choose_seats, write_seats
from ottfx.outlier_pool import trace_outliers
from ottfx.reference import dequantize_affine, make_finite
from ottfx.schemes.base import PAGE, ROLES, is_always, new_positions
from ottfx.window_rows import decode_rows, encode_rows


def token_validity(mask: Tensor | None, lengths: Tensor, site: int, q_len: int, batch_size: int) -> Tensor | None:
    """Say which of the new tokens are real, from the last query row of an attention mask.

    Args:
        mask: bool (True = attend) or additive float [batch_size or 1, heads or 1, queries, past + q_len or more], or
            None.
        lengths: int64 [sites, 3].
        site: row of `lengths`; its past is the column of the first new token.
        q_len: new tokens.
        batch_size: rows of the result.

    Returns:
        bool [batch_size, q_len], True where any head may attend; None if `mask` is None (all are real).
    """
    if mask is None:
        return None
    last = mask.select(2, -1).index_select(-1, new_positions(lengths, site, q_len))
    if mask.dtype != torch.bool:
        last = last > torch.finfo(mask.dtype).min / 2
    any_head = last.squeeze(1) if is_always(mask.shape[1], 1) else last.any(1)
    return any_head.expand(batch_size, q_len)


def _gather(ring: Tensor, new: Tensor, index: Tensor, dim: int = 2) -> Tensor:
    return torch.cat([ring, new.to(ring.dtype)], dim=dim).index_select(dim, index)


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
) -> None:
    """Store new tokens and pack what became due: the section *append* of docs/storage.md.

    Args:
        key: [batch, heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        valid: bool [batch, q_len], False for padding, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        key_codes: state, mutated, as all tensors that follow; shapes in docs/storage.md.
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
        key_order: state, if key codes are of mixed widths; then keys and values have one schedule.
        key_residual_scale: state, if the window is in 8 bits; then keys and values have one schedule.
        value_residual_scale: see `key_residual_scale`.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        group_size: tokens of a key group.
        key_window: tokens that stay in full precision, by the schedule of the keys.
        key_step: tokens that are packed together.
        value_window: `key_window` of the values.
        value_step: `key_step` of the values.
        outlier_capacity: seats of the pool; 0 traces nothing.
        score_norm: 1 or 2.
        replacement: "rest" or "group": whose mean stands in the slot of a token of the pool.
        mask_replaced: whether such slots are marked as not attended.
        range_search: whether grids may be narrower than the range of their group.
    """
    batch, _, q_len, _ = key.shape
    past, key_packed, value_packed = lengths[site].unbind()
    if valid is None:
        valid = torch.ones(batch, q_len, dtype=torch.bool, device=key.device)
    valid = valid.to(residual_valid.dtype)
    ring_rows, capacity = key_residual.shape[2], key_codes.shape[2]
    due_keys = due_range(past, key_packed, q_len, key_window, key_step, capacity)
    key_index = window_index(due_keys.offsets(), past, ring_rows, q_len)
    real_keys = _gather(residual_valid, valid, key_index, dim=1).unsqueeze(1) != 0
    together = (key_window, key_step) == (value_window, value_step)
    if together:
        due_values, value_index, real_values = due_keys, key_index, real_keys
    else:
        due_values = due_range(past, value_packed, q_len, value_window, value_step, capacity)
        value_index = window_index(due_values.offsets(), past, ring_rows, q_len)
        real_values = _gather(residual_valid, valid, value_index, dim=1).unsqueeze(1) != 0
    held_key = decode_rows(key_residual, key_residual_scale)
    held_value = decode_rows(value_residual, value_residual_scale)
    window_key = _gather(held_key, key, key_index)
    window_value = _gather(held_value, value, value_index)

    kept = mean_of = in_range = real_keys
    value_rows, marked = make_finite(window_value), None
    pool_updates: list[tuple[Tensor, Tensor]] = []
    if outlier_capacity:
        assert outlier_key is not None and outlier_value is not None and spill_count is not None
        assert outlier_position is not None and value_outlier_position is not None
        groups = ((q_len + key_step - 1) // key_step) * (key_step // group_size)
        group_end = due_keys.start + group_size * torch.arange(1, groups + 1, device=key.device)
        update = trace_outliers(
            window_key, window_value, real_keys.squeeze(1), group_end <= due_keys.stop, due_keys.start,
            outlier_key, outlier_value, outlier_position, spill_count,
            capacity=outlier_capacity, group_size=group_size, score_norm=score_norm,
        )  # fmt: skip
        kept = real_keys & ~update.is_outlier
        mean_of, in_range = (kept, kept) if replacement == "rest" else (real_keys, real_keys)
        value_rows = _replace_rows(value_rows, kept, mean_of, group_size)
        marked = update.is_outlier if mask_replaced else None
        pool_updates = [
            (outlier_key, update.key),
            (outlier_value, update.value),
            (outlier_position, update.position),
            (value_outlier_position, update.position),
            (spill_count, update.spill_count),
        ]

    if seat_row is not None:
        assert seat_key is not None and seat_key_scale is not None
        assert seat_value is not None and seat_value_scale is not None and value_seat_row is not None
        of_group = seat_row.shape[3] * group_size // PAGE
        seats = choose_seats(window_key, real_keys.squeeze(1), group_size, of_group, score_norm)
        marked = seats.is_seated
        mean_of = in_range = real_keys & ~marked
        write_seats(window_key, seats, due_keys, group_size, seat_key, seat_key_scale, seat_row)
        write_seats(window_value, seats, due_keys, group_size, seat_value, seat_value_scale, value_seat_row)

    key_rows = _replace_rows(make_finite(window_key), kept, mean_of, group_size)
    new_order = None
    if key_order is not None:
        seen = due_keys.start + torch.arange(due_keys.bound + key_window, device=key.device)
        seen_index = window_index(seen, past, ring_rows, q_len)
        seen_real = (_gather(residual_valid, valid, seen_index, dim=1) != 0) & (seen < past + q_len)
        seen_key = _gather(held_key, key, seen_index)
        new_order = decide_order(key_order, seen_key, seen_real, due_keys, group_size, key_window)
    coded_keys = code_keys(
        key_rows.unflatten(2, (-1, group_size)), key_bits, in_range.unflatten(2, (-1, group_size)).unsqueeze(-1),
        new_order, range_search,
    )  # fmt: skip
    # A group of zeros has scale, zero point and codes 0, as a group without a member taking part must.
    value_rows = torch.where(real_values.unsqueeze(-1), value_rows, 0.0)
    value_groups = value_scale.shape[3]
    value_codes_due, scale, zero_point = code_values(
        value_rows.unflatten(-1, (value_groups, -1)), value_bits, value_zero_point is None, range_search
    )
    if marked is not None:
        first_group = torch.arange(value_groups, device=key.device) == 0
        scale = torch.where(marked.unsqueeze(-1) & first_group, -scale, scale)

    held = ring_positions(past + q_len, ring_rows)
    is_new, newest = held >= past, (held - past).clamp(0, q_len - 1)
    new_key, new_value = key.index_select(2, newest), value.index_select(2, newest)
    if key_residual_scale is not None and value_residual_scale is not None:
        new_key, new_key_scale = encode_rows(new_key)
        new_value, new_value_scale = encode_rows(new_value)
        key_residual_scale.copy_(torch.where(is_new, new_key_scale, key_residual_scale))
        value_residual_scale.copy_(torch.where(is_new, new_value_scale, value_residual_scale))
    new_ring = torch.where(is_new.unsqueeze(-1), new_key, key_residual)
    if not together:
        is_due, offset = due_keys.locate(held)
        decoded = dequantize_affine(*coded_keys, dim=3).flatten(2, 3).index_select(2, offset)
        written_back = (is_due & (held >= due_values.stop)).unsqueeze(-1)
        new_ring = torch.where(written_back, decoded.to(key_residual.dtype), new_ring)

    codes, key_scale_due, key_zero_point_due = coded_keys
    write_keys(
        codes.flatten(2, 3), key_scale_due, key_zero_point_due, due_keys, group_size, key_bits,
        key_codes, key_scale, key_zero_point, new_order,
    )  # fmt: skip
    write_values(
        value_codes_due.flatten(-2), scale, zero_point, due_values, value_bits,
        value_codes, value_scale, value_zero_point,
    )  # fmt: skip
    key_residual.copy_(new_ring)
    value_residual.copy_(torch.where(is_new.unsqueeze(-1), new_value, value_residual))
    residual_valid.copy_(torch.where(is_new, valid.index_select(1, newest), residual_valid))
    if key_order is not None and new_order is not None:
        key_order.copy_(new_order)
    for storage, contents in pool_updates:
        storage.copy_(contents)


def _replace_rows(rows: Tensor, kept: Tensor, mean_of: Tensor, group_size: int) -> Tensor:
    # rows [batch, heads, tokens, head_dim]: those not kept become the mean of their group's `mean_of`, or 0.
    grouped = rows.unflatten(2, (-1, group_size))
    members = mean_of.unflatten(2, (-1, group_size)).unsqueeze(-1)
    total = torch.where(members, grouped, 0.0).sum(3, keepdim=True)
    mean = total / members.sum(3, keepdim=True).clamp(min=1)
    return torch.where(kept.unflatten(2, (-1, group_size)).unsqueeze(-1), grouped, mean).flatten(2, 3)


def append_to_ring(
    key: Tensor, value: Tensor, valid: Tensor | None, lengths: Tensor, site: int, state: Mapping[str, Any]
) -> None:
    """`append` of tokens that make nothing due: they go to the ring, nothing else changes.

    Args:
        key: [batch, heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        valid: bool [batch, q_len], False for padding, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        state: keyword operands of `append`; the ring is written.
    """
    row = (lengths[site, 0] + torch.arange(key.shape[2], device=key.device)) % state["key_residual"].shape[2]
    rows = [key, value]
    if state.get("key_residual_scale") is not None:
        # Both at once: of one token, calls take longer than arithmetic.
        codes, scales = encode_rows(torch.stack(rows))
        rows = [*codes]
        for role, scale in zip(ROLES, scales, strict=True):
            state[f"{role}_residual_scale"].index_copy_(2, row, scale)
    for role, stored in zip(ROLES, rows, strict=True):
        state[f"{role}_residual"].index_copy_(2, row, stored)
    if valid is None:
        state["residual_valid"].index_fill_(1, row, 1)
    else:
        state["residual_valid"].index_copy_(1, row, valid.to(torch.uint8))
