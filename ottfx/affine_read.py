"""Reading paged affine storage in plain torch: attention over it, dense copies of it, and forgetting its end.

Layout and rules: `docs/storage.md`. `attend` is traceable like `affine_cache.append`; it reads only the pages that
`past_length` can use, or all of them where only the device knows the length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ottfx.affine_grids import in_natural_order, read_key_pages, read_value_pages
from ottfx.affine_schedule import ring_positions
from ottfx.masked_softmax import additive_mask, softmax_or_zero
from ottfx.mixed_words import known_order
from ottfx.schemes.base import ANY_LENGTH, PAGE, Role, is_always, new_positions
from ottfx.window_rows import decode_rows, encode_rows, present


def _mask_bias(mask: Tensor | None, num_kv_heads: int, groups: int) -> Tensor | None:
    # Additive fp32 [batch or 1, num_kv_heads or 1, groups or 1, queries, kv_len]; what a float mask hides is -inf.
    if mask is None:
        return None
    bias = additive_mask(mask)
    if bias.shape[1] == 1:
        return bias.unsqueeze(1)
    return bias.unflatten(1, (num_kv_heads, groups))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    past_length: int,
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
    key_order: Tensor | None = None,
    key_residual_scale: Tensor | None = None,
    value_residual_scale: Tensor | None = None,
    key_bits: int,
    value_bits: int,
    result_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attend over the stored past and the new tokens: the section *attend* of docs/storage.md, in fp32.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        key: new tokens [batch, num_kv_heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, 4-D with past + q_len columns or more, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        past_length: tokens stored, the number in `lengths`, or `ANY_LENGTH`; bounds the pages that are read.
        softmax_scale: factor on query @ key^T.
        key_codes: state before the append, as all tensors that follow; shapes in docs/storage.md.
        key_scale: state.
        key_zero_point: state.
        key_residual: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state, or None for grids around 0.
        value_residual: state.
        outlier_key: state of the pool; all three or none.
        outlier_position: state of the pool.
        outlier_value: state of the pool.
        key_order: state, if key codes are of mixed widths.
        key_residual_scale: state, if the window is in 8 bits; `value_residual_scale` alike.
        value_residual_scale: see `key_residual_scale`.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        result_dtype: of the result; that of `query` if None.

    Returns:
        The shape of `query`. A query that may see nothing gets 0.
    """
    batch, num_kv_heads, q_len, head_dim = key.shape
    groups = query.shape[1] // num_kv_heads
    past, _, packed = lengths[site].unbind()
    device = key.device

    # A slice of an unbacked axis has strides that a tracer cannot reason about; a selection is a new tensor.
    num_pages = key_codes.shape[2] if is_always(past_length, ANY_LENGTH) else past_length // PAGE + 1
    pages = torch.arange(num_pages, device=device)
    scale = value_scale.index_select(2, pages)
    slot = torch.arange(num_pages * PAGE, device=device)
    ring = ring_positions(past, key_residual.shape[2])
    in_ring = (ring >= packed).unsqueeze(-1)
    not_marked = ~torch.signbit(scale[:, :, :, 0]).flatten(2, 3)
    coded_keys = read_key_pages(
        key_codes.index_select(2, pages),
        key_scale.index_select(2, pages),
        key_zero_point.index_select(2, pages),
        key_bits,
        mixed=key_order is not None,
    )
    value_zeros = None if value_zero_point is None else value_zero_point.index_select(2, pages)
    coded_values = read_value_pages(value_codes.index_select(2, pages), scale, value_zeros, value_bits)
    ring_key, ring_value = (
        torch.where(in_ring, decode_rows(codes, scale_of_row).float(), 0.0)
        for codes, scale_of_row in ((key_residual, key_residual_scale), (value_residual, value_residual_scale))
    )
    keys, values = [ring_key, key.float()], [coded_values, ring_value, value.float()]
    visible = [
        not_marked & (slot < packed),
        in_ring.squeeze(-1).expand(batch, num_kv_heads, -1),
        torch.ones(batch, num_kv_heads, q_len, dtype=torch.bool, device=device),
    ]
    has_pool = outlier_position is not None and outlier_position.shape[2] > 0
    if has_pool:
        assert outlier_key is not None and outlier_position is not None and outlier_value is not None
        in_pool = (outlier_position >= 0) & (outlier_position < past)
        keys.append(torch.where(in_pool.unsqueeze(-1), outlier_key.float(), 0.0))
        values.append(torch.where(in_pool.unsqueeze(-1), outlier_value.float(), 0.0))
        visible.append(in_pool)

    rows = query.float().reshape(batch, num_kv_heads, groups * q_len, head_dim)
    stored_rows = rows
    if key_order is not None:
        stored_rows = rows.gather(-1, known_order(key_order).unsqueeze(2).expand(rows.shape))
    parts_of_scores = [stored_rows @ coded_keys.transpose(-1, -2), rows @ torch.cat(keys, dim=2).transpose(-1, -2)]
    scores = torch.cat(parts_of_scores, dim=-1) * softmax_scale
    scores = scores.reshape(batch, num_kv_heads, groups, q_len, -1)
    scores = torch.where(torch.cat(visible, dim=2).unsqueeze(2).unsqueeze(2), scores, -torch.inf)
    bias = _mask_bias(mask, num_kv_heads, groups)
    if bias is not None:
        columns = bias.shape[-1]
        parts = [
            bias.index_select(-1, slot.clamp(max=columns - 1)),
            bias.index_select(-1, ring.clamp(0, columns - 1)),
            bias.index_select(-1, new_positions(lengths, site, q_len)),
        ]
        if has_pool:
            assert outlier_position is not None
            by_head = bias.expand(batch, num_kv_heads, -1, -1, -1)
            position = outlier_position.long().clamp(min=0).unsqueeze(2).unsqueeze(2)
            pool_bias = by_head.gather(-1, position.expand(-1, -1, by_head.shape[2], by_head.shape[3], -1))
            parts = [part.expand(batch, num_kv_heads, -1, -1, -1) for part in parts] + [pool_bias]
        scores = scores + torch.cat(parts, dim=-1)

    weights = softmax_or_zero(scores)
    result = weights.flatten(2, 3) @ torch.cat(values, dim=2)
    return result.reshape(query.shape).to(result_dtype or query.dtype)


def read_tokens(role: Role, state: Mapping[str, Tensor], bits: int, packed: int, start: int, stop: int) -> Tensor:
    """Return the tokens `start .. stop - 1` of one half, dense and in logical dtype.

    Args:
        role: which half `state` is.
        state: its tensors by name. Tokens of the outlier pool, if it has one, get their exact values.
        bits: width of a code.
        packed: tokens that are codes; later ones are in the ring.
        start: first token.
        stop: end of the range.

    Returns:
        [batch, num_kv_heads, stop - start, head_dim].
    """
    residual, row_scale = state[f"{role}_residual"], present(state.get(f"{role}_residual_scale"))
    dtype = residual.dtype if row_scale is None else state[f"outlier_{role}"].dtype
    first_page = start // PAGE
    count = -(-stop // PAGE) - first_page
    codes, scale, zero_point = (
        state[f"{role}_{name}"].narrow(2, first_page, count) for name in ("codes", "scale", "zero_point")
    )
    # What a scheme has no use for has a size of 0.
    if role == "key":
        order = state.get("key_order")
        mixed = order is not None and order.shape[-1] > 0
        coded = read_key_pages(codes, scale, zero_point, bits, mixed=mixed)
        coded = in_natural_order(coded, order) if order is not None and mixed else coded
    else:
        coded = read_value_pages(codes, scale, zero_point if zero_point.shape[3] else None, bits)
    coded = coded.narrow(2, start - first_page * PAGE, stop - start).to(dtype)
    position = torch.arange(start, stop, device=coded.device)
    row = torch.remainder(position, residual.shape[2])
    ring = decode_rows(
        residual.index_select(2, row), row_scale if row_scale is None else row_scale.index_select(2, row)
    )
    dense = torch.where((position >= packed).unsqueeze(-1), ring.to(dtype), coded)
    if f"outlier_{role}" not in state:
        return dense
    pool = state[f"outlier_{role}"]
    pool_position = state["outlier_position" if role == "key" else "value_outlier_position"].long()
    wanted = (pool_position >= start) & (pool_position < stop)
    # One more row takes the tokens of the pool that are not wanted.
    target = torch.where(wanted, pool_position - start, stop - start).unsqueeze(-1).expand(pool.shape)
    extended = torch.cat([dense, dense.new_zeros(*dense.shape[:2], 1, dense.shape[3])], dim=2)
    return extended.scatter(2, target, pool).narrow(2, 0, stop - start)


def rewind(
    role: Role,
    state: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    capacity: int,
    packed: int,
    in_ring: int,
    length: int,
) -> int:
    """Forget the tokens from `length` on, in place; return how many of the rest are codes.

    The new packed length is a multiple of `group_size` for both halves, as keys may not be packed less than values.
    Tokens of a group that is cut are read from the ring again. Those whose rows were overwritten go back there as
    their dequantized values, pool tokens with their exact ones, and count as real: whether they were padding is no
    longer known. Tracing that has stopped stays so, unless nothing stays packed.

    Args:
        role: which half `state` is.
        state: its tensors by name.
        bits: width of a code.
        group_size: tokens of a key group.
        capacity: seats of the outlier pool.
        packed: tokens that are codes now.
        in_ring: how many of them, the newest, are in the ring, too.
        length: tokens that stay.
    """
    remaining = min(packed, length // group_size * group_size)
    if remaining == packed:
        return packed
    overwritten = min(packed - in_ring, length)
    if remaining < overwritten:
        residual = state[f"{role}_residual"]
        row = torch.remainder(torch.arange(remaining, overwritten, device=residual.device), residual.shape[2])
        rows = read_tokens(role, state, bits, packed, remaining, overwritten)
        row_scale = present(state.get(f"{role}_residual_scale"))
        if row_scale is not None:
            rows, scale = encode_rows(rows)
            row_scale.index_copy_(2, row, scale)
        residual.index_copy_(2, row, rows)
        if role == "key":
            state["residual_valid"].index_fill_(1, row, 1)
    if f"outlier_{role}" in state:
        _free_rows(role, state, capacity, remaining)
    return remaining


def _free_rows(role: Role, state: Mapping[str, Tensor], capacity: int, remaining: int) -> None:
    position = state["outlier_position" if role == "key" else "value_outlier_position"]
    rows = state[f"outlier_{role}"]
    kept = (position >= 0) & (position < remaining)
    # Rows that stay move up within the pool and within the spill pool; their order is the order of arrival.
    order = torch.cat(
        [
            part.logical_not().to(torch.uint8).argsort(dim=-1, stable=True) + offset
            for part, offset in ((kept[..., :capacity], 0), (kept[..., capacity:], capacity))
        ],
        dim=-1,
    )
    rows.copy_(rows.gather(2, order.unsqueeze(-1).expand(rows.shape)))
    position.copy_(torch.where(kept, position, -1).gather(-1, order))
    if role == "key":
        spill_count, limit = state["spill_count"], max(position.shape[-1] - capacity, 1)
        in_use = kept[..., capacity:].sum(-1).to(spill_count.dtype)
        stays_stopped = (spill_count >= limit) & (remaining > 0)
        spill_count.copy_(torch.where(stays_stopped, limit, in_use))
