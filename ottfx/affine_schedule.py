"""When tokens of paged affine storage become codes, and where they are until then (docs/storage.md, *Schedule*)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ottfx.schemes.base import PAGE


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
    pages: Tensor
    """int64 indices of the pages that the range can touch; the last may repeat."""

    def offsets(self) -> Tensor:
        """Return int64 [bound], positions of the range's tokens; those from `stop` on are not due."""
        return self.start + torch.arange(self.bound, device=self.start.device)

    def locate(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return (bool: `position` is due, int64: its offset from `start`, clamped into the range)."""
        is_due = (position >= self.start) & (position < self.stop)
        return is_due, (position - self.start).clamp(0, self.bound - 1)

    def locate_in_pages(self, spacing: int) -> tuple[Tensor, Tensor]:
        """`locate` every `spacing`-th token of the pages: [pages, PAGE / spacing]."""
        return self.locate((self.pages * PAGE).unsqueeze(-1) + torch.arange(0, PAGE, spacing, device=self.pages.device))


def due_range(past: Tensor, packed: Tensor, q_len: int, window: int, step: int, capacity: int) -> Due:
    """Return what becomes due when `q_len` tokens follow `past`, of which `packed` are codes already.

    `capacity` counts the pages of the storage. Both bounds, on tokens and on pages, follow from `q_len` alone.
    """
    bound = ((q_len + step - 1) // step) * step
    count = (bound + 2 * PAGE - 1 - math.gcd(step, PAGE)) // PAGE
    first = torch.div(packed, PAGE, rounding_mode="floor")
    pages = (first + torch.arange(count, device=past.device)).clamp(max=capacity - 1)
    return Due(packed, packed_after(past + q_len, packed, window, step), bound, pages)


def window_index(position: Tensor, past: Tensor, ring_rows: int, q_len: int) -> Tensor:
    """Locate absolute positions int64 [tokens] in the ring rows followed by the new tokens.

    `past` is the int64 scalar count of tokens before the new ones. What lies past the new tokens yields some token.
    """
    index = torch.where(position < past, torch.remainder(position, ring_rows), ring_rows + position - past)
    return index.clamp(max=ring_rows + q_len - 1)


def anything_due(lengths: Tensor, site: int, q_len: int, options: Mapping[str, Any]) -> bool:
    """Whether an append of `q_len` tokens packs anything. Reads `lengths`, so only where the host may wait for it.

    Args:
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        q_len: new tokens.
        options: keyword operands of `append`; the schedule is read.
    """
    past, key_packed, value_packed = lengths[site].tolist()
    return any(
        (past + q_len - options[f"{role}_window"]) // options[f"{role}_step"] * options[f"{role}_step"] > packed
        for role, packed in (("key", key_packed), ("value", value_packed))
    )
