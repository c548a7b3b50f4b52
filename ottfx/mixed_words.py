"""Words of 16 key channels in unequal widths: from 4 bits down to 1, 2 on average, for channels ordered by their range.

A word of 2-bit codes has 16 channels of one token, one for each element. Here an element has a width of its own, the
same in every word, so a page is laid out, read and as large as one of 2-bit codes. The `key_order` of a head says which
channel is stored where: those with the widest ranges have the most bits.

Heads differ. In most of them ranges fall off gradually; in a few a quarter of the channels is several times as wide as
the others, and what those heads look for is lost if only an eighth has four bits. So there are two sets of widths, and
the order of a head says which one it has. Layout and rules: docs/storage.md.

Source: reverse water-filling (Cover & Thomas, Elements of Information Theory, section 10.3.3): at one error, a channel
of twice the range takes one bit more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.reference import to_int32
from ottfx.word_planes import entries

ELEMENTS = 16
GRADUAL = (4, 3, 2, 1, 2, 2, 1, 1)
STEEP = (4, 4, 1, 1, 3, 1, 1, 1)
"""Bits of the elements of either half of a word, from its low end on. The first four fill the mantissa of a float16."""
WIDEST_FIRST = (0, 1, 4, 2, 5, 3, 6, 7)
"""Places in a half by width, the widest first; in either set."""
AVERAGE_BITS = 2
WIDEST_BITS = max(GRADUAL + STEEP)
STEEP_MARK = 16384
"""What is added to each entry of the `key_order` of a head with steep widths; no channel has such a number."""

ERRORS = (1.0, 0.410, 0.130, 0.0355, 0.0091)
"""Mean squared error of 0, 1, .. bits: of 128 numbers from a normal distribution of variance 1, on searched grids."""


def _table(values: tuple[int, ...]) -> int:
    return sum(value << 4 * place for place, value in enumerate(values))


def _starts(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(widths[:place]) for place in range(len(widths)))


def _look_up(table: Tensor) -> Tensor:
    # int64 [..., ELEMENTS] of tables int64 [...]: the entry of each element's place in its half. A table is a number: a
    # program that is compiled ahead of time has no place for a tensor that was made of a list.
    place = torch.arange(ELEMENTS, device=table.device) >> 1
    return (table.unsqueeze(-1) >> (4 * place)) & 15


def element_widths(steep: Tensor) -> Tensor:
    """Return the bits of each element, int64 [..., ELEMENTS]; `steep` bool [...] says which set a head has."""
    return _look_up(torch.where(steep, _table(STEEP), _table(GRADUAL)))


def element_positions(steep: Tensor) -> Tensor:
    """Return the bit of a word where each element begins, int64 [..., ELEMENTS]: odd ones are in the high half."""
    half = torch.arange(ELEMENTS, device=steep.device) & 1
    return _look_up(torch.where(steep, _table(_starts(STEEP)), _table(_starts(GRADUAL)))) + 16 * half


def _highest_codes(steep: Tensor) -> Tensor:
    # int64 [..., ELEMENTS]: the highest code of each element, which is also the mask of its bits.
    width = element_widths(steep)
    return (torch.ones_like(width) << width) - 1


def channel_levels(steep: Tensor, head_dim: int) -> Tensor:
    """Return the highest code of each stored channel, float32 [..., head_dim], of heads bool [...]."""
    highest = _highest_codes(steep).float().unsqueeze(-2)
    return highest.expand(*steep.shape, head_dim // ELEMENTS, ELEMENTS).flatten(-2)


def suits_steep(ranges: Tensor) -> Tensor:
    """Say which heads lose less in steep widths: those with the lesser sum of squared errors, by `ERRORS`.

    Args:
        ranges: float32 [..., head_dim], of each channel, in descending order.

    Returns:
        bool [...]; False where both lose the same.
    """
    gains = tuple(ERRORS[GRADUAL[place]] - ERRORS[STEEP[place]] for place in WIDEST_FIRST)
    rank = torch.arange(ranges.shape[-1], device=ranges.device)
    gain = entries(torch.div(rank, ranges.shape[-1] // len(gains), rounding_mode="floor"), gains)
    return (ranges.square() * gain).sum(-1) > 0


def order_channels(spread: Tensor) -> Tensor:
    """Say which channel is stored where, and in which widths.

    Args:
        spread: float32 [..., head_dim]: range of each channel; the widest get the most bits, ties the lower channel.

    Returns:
        int64 [..., head_dim]: stored channel -> channel, plus `STEEP_MARK` in heads with steep widths.
    """
    strips = spread.shape[-1] // ELEMENTS
    ranges, ranked = spread.sort(dim=-1, descending=True, stable=True)
    ranks = tuple(WIDEST_FIRST.index(place) for place in range(len(WIDEST_FIRST)))
    half = torch.arange(ELEMENTS, device=spread.device) & 1
    strip = torch.arange(strips, device=spread.device)
    rank = (2 * _look_up(torch.full((), _table(ranks), device=spread.device)) + half) * strips + strip.unsqueeze(1)
    return ranked.index_select(-1, rank.flatten()) + STEEP_MARK * suits_steep(ranges).long().unsqueeze(-1)


def known_order(key_order: Tensor) -> Tensor:
    """Return the channel that each stored one is, int64; as they are where nothing was decided yet (-1)."""
    natural = torch.arange(key_order.shape[-1], device=key_order.device)
    return torch.where(key_order < 0, natural, key_order.long() % STEEP_MARK)


def steep_heads(key_order: Tensor) -> Tensor:
    """Return which heads have steep widths, bool [...], of `key_order` int16 [..., head_dim]."""
    return key_order.select(-1, 0) >= STEEP_MARK


def _like_words(of_elements: Tensor, words: Tensor) -> Tensor:
    # [heads.., ELEMENTS] -> [heads.., 1.., ELEMENTS], beside `words` [heads.., .., ELEMENTS].
    for _ in range(words.dim() - of_elements.dim()):
        of_elements = of_elements.unsqueeze(-2)
    return of_elements


def pack_mixed(codes: Tensor, steep: Tensor) -> Tensor:
    """Pack pages of mixed codes.

    Args:
        codes: uint8 [heads.., .., tokens, head_dim], stored channels, each at most its `channel_levels`.
        steep: bool [heads..], as many leading axes of `codes` as it has.

    Returns:
        int32 [heads.., .., tokens * head_dim / 16].
    """
    elements = codes.unflatten(-1, (-1, ELEMENTS)).long()
    words = (elements << _like_words(element_positions(steep), elements)).sum(-1)
    return to_int32(words).transpose(-1, -2).flatten(-2)


def unpack_mixed(words: Tensor, steep: Tensor, rows: int, contraction: int) -> Tensor:
    """Unpack pages of words, the inverse of `pack_mixed`: uint8 [heads.., .., rows, contraction]."""
    grid = words.unflatten(-1, (contraction // ELEMENTS, rows)).transpose(-1, -2).unsqueeze(-1)
    shift, mask = (_like_words(part.int(), grid) for part in (element_positions(steep), _highest_codes(steep)))
    return ((grid >> shift) & mask).to(torch.uint8).flatten(-2)
