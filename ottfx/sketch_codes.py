"""Codes of keys as signs of random projections (QJL): a quantized Johnson-Lindenstrauss sketch. Plain torch.

A query is not quantized, so the signs estimate inner products without bias: for a row `s` of the sketch with entries of
variance 1, the mean of `<s, q> sign(<s, k>)` is `sqrt(2 / pi) <q, k> / |k|`. The few channels of a group in which keys
are large have a sketch and a norm of their own, as the error grows with the norm.

Rows come in blocks of head_dim orthogonal ones of norm `sqrt(head_dim)`, as in the published code; here a block is a
Hadamard transform with random signs, three times, which needs no storage: its entries are nearly normal.

Source: Zandieh et al., QJL, arXiv:2406.03482, definition 3.1, algorithm 1 and section 4.1 (orthogonal rows, outliers).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ottfx.opaque_call import in_opaque_call
from ottfx.reference import FINITE_MAX
from ottfx.rotation import rotation
from ottfx.word_planes import pack_plane, plane_words, unpack_plane

ROUNDS = 3
"""Rotations whose product is a block of the sketch."""
SEEDS = 8 * ROUNDS
"""Rotations that belong to one seed: there are at most 8 blocks."""


def sketch_rows(head_dim: int, key_bits: int) -> tuple[int, int]:
    """Return the signs of a key: those of all channels but outliers, and those of outliers."""
    return head_dim * int(key_bits), head_dim * int(key_bits) // 2


def sign_words(head_dim: int, key_bits: int) -> tuple[int, int]:
    """Return how many int32 words hold the signs of one key, of all channels but outliers, and of outliers."""
    rows, outlier_rows = sketch_rows(head_dim, key_bits)
    return plane_words(rows, 1, 32), plane_words(outlier_rows, 1, 32)


def _make_sketch(head_dim: int, blocks: int, device: torch.device, seed: int) -> Tensor:
    first = int(seed) * SEEDS
    rotations = [rotation(head_dim, device, first + index) for index in range(blocks * ROUNDS)]
    parts = [
        functools.reduce(torch.matmul, rotations[start : start + ROUNDS]) for start in range(0, len(rotations), ROUNDS)
    ]
    return torch.cat(parts) * head_dim**0.5


_remembered_sketch = functools.lru_cache(maxsize=8)(_make_sketch)


def sketch(head_dim: int, key_bits: int, device: torch.device, seed: int) -> Tensor:
    """Return the sketch, fp32 [head_dim * key_bits, head_dim]; outliers use its first half.

    Where nobody traces it is made once: that takes longer than using it.
    """
    return (_remembered_sketch if in_opaque_call() else _make_sketch)(head_dim, int(key_bits), device, int(seed))


def outlier_mask(outliers: Tensor, head_dim: int) -> Tensor:
    """Return bool [..., head_dim]: which channels are among `outliers` [..., n]."""
    channel = torch.arange(head_dim, device=outliers.device)
    return (channel.unsqueeze(-1) == outliers.unsqueeze(-2)).any(-1)


def encode(
    keys: Tensor, real: Tensor, key_bits: int, outlier_channels: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sketch groups of keys.

    Args:
        keys: fp32 [batch, heads, groups, tokens of a group, head_dim], finite.
        real: bool, broadcastable to `keys`; other keys are stored as 0.
        key_bits: signs for each channel.
        outlier_channels: how many channels of a group have a sketch of their own: those with the largest norm over
            the group, of equals the first.
        seed: of the sketch.

    Returns:
        signs int32 [batch, heads, groups, tokens, sign_words], those of outliers alike; norms of keys and of their
        outliers, fp16 [batch, heads, groups, tokens, 2]; outliers uint8 [batch, heads, groups, outlier_channels].
    """
    head_dim = keys.shape[-1]
    keys = torch.where(real, keys, 0.0)
    order = keys.square().sum(3).argsort(dim=-1, descending=True, stable=True)
    outliers = order.narrow(-1, 0, int(outlier_channels))
    is_outlier = outlier_mask(outliers, head_dim).unsqueeze(3)
    inner, outer = torch.where(is_outlier, 0.0, keys), torch.where(is_outlier, keys, 0.0)
    norms = torch.stack([keys.square().sum(-1), outer.square().sum(-1)], dim=-1).sqrt()
    projection = sketch(head_dim, key_bits, keys.device, seed)
    _, outlier_rows = sketch_rows(head_dim, key_bits)
    signs, outlier_signs = (
        pack_plane((x @ rows.T < 0).long(), 1, torch.int32)
        for x, rows in ((inner, projection), (outer, projection.narrow(0, 0, outlier_rows)))
    )
    return signs, outlier_signs, norms.clamp(max=FINITE_MAX).half(), outliers.to(torch.uint8)


def decode(
    signs: Tensor, outlier_signs: Tensor, norms: Tensor, outliers: Tensor, head_dim: int, key_bits: int, seed: int
) -> Tensor:
    """Return what inner products with a query make of pages, fp32 [batch, heads, pages * tokens of a page, head_dim].

    The estimate is linear in the query, so it is the inner product with one vector for each key.

    Args:
        signs: int32 [batch, heads, pages, tokens of a page, words]; `outlier_signs` alike.
        outlier_signs: see `signs`.
        norms: fp16 [batch, heads, pages, tokens of a page, 2].
        outliers: uint8 [batch, heads, pages, groups of a page, outlier_channels].
        head_dim: channels.
        key_bits: signs for each channel.
        seed: of the sketch.
    """
    projection = sketch(head_dim, key_bits, signs.device, seed)
    whole, outer = norms.float().unsqueeze(-1).unbind(-2)
    inner = (whole.square() - outer.square()).clamp(min=0.0).sqrt()
    parts = []
    for words, norm, rows in zip((signs, outlier_signs), (inner, outer), sketch_rows(head_dim, key_bits), strict=True):
        sign = 1.0 - 2.0 * unpack_plane(words, 1, rows).float()
        parts.append(norm * (math.sqrt(math.pi / 2) / rows) * (sign @ projection.narrow(0, 0, rows)))
    groups = outliers.shape[3]
    is_outlier = outlier_mask(outliers.long(), head_dim).repeat_interleave(signs.shape[3] // groups, dim=3)
    return torch.where(is_outlier, parts[1], parts[0]).flatten(2, 3)
