"""Forgetting the end of a sequence in paged affine storage: docs/storage.md, *rewind*."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ottfx.affine_read import read_tokens
from ottfx.schemes.base import Role
from ottfx.window_rows import encode_rows, present


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
    their dequantized values, those kept apart as they were kept, and count as real: whether they were padding is no
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
