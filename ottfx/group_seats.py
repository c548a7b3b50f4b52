"""Seats of groups in plain torch: each key group keeps its tokens of least norm apart (docs/storage.md, *Group seats*).

A pool of outlier tokens holds the lowest of a whole text, so whoever comes later must be lower than all before. Tokens
that attract attention come again and again, though: a group that keeps its own lowest loses no more at the end of a
long text than at its beginning. Traceable, as `ottfx/affine_cache.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ottfx.affine_pages import merge_pages
from ottfx.affine_schedule import Due
from ottfx.outlier_pool import token_scores
from ottfx.schemes.base import PAGE
from ottfx.window_rows import decode_rows, encode_rows

NOBODY = -1
"""The row of a seat that no token has."""


class Seats(NamedTuple):
    """Which tokens of consecutive groups have a seat."""

    is_seated: Tensor
    """bool [batch, heads, tokens]."""
    offset: Tensor
    """int64 [batch, heads, groups, seats]: the token of each seat, counted from the first of its group."""
    taken: Tensor
    """bool [batch, heads, groups, seats]: False where a group has fewer real tokens than seats."""


def choose_seats(key: Tensor, real: Tensor, group_size: int, seats: int, score_norm: int) -> Seats:
    """Give the seats of each group to its real tokens of least norm, of equals to the first.

    Args:
        key: [batch, heads, groups * group_size, head_dim].
        real: bool [batch, tokens]; padding gets no seat.
        group_size: tokens of a group.
        seats: seats of a group.
        score_norm: 1 or 2.
    """
    scores = torch.where(real.unsqueeze(1), token_scores(key, score_norm), torch.inf).unflatten(2, (-1, group_size))
    score, offset = (ranked[..., :seats] for ranked in scores.sort(dim=-1, stable=True))
    taken = score < torch.inf
    is_seated = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, offset, taken)
    return Seats(is_seated.flatten(2, 3), offset, taken)


def write_seats(
    rows: Tensor, seats: Seats, due: Due, group_size: int, seat_codes: Tensor, seat_scale: Tensor, seat_row: Tensor
) -> None:
    """Write the seats of the due groups of one half into their pages, in place.

    Args:
        rows: [batch, heads, groups * group_size, head_dim]: keys or values of the tokens from the first due one on.
        seats: what `choose_seats` decided.
        due: the range of tokens.
        group_size: tokens of a group.
        seat_codes: the storage, as in docs/storage.md; so are `seat_scale` and `seat_row`.
        seat_scale: see `seat_codes`.
        seat_row: see `seat_codes`.
    """
    batch, heads, groups, of_group = seats.offset.shape
    head_dim = rows.shape[-1]
    index = seats.offset + group_size * torch.arange(groups, device=rows.device).unsqueeze(-1)
    index = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)
    taken_rows = torch.where(seats.taken.flatten(2).unsqueeze(-1), rows.gather(2, index), 0.0)
    codes, scale = encode_rows(taken_rows.unflatten(2, (groups, of_group)))
    first_row = torch.remainder(due.start + group_size * torch.arange(groups, device=rows.device), PAGE)
    row = torch.where(seats.taken, first_row.unsqueeze(-1) + seats.offset, NOBODY).to(seat_row.dtype)

    is_due, offset = due.locate_in_pages(group_size)
    is_due = is_due.unsqueeze(-1).expand(-1, -1, of_group).flatten(1)
    group = torch.div(offset, group_size, rounding_mode="floor").reshape(-1)
    of_page = seat_row.shape[3]

    def paged(fresh: Tensor) -> Tensor:
        return fresh.index_select(2, group).reshape(batch, heads, -1, of_page, *fresh.shape[4:])

    merge_pages(seat_codes, due.pages, is_due.unsqueeze(-1), paged(codes))
    merge_pages(seat_scale, due.pages, is_due, paged(scale))
    merge_pages(seat_row, due.pages, is_due, paged(row))


def seat_positions(seat_row: Tensor, first_page: int = 0) -> Tensor:
    """Return the position of the token of each seat, int64 [batch, heads, pages * seats]; -1 where a seat is free.

    Behind the packed tokens seats mean nothing.

    Args:
        seat_row: int8 [batch, heads, pages, seats of a page].
        first_page: the number of the first page.
    """
    page = first_page + torch.arange(seat_row.shape[2], device=seat_row.device)
    row = seat_row.long()
    return torch.where(row == NOBODY, -1, row + PAGE * page.unsqueeze(-1)).flatten(2, 3)


def seat_rows(seat_codes: Tensor, seat_scale: Tensor) -> Tensor:
    """Return what the seats of pages hold, fp32 [batch, heads, pages * seats, head_dim].

    Args:
        seat_codes: int8 [batch, heads, pages, seats of a page, head_dim].
        seat_scale: fp16 [batch, heads, pages, seats of a page].
    """
    return decode_rows(seat_codes, seat_scale).flatten(2, 3)
