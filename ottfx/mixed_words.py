"""Words of 16 key channels in unequal widths: 4, 3, 2 and 1 bits, 2 on average, for channels ordered by their range.

A word of 2-bit codes has 16 channels of one token, one for each element. Here an element has a width of its own, the
same in every word, so a page is laid out, read and as large as one of 2-bit codes. The `key_order` of a head says which
channel is stored where: those with the widest ranges have the most bits. Layout and rules: docs/storage.md.

Source: reverse water-filling (Cover & Thomas, Elements of Information Theory, section 10.3.3): at one error, a channel
of twice the range takes one bit more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.reference import to_int32

ELEMENTS = 16
HALF_WIDTHS = (4, 3, 2, 1, 2, 2, 1, 1)
"""Bits of the elements of either half of a word, from its low end on. The first four fill the mantissa of a float16."""
AVERAGE_BITS = 2
WIDEST_BITS = max(HALF_WIDTHS)
_STARTS = tuple(sum(HALF_WIDTHS[:i]) for i in range(len(HALF_WIDTHS)))
WIDTHS = tuple(HALF_WIDTHS[i // 2] for i in range(ELEMENTS))
"""Bits of each element: even ones are in the low half, odd ones in the high half."""
POSITIONS = tuple(_STARTS[i // 2] + 16 * (i % 2) for i in range(ELEMENTS))
WIDEST_FIRST = tuple(sorted(range(ELEMENTS), key=lambda i: -WIDTHS[i]))
"""Elements by width; those of equal width in their order in the word."""
_RANKS = tuple(WIDEST_FIRST.index(2 * i) // 2 for i in range(ELEMENTS // 2))


def _of_halves(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # `values` (8, below 16) by element and which half that is in, both int64 [ELEMENTS]. The table is a number: a
    # program that is compiled ahead of time has no place for a tensor that was made of a list.
    element = torch.arange(ELEMENTS, device=device)
    place, half = element >> 1, element & 1
    table = sum(value << 4 * i for i, value in enumerate(values))
    return (torch.full_like(place, table) >> (4 * place)) & 15, half


def _highest_codes(device: torch.device) -> Tensor:
    # int64 [ELEMENTS]: the highest code of each element, which is also the mask of its bits.
    width = _of_halves(HALF_WIDTHS, device)[0]
    return (torch.ones_like(width) << width) - 1


def _positions(device: torch.device) -> Tensor:
    start, half = _of_halves(_STARTS, device)
    return start + 16 * half


def channel_levels(head_dim: int, device: torch.device) -> Tensor:
    """Return the highest code of each stored channel, float32 [head_dim]."""
    return _highest_codes(device).float().repeat(head_dim // ELEMENTS)


def order_channels(spread: Tensor) -> Tensor:
    """Say which channel is stored where.

    Args:
        spread: float32 [..., head_dim]: range of each channel; the widest get the most bits, ties the lower channel.

    Returns:
        int64 [..., head_dim]: stored channel -> channel.
    """
    head_dim = spread.shape[-1]
    strips = head_dim // ELEMENTS
    ranked = spread.sort(dim=-1, descending=True, stable=True).indices
    pair_rank, half = _of_halves(_RANKS, spread.device)
    strip = torch.arange(strips, device=spread.device)
    rank = (2 * pair_rank + half) * strips + strip.unsqueeze(1)
    return ranked.index_select(-1, rank.flatten())


def known_order(key_order: Tensor) -> Tensor:
    """Return an order that can be used as indices: int64, as they are where none was decided yet (-1)."""
    natural = torch.arange(key_order.shape[-1], device=key_order.device)
    return torch.where(key_order < 0, natural, key_order.long())


def pack_mixed(codes: Tensor) -> Tensor:
    """Pack pages of mixed codes.

    Args:
        codes: uint8 [..., tokens, head_dim], stored channels; the code of channel `s` below 2**WIDTHS[s % 16].

    Returns:
        int32 [..., tokens * head_dim / 16].
    """
    words = (codes.unflatten(-1, (-1, ELEMENTS)).long() << _positions(codes.device)).sum(-1)
    return to_int32(words).transpose(-1, -2).flatten(-2)


def unpack_mixed(words: Tensor, rows: int, contraction: int) -> Tensor:
    """Unpack pages of words, the inverse of `pack_mixed`: uint8 [..., rows, contraction]."""
    grid = words.unflatten(-1, (contraction // ELEMENTS, rows)).transpose(-1, -2).unsqueeze(-1)
    shift, mask = _positions(words.device).int(), _highest_codes(words.device).int()
    return ((grid >> shift) & mask).to(torch.uint8).flatten(-2)
