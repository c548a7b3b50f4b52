"""Reading paged affine storage in plain torch: attention over it, and dense copies of it.

Layout and rules: `docs/storage.md`. `attend` is traceable like `affine_cache.append`; it reads only the pages that
`past_length` can use, or all of them where only the device knows the length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ottfx.affine_grids import in_natural_order, read_key_pages, read_value_pages
from ottfx.affine_schedule import ring_positions
from ottfx.group_seats import seat_positions, seat_rows
from ottfx.masked_softmax import additive_mask, softmax_or_zero
from ottfx.mixed_words import known_order
from ottfx.schemes.base import ANY_LENGTH, PAGE, Role, is_always, new_positions
from ottfx.window_rows import decode_rows, present


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
        seat_key: state of the seats of groups; all five or none.
        seat_key_scale: state of the seats.
        seat_row: state of the seats.
        seat_value: state of the seats.
        seat_value_scale: state of the seats.
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
        key_order,
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
    # Those kept apart, each with positions of its own for every head: the pool, or the seats.
    apart: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    if outlier_position is not None and outlier_position.shape[2] > 0:
        assert outlier_key is not None and outlier_value is not None
        apart.append((outlier_key.float(), outlier_value.float(), outlier_position.long(), past))
    if seat_row is not None:
        assert seat_key is not None and seat_key_scale is not None
        assert seat_value is not None and seat_value_scale is not None
        seated_key, seated_value = (
            seat_rows(codes.index_select(2, pages), scale_of_row.index_select(2, pages))
            for codes, scale_of_row in ((seat_key, seat_key_scale), (seat_value, seat_value_scale))
        )
        apart.append((seated_key, seated_value, seat_positions(seat_row.index_select(2, pages)), packed))
    for apart_key, apart_value, position, end in apart:
        seen = (position >= 0) & (position < end)
        keys.append(torch.where(seen.unsqueeze(-1), apart_key, 0.0))
        values.append(torch.where(seen.unsqueeze(-1), apart_value, 0.0))
        visible.append(seen)

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
        if apart:
            by_head = bias.expand(batch, num_kv_heads, -1, -1, -1)
            parts = [part.expand(batch, num_kv_heads, -1, -1, -1) for part in parts]
            for _, _, position, _ in apart:
                column = position.clamp(0, columns - 1).unsqueeze(2).unsqueeze(2)
                parts.append(by_head.gather(-1, column.expand(-1, -1, by_head.shape[2], by_head.shape[3], -1)))
        scores = scores + torch.cat(parts, dim=-1)

    weights = softmax_or_zero(scores)
    result = weights.flatten(2, 3) @ torch.cat(values, dim=2)
    return result.reshape(query.shape).to(result_dtype or query.dtype)


def read_tokens(role: Role, state: Mapping[str, Tensor], bits: int, packed: int, start: int, stop: int) -> Tensor:
    """Return the tokens `start .. stop - 1` of one half, dense and in logical dtype.

    Args:
        role: which half `state` is.
        state: its tensors by name. Tokens of the outlier pool, or with a seat, get what is kept of them there.
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
        order = None if order is None or order.shape[-1] == 0 else order
        coded = read_key_pages(codes, scale, zero_point, bits, order)
        coded = coded if order is None else in_natural_order(coded, order)
    else:
        coded = read_value_pages(codes, scale, zero_point if zero_point.shape[3] else None, bits)
    coded = coded.narrow(2, start - first_page * PAGE, stop - start).to(dtype)
    position = torch.arange(start, stop, device=coded.device)
    row = torch.remainder(position, residual.shape[2])
    ring = decode_rows(
        residual.index_select(2, row), row_scale if row_scale is None else row_scale.index_select(2, row)
    )
    dense = torch.where((position >= packed).unsqueeze(-1), ring.to(dtype), coded)
    if f"outlier_{role}" in state:
        pool_position = state["outlier_position" if role == "key" else "value_outlier_position"].long()
        dense = _put_rows(dense, start, stop, state[f"outlier_{role}"], pool_position)
    seat_row = state.get("seat_row" if role == "key" else "value_seat_row")
    if seat_row is not None and seat_row.shape[3]:
        seated = seat_rows(*(state[f"seat_{role}{what}"].narrow(2, first_page, count) for what in ("", "_scale")))
        seat_position = seat_positions(seat_row.narrow(2, first_page, count), first_page)
        dense = _put_rows(dense, start, min(stop, packed), seated.to(dtype), seat_position)
    return dense


def _put_rows(dense: Tensor, start: int, stop: int, rows: Tensor, position: Tensor) -> Tensor:
    # `dense` from token `start` on, with rows that have their positions in `start .. stop - 1` in their places.
    tokens = dense.shape[2]
    wanted = (position >= start) & (position < stop)
    # One more row takes those that are not wanted.
    target = torch.where(wanted, position - start, tokens).unsqueeze(-1).expand(rows.shape)
    extended = torch.cat([dense, dense.new_zeros(*dense.shape[:2], 1, dense.shape[3])], dim=2)
    return extended.scatter(2, target, rows).narrow(2, 0, tokens)
