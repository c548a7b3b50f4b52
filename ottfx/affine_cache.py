"""Append of paged affine storage in plain torch: the definition of what `kivi` and `ott` store, and their CPU path.

Layout and rules: `docs/storage.md`. Every function is traceable with a symbolic q_len and batch and with an unbacked
number of pages: positions are device tensors, and sizes follow from q_len alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ottfx.outlier_pool import trace_outliers
from ottfx.reference import dequantize_affine, make_finite, pack_page, quantize_affine, unpack_page
from ottfx.schemes.base import PAGE


def token_validity(mask: Tensor | None, q_len: int, batch_size: int) -> Tensor | None:
    """Say which of the new tokens are real, from the last query row of an attention mask.

    Args:
        mask: bool (True = attend) or additive float [batch_size or 1, heads or 1, queries, past + q_len], or None.
        q_len: new tokens; the last columns of the mask.
        batch_size: rows of the result.

    Returns:
        bool [batch_size, q_len], True where any head may attend; None if `mask` is None (all are real).
    """
    if mask is None:
        return None
    last = mask.select(2, -1).narrow(-1, mask.shape[-1] - q_len, q_len)
    if mask.dtype != torch.bool:
        last = last > torch.finfo(mask.dtype).min / 2
    return last.any(1).expand(batch_size, q_len)


def packed_after(length: Tensor, packed_before: Tensor, window: int, step: int) -> Tensor:
    """Return how many tokens are codes once `length` are stored: int64 scalar, see Schedule in docs/storage.md."""
    due = torch.div(length - window, step, rounding_mode="floor") * step
    return torch.maximum(packed_before, due)


def ring_positions(length: Tensor, rows: int) -> Tensor:
    """Return int64 [rows]: the newest token before `length` that lives in each ring row; negative where none does."""
    row = torch.arange(rows, device=length.device)
    return length - 1 - torch.remainder(length - 1 - row, rows)


class Due(NamedTuple):
    """A range of tokens that one call packs: positions `start .. stop - 1`, at most `bound` of them."""

    start: Tensor
    stop: Tensor
    bound: int
    step: int

    def pages(self, capacity: int) -> Tensor:
        """Return int64 indices of the pages that the range can touch. The last page may repeat."""
        count = (self.bound + 2 * PAGE - 1 - math.gcd(self.step, PAGE)) // PAGE
        first = torch.div(self.start, PAGE, rounding_mode="floor")
        return (first + torch.arange(count, device=self.start.device)).clamp(max=capacity - 1)

    def offsets(self) -> Tensor:
        """Return int64 [bound], positions of the range's tokens; those from `stop` on are not due."""
        return self.start + torch.arange(self.bound, device=self.start.device)

    def locate(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return (bool: `position` is due, int64: its offset from `start`, clamped into the range)."""
        is_due = (position >= self.start) & (position < self.stop)
        return is_due, (position - self.start).clamp(0, self.bound - 1)


def due_range(past: Tensor, packed: Tensor, q_len: int, window: int, step: int) -> Due:
    """Return what becomes due when `q_len` tokens follow `past`, of which `packed` are codes already."""
    bound = ((q_len + step - 1) // step) * step
    return Due(packed, packed_after(past + q_len, packed, window, step), bound, step)


def gather_window(ring: Tensor, new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    """Take tokens by absolute position: from the ring before `past`, from the new tokens after.

    Args:
        ring: [batch, heads, ring rows, head_dim].
        new: [batch, heads, q_len, head_dim].
        past: int64 scalar.
        position: int64 [tokens]; what lies past the new tokens yields some token.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    rows = ring.shape[2]
    index = torch.where(position < past, torch.remainder(position, rows), rows + position - past)
    return torch.cat([ring, new], dim=2).index_select(2, index.clamp(max=rows + new.shape[2] - 1))


def _merge_pages(storage: Tensor, pages: Tensor, is_due: Tensor, fresh: Tensor) -> None:
    # A repeated page gets the same contents twice.
    storage.index_copy_(2, pages, torch.where(is_due, fresh, storage.index_select(2, pages)))


def _merge_codes(storage: Tensor, pages: Tensor, is_due: Tensor, fresh: Tensor, bits: int) -> None:
    old = unpack_page(storage.index_select(2, pages), bits, *fresh.shape[-2:])
    storage.index_copy_(2, pages, pack_page(torch.where(is_due, fresh, old), bits))


def write_keys(
    codes: Tensor, scale: Tensor, zero_point: Tensor, due: Due, group_size: int, bits: int,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor,
) -> None:  # fmt: skip
    """Write the codes and constants of the due key groups into their pages, in place.

    Args:
        codes: uint8 [batch, heads, bound, head_dim].
        scale: fp16 [batch, heads, bound / group_size, head_dim]; `zero_point` alike.
        zero_point: see `scale`.
        due: the range of tokens.
        group_size: tokens of a group.
        bits: width of a code.
        key_codes: the storage, as in docs/storage.md; so are `key_scale` and `key_zero_point`.
        key_scale: see `key_codes`.
        key_zero_point: see `key_codes`.
    """
    batch, heads, _, head_dim = codes.shape
    pages = due.pages(key_codes.shape[2])
    start = (pages * PAGE).unsqueeze(-1)
    is_due, offset = due.locate(start + torch.arange(PAGE, device=pages.device))
    fresh = codes.index_select(2, offset.reshape(-1)).reshape(batch, heads, -1, PAGE, head_dim)
    _merge_codes(key_codes, pages, is_due.unsqueeze(-1), fresh, bits)

    is_due, offset = due.locate(start + torch.arange(0, PAGE, group_size, device=pages.device))
    group = torch.div(offset, group_size, rounding_mode="floor").reshape(-1)
    for storage, fresh in ((key_scale, scale), (key_zero_point, zero_point)):
        paged = fresh.index_select(2, group).reshape(batch, heads, -1, PAGE // group_size, head_dim)
        _merge_pages(storage, pages, is_due.unsqueeze(-1), paged)


def write_values(
    codes: Tensor, scale: Tensor, zero_point: Tensor, due: Due, bits: int,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor,
) -> None:  # fmt: skip
    """Write the codes and constants of the due value tokens into their pages, in place.

    Args:
        codes: uint8 [batch, heads, bound, head_dim].
        scale: fp16 [batch, heads, bound, value groups], marks included; `zero_point` alike.
        zero_point: see `scale`.
        due: the range of tokens.
        bits: width of a code.
        value_codes: the storage, as in docs/storage.md; so are `value_scale` and `value_zero_point`.
        value_scale: see `value_codes`.
        value_zero_point: see `value_codes`.
    """
    batch, heads = codes.shape[:2]
    pages = due.pages(value_codes.shape[2])
    is_due, offset = due.locate((pages * PAGE).unsqueeze(-1) + torch.arange(PAGE, device=pages.device))
    is_due, offset = is_due.unsqueeze(1), offset.reshape(-1)

    def paged(fresh: Tensor) -> Tensor:
        rows = fresh.index_select(2, offset).reshape(batch, heads, -1, PAGE, fresh.shape[-1])
        return rows.transpose(-1, -2)

    _merge_codes(value_codes, pages, is_due, paged(codes), bits)
    _merge_pages(value_scale, pages, is_due, paged(scale))
    _merge_pages(value_zero_point, pages, is_due, paged(zero_point))


def _quantize_keys(
    key: Tensor, kept: Tensor, mean_of: Tensor, in_range: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = make_finite(key).unflatten(2, (-1, group_size))
    mean = _group_mean(grouped, mean_of.unflatten(2, (-1, group_size)))
    rows = torch.where(kept.unflatten(2, (-1, group_size)).unsqueeze(-1), grouped, mean)
    taking_part = in_range.unflatten(2, (-1, group_size)).unsqueeze(-1)
    codes, scale, zero_point = quantize_affine(rows, bits, dim=3, taking_part=taking_part)
    return codes.flatten(2, 3), scale, zero_point


def _group_mean(grouped: Tensor, members: Tensor) -> Tensor:
    total = torch.where(members.unsqueeze(-1), grouped, 0.0).sum(3, keepdim=True)
    return total / members.sum(3, keepdim=True).clamp(min=1).unsqueeze(-1)


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
    value_zero_point: Tensor,
    value_residual: Tensor,
    outlier_key: Tensor | None = None,
    outlier_position: Tensor | None = None,
    outlier_value: Tensor | None = None,
    value_outlier_position: Tensor | None = None,
    spill_count: Tensor | None = None,
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
        value_zero_point: state.
        value_residual: state.
        outlier_key: state of the pool; all five or none.
        outlier_position: state of the pool.
        outlier_value: state of the pool.
        value_outlier_position: state of the pool.
        spill_count: state of the pool.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        group_size: tokens of a key group.
        key_window: tokens that stay in full precision, by the schedule of the keys.
        key_step: tokens that are packed together.
        value_window: `key_window` of the values.
        value_step: `key_step` of the values.
        outlier_capacity: seats of the pool; 0 traces nothing.
        score_norm: 1 or 2.
        replacement: "rest" or "group": whose mean stands in an outlier's slot.
        mask_replaced: whether such slots are marked as not attended.
    """
    batch, _, q_len, _ = key.shape
    past, key_packed, value_packed = lengths[site].unbind()
    if valid is None:
        valid = torch.ones(batch, q_len, dtype=torch.bool, device=key.device)
    due_keys = due_range(past, key_packed, q_len, key_window, key_step)
    due_values = due_range(past, value_packed, q_len, value_window, value_step)
    validity = residual_valid.unsqueeze(1).unsqueeze(-1)
    new_validity = valid.to(residual_valid.dtype).unsqueeze(1).unsqueeze(-1)

    window_key = gather_window(key_residual, key, past, due_keys.offsets())
    window_value = gather_window(value_residual, value, past, due_values.offsets())
    real_keys = gather_window(validity, new_validity, past, due_keys.offsets()).squeeze(-1) != 0
    real_values = gather_window(validity, new_validity, past, due_values.offsets()).squeeze(-1) != 0
    groups = ((q_len + key_step - 1) // key_step) * (key_step // group_size)

    kept = mean_of = in_range = real_keys
    value_rows, marked, update = make_finite(window_value), None, None
    if outlier_capacity and outlier_key is not None:
        # Keys and values become due together here, so one window serves both.
        group_end = due_keys.start + group_size * torch.arange(1, groups + 1, device=key.device)
        update = trace_outliers(
            window_key, window_value, real_keys.squeeze(1), group_end <= due_keys.stop, due_keys.start,
            outlier_key, outlier_value, outlier_position, spill_count,
            capacity=outlier_capacity, group_size=group_size, score_norm=score_norm,
        )  # fmt: skip
        kept = real_keys & ~update.is_outlier
        mean_of, in_range = (kept, kept) if replacement == "rest" else (real_keys, real_keys)
        grouped = value_rows.unflatten(2, (-1, group_size))
        mean = _group_mean(grouped, mean_of.expand_as(kept).unflatten(2, (-1, group_size)))
        kept_rows = kept.unflatten(2, (-1, group_size)).unsqueeze(-1)
        value_rows = torch.where(kept_rows, grouped, mean).flatten(2, 3)
        marked = update.is_outlier if mask_replaced else None

    coded_keys = _quantize_keys(window_key, kept, mean_of, in_range, group_size, key_bits)
    value_groups = value_scale.shape[3]
    codes, scale, zero_point = quantize_affine(
        value_rows.unflatten(-1, (value_groups, -1)), value_bits, taking_part=real_values.unsqueeze(-1).unsqueeze(-1)
    )
    if marked is not None:
        first_group = torch.arange(value_groups, device=key.device) == 0
        scale = torch.where(marked.unsqueeze(-1) & first_group, -scale, scale)

    held = ring_positions(past + q_len, key_residual.shape[2])
    is_new, newest = held >= past, (held - past).clamp(0, q_len - 1)
    new_ring = torch.where(is_new.unsqueeze(-1), key.index_select(2, newest), key_residual)
    if (key_window, key_step) != (value_window, value_step):
        is_due, offset = due_keys.locate(held)
        decoded = _dequantize_keys(*coded_keys, group_size).index_select(2, offset).to(key_residual.dtype)
        new_ring = torch.where((is_due & (held >= due_values.stop)).unsqueeze(-1), decoded, new_ring)

    write_keys(*coded_keys, due_keys, group_size, key_bits, key_codes, key_scale, key_zero_point)
    write_values(codes.flatten(-2), scale, zero_point, due_values, value_bits, value_codes, value_scale, value_zero_point)
    key_residual.copy_(new_ring)
    value_residual.copy_(torch.where(is_new.unsqueeze(-1), value.index_select(2, newest), value_residual))
    residual_valid.copy_(torch.where(is_new, valid.index_select(1, newest).to(residual_valid.dtype), residual_valid))
    if update is not None:
        outlier_key.copy_(update.key)
        outlier_value.copy_(update.value)
        outlier_position.copy_(update.position)
        value_outlier_position.copy_(update.position)
        spill_count.copy_(update.spill_count)


def _dequantize_keys(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    return dequantize_affine(codes.unflatten(2, (-1, group_size)), scale, zero_point, dim=3).flatten(2, 3)
