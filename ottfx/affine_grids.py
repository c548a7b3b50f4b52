"""From rows to codes and back, in every way that affine storage knows. Plain torch, traceable."""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.affine_schedule import Due
from ottfx.grid_search import CANDIDATES, dequantize_symmetric, search_affine, search_symmetric
from ottfx.mixed_words import WIDEST_BITS, channel_levels, known_order, order_channels, steep_heads, unpack_mixed
from ottfx.reference import dequantize_affine, make_finite, quantize_affine, unpack_page
from ottfx.schemes.base import PAGE


def code_keys(
    rows: Tensor, bits: int, in_range: Tensor, key_order: Tensor | None, range_search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups of keys, each channel of a group on its own.

    Args:
        rows: [batch, heads, groups, tokens of a group, head_dim].
        bits: width of a code; of mixed widths the average one.
        in_range: bool, broadcastable to `rows`: whose keys the ranges cover.
        key_order: int16 [batch, heads, head_dim], for codes of mixed widths; or None.
        range_search: whether grids may be narrower than the range.

    Returns:
        codes uint8 of the shape of `rows`; scale and zero_point fp16 [batch, heads, groups, head_dim]. Channels are
        those stored.
    """
    if key_order is None:
        if not range_search:
            return quantize_affine(rows, bits, dim=3, taking_part=in_range)
        levels = torch.full((), 2.0**bits - 1, device=rows.device)
    else:
        levels = channel_levels(steep_heads(key_order), rows.shape[-1]).unsqueeze(2).unsqueeze(2)
        rows = rows.gather(-1, known_order(key_order).unsqueeze(2).unsqueeze(2).expand(rows.shape))
    widest = bits if key_order is None else WIDEST_BITS
    return search_affine(rows, levels, 3, in_range, CANDIDATES if range_search else 1, widest)


def code_values(rows: Tensor, bits: int, symmetric: bool, range_search: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize groups of channels of values, each token on its own.

    Args:
        rows: [batch, heads, tokens, groups, channels of a group].
        bits: width of a code.
        symmetric: whether grids are around 0, without a zero point.
        range_search: whether grids may be narrower than the range.

    Returns:
        codes uint8 of the shape of `rows`; scale, and zero_point unless symmetric, fp16 [batch, heads, tokens, groups].
    """
    candidates = CANDIDATES if range_search else 1
    if symmetric:
        return (*search_symmetric(rows, bits, candidates=candidates), None)
    if not range_search:
        return quantize_affine(rows, bits)
    levels = torch.full((), 2.0**bits - 1, device=rows.device)
    return search_affine(rows, levels, -1, candidates=candidates, widest=bits)


def decide_order(key_order: Tensor, key: Tensor, real: Tensor, due: Due, group_size: int, window: int) -> Tensor:
    """Order the channels of the heads that have no order yet: once, when a group with a real token is packed.

    The ranges of the channels over the real tokens of that group and of the `window` tokens behind it decide: in
    however many calls tokens come, these are there when the group is packed.

    Args:
        key_order: int16 [batch, heads, head_dim], -1 where nothing is decided.
        key: [batch, heads, due.bound + window, head_dim], from the first due token on.
        real: bool [batch, due.bound + window]; False where no token is.
        due: the range of tokens.
        group_size: tokens of a group.
        window: tokens that are not packed yet when a group is.

    Returns:
        The new `key_order`.
    """
    offset = torch.arange(key.shape[2], device=key.device)
    has_real = (real & (due.start + offset < due.stop))[:, : due.bound].unflatten(1, (-1, group_size)).any(-1)
    first = has_real.to(torch.uint8).argmax(-1, keepdim=True) * group_size
    counted = (real & (offset >= first) & (offset < first + group_size + window)).unsqueeze(1).unsqueeze(-1)
    key = make_finite(key)
    low = torch.where(counted, key, torch.inf).amin(2)
    high = torch.where(counted, key, -torch.inf).amax(2)
    spread = torch.where(low <= high, high - low, 0.0)
    decided = (key_order >= 0) | ~has_real.any(-1).unsqueeze(-1).unsqueeze(-1)
    return torch.where(decided, key_order, order_channels(spread).to(key_order.dtype))


def read_key_pages(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, key_order: Tensor | None = None
) -> Tensor:
    """Dequantize whole pages of keys.

    Args:
        codes: int32 [batch, heads, pages, words].
        scale: fp16 [batch, heads, pages, groups of a page, head_dim]; `zero_point` alike.
        zero_point: see `scale`.
        bits: width of a code.
        key_order: int16 [batch, heads, head_dim], of codes of mixed widths; or None.

    Returns:
        fp32 [batch, heads, pages * PAGE, head_dim], channels as they are stored.
    """
    groups, head_dim = scale.shape[-2:]
    if key_order is None:
        unpacked = unpack_page(codes, bits, PAGE, head_dim)
    else:
        unpacked = unpack_mixed(codes, steep_heads(key_order), PAGE, head_dim)
    grouped = unpacked.unflatten(-2, (groups, PAGE // groups))
    return dequantize_affine(grouped, scale, zero_point, dim=-2).flatten(2, 4)


def in_natural_order(keys: Tensor, key_order: Tensor) -> Tensor:
    """Put stored channels back: `keys` [batch, heads, tokens, head_dim], `key_order` int16 [batch, heads, head_dim]."""
    stored_at = known_order(key_order).argsort(-1)
    return keys.gather(-1, stored_at.unsqueeze(2).expand(keys.shape))


def read_value_pages(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Dequantize whole pages of values.

    Args:
        codes: int32 [batch, heads, pages, words].
        scale: fp16 [batch, heads, pages, groups of a token, PAGE]; `zero_point` alike, or None for grids around 0.
        zero_point: see `scale`.
        bits: width of a code.

    Returns:
        fp32 [batch, heads, pages * PAGE, head_dim].
    """
    groups = scale.shape[-2]
    head_dim = codes.shape[-1] * 32 // (PAGE * bits)
    unpacked = unpack_page(codes, bits, head_dim, PAGE).unflatten(-2, (groups, head_dim // groups))
    if zero_point is None:
        values = dequantize_symmetric(unpacked, scale, bits, dim=-2)
    else:
        values = dequantize_affine(unpacked, scale, zero_point, dim=-2)
    return values.flatten(3, 4).transpose(-1, -2).flatten(2, 3)
