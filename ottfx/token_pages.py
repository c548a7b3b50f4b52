"""Storage by tokens: each token is quantized on its own when it is appended, and attention reads it rotated.

A state tensor is `[batch, num_kv_heads, pages, PAGE, ...]`: what a token takes is contiguous. Nothing is shared between
tokens, so there is no window in full precision, and all stored tokens are codes. Layout: docs/storage.md, *Storage by
tokens*. Plain torch, traceable with a symbolic q_len and batch and with an unbacked number of pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.masked_softmax import additive_mask, softmax_or_zero
from ottfx.rotation import rotate, rotate_back
from ottfx.schemes.base import ANY_LENGTH, PAGE, is_always, new_positions


def write_tokens(storage: Tensor, rows: Tensor, lengths: Tensor, site: int) -> None:
    """Store `rows` [batch, heads, q_len, ...] behind the `lengths[site, 0]` tokens that `storage` holds, in place."""
    storage.flatten(2, 3).index_copy_(2, new_positions(lengths, site, rows.shape[2]), rows)


def stored_rows(storage: Tensor, past_length: int) -> Tensor:
    """Return the pages that hold the first `past_length` tokens: [batch, heads, slots, ...].

    All of them for `ANY_LENGTH`. The last slots hold no token.
    """
    # A slice of an unbacked axis has strides that a tracer cannot reason about; a selection is a new tensor.
    number = storage.shape[2] if is_always(past_length, ANY_LENGTH) else past_length // PAGE + 1
    return storage.index_select(2, torch.arange(number, device=storage.device)).flatten(2, 3)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    softmax_scale: float,
    stored_key: Tensor,
    stored_value: Tensor,
    seed: int,
) -> Tensor:
    """Attend over stored tokens and the new ones, in fp32.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        key: new tokens [batch, num_kv_heads, q_len, head_dim]; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, or None.
        lengths: int64 [sites, 3].
        site: row of `lengths`.
        softmax_scale: factor on query @ key^T.
        stored_key: fp32 [batch, num_kv_heads, slots, head_dim], rotated; finite in slots behind the stored tokens.
        stored_value: see `stored_key`.
        seed: of the rotation.

    Returns:
        Shape and dtype of `query`. A query that may see nothing gets 0.
    """
    batch, num_kv_heads, q_len, head_dim = key.shape
    slot = torch.arange(stored_key.shape[2], device=key.device)
    hidden = torch.where(slot < lengths[site, 0], 0.0, -torch.inf)
    bias = torch.cat([hidden, hidden.new_zeros(q_len)])
    if mask is not None:
        columns = torch.cat([slot.clamp(max=mask.shape[-1] - 1), new_positions(lengths, site, q_len)])
        bias = bias + additive_mask(mask.index_select(-1, columns))

    def rows(x: Tensor) -> Tensor:
        # [batch, num_kv_heads, query heads of one of them * q_len, head_dim]
        return x.reshape(batch, num_kv_heads, -1, head_dim)

    query = query.float()
    parts = [
        rows(rotate(query, seed)) @ stored_key.transpose(-1, -2),
        rows(query) @ key.float().transpose(-1, -2),
    ]
    scores = torch.cat(parts, dim=-1).reshape(batch, query.shape[1], q_len, -1) * softmax_scale + bias
    weights = softmax_or_zero(scores)
    values = torch.cat([stored_value, rotate(value.float(), seed)], dim=2)
    result = weights.reshape(batch, num_kv_heads, -1, values.shape[2]) @ values
    return rotate_back(result.reshape(query.shape), key.dtype, seed)
