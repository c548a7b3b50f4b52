"""Writing the codes and constants of due tokens into pages, in place. Plain torch, traceable; docs/storage.md."""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.affine_schedule import Due
from ottfx.mixed_words import pack_mixed, steep_heads, unpack_mixed
from ottfx.reference import pack_page, unpack_page
from ottfx.schemes.base import PAGE


def merge_pages(storage: Tensor, pages: Tensor, is_due: Tensor, fresh: Tensor) -> None:
    """Write `fresh` into whole pages where `is_due`, in place; a repeated page gets the same contents twice."""
    storage.index_copy_(2, pages, torch.where(is_due, fresh, storage.index_select(2, pages)))


def merge_codes(
    storage: Tensor, pages: Tensor, is_due: Tensor, fresh: Tensor, bits: int, key_order: Tensor | None = None
) -> None:
    """`merge_pages` of codes, which `storage` holds packed; of mixed widths if there is a `key_order`."""
    words, sizes = storage.index_select(2, pages), fresh.shape[-2:]
    if key_order is None:
        packed = pack_page(torch.where(is_due, fresh, unpack_page(words, bits, *sizes)), bits)
    else:
        steep = steep_heads(key_order)
        packed = pack_mixed(torch.where(is_due, fresh, unpack_mixed(words, steep, *sizes)), steep)
    storage.index_copy_(2, pages, packed)


def write_keys(
    codes: Tensor, scale: Tensor, zero_point: Tensor, due: Due, group_size: int, bits: int,
    key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor, key_order: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the codes and constants of the due key groups into their pages, in place.

    Args:
        codes: uint8 [batch, heads, bound, head_dim].
        scale: fp16 [batch, heads, bound / group_size, head_dim]; `zero_point` alike.
        zero_point: see `scale`.
        due: the range of tokens.
        group_size: tokens of a group.
        bits: width of a code.
        key_codes: the storage, as in docs/storage.md; so are `key_scale` and `key_zero_point`.
        key_scale: see `key_codes`.
        key_zero_point: see `key_codes`.
        key_order: int16 [batch, heads, head_dim], of codes of mixed widths (`ottfx.mixed_words`); or None.
    """
    batch, heads, _, head_dim = codes.shape
    is_due, offset = due.locate_in_pages(1)
    fresh = codes.index_select(2, offset.reshape(-1)).reshape(batch, heads, -1, PAGE, head_dim)
    merge_codes(key_codes, due.pages, is_due.unsqueeze(-1), fresh, bits, key_order)

    is_due, offset = due.locate_in_pages(group_size)
    group = torch.div(offset, group_size, rounding_mode="floor").reshape(-1)
    for storage, fresh in ((key_scale, scale), (key_zero_point, zero_point)):
        paged = fresh.index_select(2, group).reshape(batch, heads, -1, PAGE // group_size, head_dim)
        merge_pages(storage, due.pages, is_due.unsqueeze(-1), paged)


def write_values(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, due: Due, bits: int,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor | None,
) -> None:  # fmt: skip
    """Write the codes and constants of the due value tokens into their pages, in place.

    Args:
        codes: uint8 [batch, heads, bound, head_dim].
        scale: fp16 [batch, heads, bound, value groups], marks included; `zero_point` alike, or None.
        zero_point: see `scale`.
        due: the range of tokens.
        bits: width of a code.
        value_codes: the storage, as in docs/storage.md; so are `value_scale` and `value_zero_point`.
        value_scale: see `value_codes`.
        value_zero_point: see `value_codes`.
    """
    batch, heads = codes.shape[:2]
    is_due, offset = due.locate_in_pages(1)
    is_due, offset = is_due.unsqueeze(1), offset.reshape(-1)

    def paged(fresh: Tensor) -> Tensor:
        rows = fresh.index_select(2, offset).reshape(batch, heads, -1, PAGE, fresh.shape[-1])
        return rows.transpose(-1, -2)

    merge_codes(value_codes, due.pages, is_due, paged(codes), bits)
    merge_pages(value_scale, due.pages, is_due, paged(scale))
    if zero_point is not None and value_zero_point is not None:
        merge_pages(value_zero_point, due.pages, is_due, paged(zero_point))
