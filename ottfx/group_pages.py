"""Storage by groups of tokens: keys in codes of a scheme's own, values in affine ones, both behind one window.

Layout: docs/storage.md, *Storage by groups*. A scheme gives functions that write and decode its keys; what is the same
for all of them is here. Plain torch, traceable with a symbolic q_len and batch and with an unbacked number of pages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ottfx.affine_cache import append_to_ring, token_validity
from ottfx.affine_grids import code_values, read_value_pages
from ottfx.affine_pages import merge_codes, merge_pages, write_values
from ottfx.affine_schedule import Due, anything_due, due_range, ring_positions, window_index
from ottfx.masked_softmax import additive_mask, softmax_or_zero
from ottfx.opaque_call import in_opaque_call
from ottfx.reference import make_finite
from ottfx.schemes.base import ANY_LENGTH, PAGE, is_always, new_positions


def real_tokens(mask: Tensor | None, lengths: Tensor, site: int, key: Tensor) -> Tensor | None:
    """Return bool [batch, q_len], which of the new tokens `key` are real, or None for all; `mask` as in `Scheme`."""
    if mask is None or mask.dim() == 2:
        return mask
    return token_validity(mask, lengths, site, key.shape[2], key.shape[0])


def append(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    lengths: Tensor,
    site: int,
    write_keys: Callable[[Tensor, Tensor, Due], None],
    *,
    key_residual: Tensor,
    residual_valid: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor,
    value_residual: Tensor,
    value_bits: int,
    step: int,
) -> None:
    """Store new tokens; once `step` of them have gathered in the window, all of them become codes.

    Args:
        key: [batch, heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        valid: bool [batch, q_len], False for padding, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        write_keys: stores the keys that are due: gets rows fp32 [batch, heads, bound, head_dim], finite, bool
            [batch, 1, bound] which of them are real, and the range of tokens.
        key_residual: state, mutated, as all tensors that follow; shapes in docs/storage.md.
        residual_valid: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state.
        value_residual: state.
        value_bits: width of a value code.
        step: tokens of the window.
    """
    batch, _, q_len, _ = key.shape
    if in_opaque_call():
        schedule = {"key_window": 0, "key_step": step, "value_window": 0, "value_step": step}
        if not anything_due(lengths, site, q_len, schedule):
            window = {"key_residual": key_residual, "value_residual": value_residual, "residual_valid": residual_valid}
            append_to_ring(key, value, valid, lengths, site, window)
            return
    past, packed, _ = lengths[site].unbind()
    if valid is None:
        valid = torch.ones(batch, q_len, dtype=torch.bool, device=key.device)
    valid = valid.to(residual_valid.dtype)
    rows = key_residual.shape[2]
    due = due_range(past, packed, q_len, 0, step, value_codes.shape[2])
    index = window_index(due.offsets(), past, rows, q_len)
    real = torch.cat([residual_valid, valid], dim=1).index_select(1, index).unsqueeze(1) != 0
    due_key, due_value = (
        make_finite(torch.cat([ring, new.to(ring.dtype)], dim=2).index_select(2, index))
        for ring, new in ((key_residual, key), (value_residual, value))
    )
    write_keys(due_key, real, due)
    due_value = torch.where(real.unsqueeze(-1), due_value, 0.0).unflatten(-1, (value_scale.shape[3], -1))
    codes, scale, zero_point = code_values(due_value, value_bits, symmetric=False, range_search=False)
    write_values(codes.flatten(-2), scale, zero_point, due, value_bits, value_codes, value_scale, value_zero_point)

    held = ring_positions(past + q_len, rows)
    is_new, newest = held >= past, (held - past).clamp(0, q_len - 1)
    for ring, new in ((key_residual, key), (value_residual, value)):
        ring.copy_(torch.where(is_new.unsqueeze(-1), new.index_select(2, newest), ring))
    residual_valid.copy_(torch.where(is_new, valid.index_select(1, newest), residual_valid))


def write_codes(storage: Tensor, codes: Tensor, due: Due, bits: int) -> None:
    """Write codes [batch, heads, due.bound, rows] into pages of words that run along the tokens, in place."""
    is_due, offset = due.locate_in_pages(1)
    paged = codes.index_select(2, offset.reshape(-1)).unflatten(2, (-1, PAGE)).transpose(-1, -2)
    merge_codes(storage, due.pages, is_due.unsqueeze(1), paged, bits)


def write_constants(storage: Tensor, constants: Tensor, due: Due, group_size: int) -> None:
    """Write what a group has in common, [batch, heads, due.bound / group_size, n], into its pages, in place."""
    is_due, offset = due.locate_in_pages(group_size)
    group = torch.div(offset, group_size, rounding_mode="floor").reshape(-1)
    paged = constants.index_select(2, group).unflatten(2, (-1, PAGE // group_size))
    merge_pages(storage, due.pages, is_due.unsqueeze(-1), paged)


def used_pages(storage: Tensor, past_length: int) -> Tensor:
    """Return the pages of `storage` that hold the first `past_length` tokens; all of them for `ANY_LENGTH`."""
    # A slice of an unbacked axis has strides that a tracer cannot reason about; a selection is a new tensor.
    number = storage.shape[2] if is_always(past_length, ANY_LENGTH) else past_length // PAGE + 1
    return storage.index_select(2, torch.arange(number, device=storage.device))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    past_length: int,
    softmax_scale: float,
    coded_key: Tensor,
    *,
    key_residual: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor,
    value_residual: Tensor,
    value_bits: int,
) -> Tensor:
    """Attend over packed tokens, the window and the new tokens, in fp32.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        key: new tokens [batch, num_kv_heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        past_length: tokens stored, or `ANY_LENGTH`.
        softmax_scale: factor on query @ key^T.
        coded_key: fp32 [batch, num_kv_heads, slots, head_dim]: the keys of the used pages.
        key_residual: state; shapes in docs/storage.md.
        value_codes: state.
        value_scale: state.
        value_zero_point: state.
        value_residual: state.
        value_bits: width of a value code.

    Returns:
        Shape and dtype of `query`. A query that may see nothing gets 0.
    """
    batch, num_kv_heads, q_len, head_dim = key.shape
    past, _, packed = lengths[site].unbind()
    slot = torch.arange(coded_key.shape[2], device=key.device)
    ring = ring_positions(past, key_residual.shape[2])
    position = torch.cat([slot, ring, new_positions(lengths, site, q_len)])
    seen = torch.cat([slot < packed, ring >= packed, torch.ones(q_len, dtype=torch.bool, device=key.device)])
    codes, scale, zero_point = (
        used_pages(tensor, past_length) for tensor in (value_codes, value_scale, value_zero_point)
    )
    coded_value = read_value_pages(codes, scale, zero_point, value_bits)
    # What lies in slots and rows without a token may be anything.
    keys, values = (
        torch.where(seen.unsqueeze(-1), torch.cat([coded, window.float(), new.float()], dim=2), 0.0)
        for coded, window, new in ((coded_key, key_residual, key), (coded_value, value_residual, value))
    )
    bias = torch.where(seen, 0.0, -torch.inf)
    if mask is not None:
        bias = bias + additive_mask(mask.index_select(-1, position.clamp(0, mask.shape[-1] - 1)))
    rows = query.float().reshape(batch, num_kv_heads, -1, head_dim)
    scores = (rows @ keys.transpose(-1, -2)).reshape(batch, query.shape[1], q_len, -1) * softmax_scale + bias
    weights = softmax_or_zero(scores)
    result = weights.reshape(batch, num_kv_heads, -1, values.shape[2]) @ values
    return result.reshape(query.shape).to(query.dtype)
