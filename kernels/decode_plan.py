"""Sizes of the decode kernel by shape: a table found by measurement on an H100, not by tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from ottfx.kernels.launch import at_most, next_power_of_2
from ottfx.kernels.packing import PAGE

MOST_ROWS = 64
"""Query rows of one kv head up to which the decode kernel is used."""
K_WIDTH = 4 if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 8) else 2
"""Neighbours along the contraction that this Triton gives a lane when an operand comes from `tl.join`."""
TILE = 64
"""Tokens of a step of the kernel: half a page."""
MULTIPROCESSORS = 132
LEAN_REGISTERS = 168
"""Registers of a program that leave room for 12 on a multiprocessor; the other configurations take 255, for 8."""
WINDOW_SHARE = 64
"""Tokens of the ring that a program reads, or more where there are programs enough without."""
SEATS_OF_A_SHARE = 24
"""Shares of the codes, times the seats of a page, for which one more program reads rows of 8 bits."""
TILES_OF_OVERHEAD = 2
"""What starting a program and joining its part cost, in tiles of work."""
OVERHEAD_WHEN_FULL = 9
"""The same where there are programs enough without: those that read the window fill a last round of few."""
JOINED_IN_A_TILE = 64
"""Parts of a row, all of whose channels one program joins and rotates back, that take as long as a tile of work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """How a call of the decode kernel is cut into programs of one warp."""

    single: bool
    """One query row: it stands in all columns, and every column takes its own tokens."""
    columns: int
    """Query rows of a program: 8 or 16."""
    block_d: int
    """Channels, padded to a power of two."""
    row_blocks: Any
    splits: Any
    """Programs that share the packed tokens of one (sequence, kv head)."""
    seat_parts: Any
    """Programs that share its seats, where those are read apart."""
    window_parts: Any
    """Programs that share its window, and its seats otherwise."""
    most_parts: int
    """An upper bound of all these that is no symbol."""
    max_registers: int | None


def decode_plan(
    *,
    pairs: Any,
    num_kv_heads: int,
    rows: Any,
    head_dim: int,
    bits: tuple[int, int],
    group_size: int,
    ring_rows: int,
    pages: Any,
    page_seats: int = 0,
    coded_window: bool = False,
    rotated: bool = False,
) -> DecodePlan:
    """Choose the sizes for a shape.

    Args:
        pairs: sequences times kv heads; may be symbolic, as may `rows` and `pages`.
        num_kv_heads: kv heads of one sequence.
        rows: query rows of one kv head, at most `MOST_ROWS`.
        head_dim: channels.
        bits: widths of key and value codes.
        group_size: tokens of a key group.
        ring_rows: tokens of the full-precision window.
        pages: capacity of the cache.
        page_seats: seats of groups in a page.
        coded_window: whether the window is in 8 bits, as seats are, so that both are read in one way.
        rotated: whether the combination of the parts rotates values back.
    """
    single = at_most(rows, 1)
    columns = 8 if at_most(rows, 8) else 16
    row_blocks = -(-rows // columns)
    lean = bits == (2, 2) and head_dim <= 128 and group_size >= TILE and columns == 8
    slots = MULTIPROCESSORS * (12 if lean else 8)
    programs = pairs * row_blocks
    if isinstance(programs, int) and isinstance(pages, int):
        splits = best_splits(programs, pages * (PAGE.value // TILE), slots, rotated)
        most_splits = splits
    else:
        splits = torch.sym_max(1, slots // programs)
        most_splits = max(slots // num_kv_heads, 1)
    parts = window_parts(programs, ring_rows, slots)
    most_parts = parts if isinstance(parts, int) else window_parts(1, ring_rows, slots)
    shares, most_shares = (n * page_seats // SEATS_OF_A_SHARE for n in (splits, most_splits))
    apart = page_seats > 0 and not coded_window
    return DecodePlan(
        single=single,
        columns=columns,
        block_d=max(next_power_of_2(head_dim), 64),
        row_blocks=row_blocks,
        splits=splits,
        seat_parts=1 + shares if apart else 0,
        window_parts=parts if apart else parts + shares,
        most_parts=most_splits + most_parts + most_shares + int(apart),
        max_registers=LEAN_REGISTERS if lean else None,
    )


@lru_cache(maxsize=256)
def best_splits(programs: int, tiles: int, slots: int, rotated: bool) -> int:
    """Return into how many shares to cut `tiles` of each of `programs`, of which `slots` run at once."""
    joining = 1 / JOINED_IN_A_TILE if rotated else 0.0
    overhead = OVERHEAD_WHEN_FULL if programs >= slots else TILES_OF_OVERHEAD

    def time(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-tiles // splits) + overhead) + splits * joining

    return min(range(1, max(1, min(tiles, 4 * slots // programs, slots)) + 1), key=time)


def window_parts(programs: Any, ring_rows: int, slots: int) -> Any:
    """Return into how many shares to cut the ring of each of `programs`, of which `slots` run at once."""
    return torch.sym_max(1, torch.sym_min(-(-ring_rows // WINDOW_SHARE), slots // programs))
