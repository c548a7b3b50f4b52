"""How faithfully a quantized cache keeps what the model put into it: SQNR by layer and head, and what stayed exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ottfx.dense_run import AskedLayer
from ottfx.kv_tensor import KVTensor
from ottfx.schemes.base import PAGE

PARTS = ("key", "value", "output")
EXACT = 0.05
"""A stored token whose relative error is below this share of its head's median was not rounded like the others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fidelity:
    """What a cache gives back, against the dense cache of the same text. All tensors are on the CPU.

    SQNR is 10 log10(sum of squares of the dense numbers / sum of squares of the difference), in dB, over all tokens
    that the cache holds (those in full precision, too) and all channels of a head; infinite where nothing differs.
    NaN fills layers with fewer heads, channels or tokens than others.

    Three parts are compared, in the order of `PARTS`: keys, values, and the attention's output. The output is that of
    the last 64 queries of the dense run, taken over the dense and over the dequantized tokens with the same mask; it
    leaves out the output projection, and sums over the query heads that read the same KV head.
    """

    stored: Tensor
    """float32 [3, layers, kv_heads], dB. The compiled model read the whole text as one prompt, which attends in full
    precision: its keys and values were those of the dense run until they were stored, so this is what storing costs."""
    decoded: Tensor
    """float32 [3, layers, kv_heads], dB. The cache that the compiled model filled token by token: what storing costs,
    and that later layers then saw other inputs."""
    kept_exact: Tensor
    """bool [layers, kv_heads, tokens]: keys behind the packed boundary that were kept aside, as outliers or sinks."""
    kept_attention: Tensor
    """float32 [layers, kv_heads]: share of the dense run's attention that its last queries pay to those tokens."""
    ranges: Tensor
    """float32 [2, layers, kv_heads, channels]: range (largest minus smallest number) of the dense keys in a group of
    tokens; of all tokens, and of those that were not kept aside. Mean over the packed groups in which a token was kept
    aside; over all of them in a head without any."""
    key_norms: Tensor
    """float16 [layers, kv_heads, tokens]: L1 norms of the dense keys over the median of their head."""

    def layer_means(self, part: str, *, decoded: bool = False) -> list[float]:
        """Return the mean SQNR of each layer's heads, in dB; `part` is one of `PARTS`."""
        return (self.decoded if decoded else self.stored)[PARTS.index(part)].nanmean(-1).tolist()

    def mean(self, part: str, *, decoded: bool = False) -> float:
        """Return the mean SQNR over all heads in which anything differs, in dB; infinite if none does."""
        heads = (self.decoded if decoded else self.stored)[PARTS.index(part)]
        heads = heads[heads.isfinite()]
        return heads.double().mean().item() if heads.numel() else math.inf


@torch.no_grad()
def measure_fidelity(dense: Sequence[AskedLayer], stored: Any, decoded: Any, tokens: int) -> Fidelity:
    """Compare two caches of one text with the dense run.

    Args:
        dense: what `run_dense` returned.
        stored: the cache of the compiled model that read the text as one prompt.
        decoded: the cache of the compiled model that decoded it.
        tokens: of the text.
    """
    layers = list(zip(dense, stored.layers, decoded.layers, strict=True))
    kept = [_kept_exact(asked.key, layer.keys) for asked, layer, _ in layers]
    return Fidelity(
        stored=_stack([_layer_sqnr(asked, layer) for asked, layer, _ in layers]).movedim(1, 0),
        decoded=_stack([_layer_sqnr(asked, layer) for asked, _, layer in layers]).movedim(1, 0),
        kept_exact=_stack([_at_the_end(k.float(), tokens) for k in kept]) == 1,
        kept_attention=_stack([_attention_paid(asked, k) for (asked, _, _), k in zip(layers, kept, strict=True)]),
        ranges=_stack(
            [_ranges(asked.key, k, layer.keys) for (asked, layer, _), k in zip(layers, kept, strict=True)]
        ).movedim(1, 0),
        key_norms=_stack([_at_the_end(_relative_norms(asked.key), tokens) for asked in dense]).half(),
    )


def sqnr_db(reference: Tensor, other: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio of each head, in dB; infinite where the two are equal.

    Args:
        reference: [heads, ...].
        other: the same shape.
    """
    signal = reference.double().square().flatten(1).sum(1)
    noise = (reference.double() - other.double()).square().flatten(1).sum(1)
    return (10 * torch.log10(signal / noise)).float()


def attention_output(asked: AskedLayer, key: Tensor, value: Tensor) -> Tensor:
    """Return what the queries of a layer read: float32 [num_kv_heads, query heads of each, queries, head_dim].

    Args:
        asked: the layer, with queries and mask.
        key: [num_kv_heads, held, head_dim], in place of its own.
        value: the shape of `key`.
    """
    return attention_weights(asked, key) @ value.float().unsqueeze(1)


def attention_weights(asked: AskedLayer, key: Tensor) -> Tensor:
    """Return what the queries of a layer pay: float32 [num_kv_heads, query heads of each, queries, held].

    Args:
        asked: the layer, with queries and mask.
        key: [num_kv_heads, held, head_dim], in place of its own.
    """
    kv_heads = key.shape[0]
    query = asked.query.float().unflatten(0, (kv_heads, -1))
    bias = asked.bias.expand(asked.query.shape[0], -1, -1).unflatten(0, (kv_heads, -1))
    scores = query @ key.float().unsqueeze(1).transpose(-1, -2) * asked.softmax_scale + bias
    # A query of a sliding layer may be older than everything that the layer still holds: it reads 0.
    return scores.softmax(-1).nan_to_num(0.0)


def _layer_sqnr(asked: AskedLayer, layer: Any) -> Tensor:
    key, value = (_dense(tensor)[0] for tensor in (layer.keys, layer.values))
    output = (attention_output(asked, *pair) for pair in ((asked.key, asked.value), (key, value)))
    return torch.stack([sqnr_db(asked.key, key), sqnr_db(asked.value, value), sqnr_db(*output)]).cpu()


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, KVTensor) else tensor


def _packed(tensor: Tensor) -> int:
    return tensor.payload.half.packed if isinstance(tensor, KVTensor) and tensor.payload is not None else 0


def _kept_exact(key: Tensor, cached: Tensor) -> Tensor:
    # No scheme is asked what it kept: a token that comes back as it was, among others that do not, was kept.
    kept = torch.zeros(key.shape[:2], dtype=torch.bool)
    packed = _packed(cached)
    if packed:
        wanted = key[:, :packed].float()
        error = (_dense(cached)[0, :, :packed].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
        kept[:, :packed] = (error < EXACT * error.median(-1, keepdim=True).values).cpu()
    return kept


def _attention_paid(asked: AskedLayer, kept: Tensor) -> Tensor:
    weights = attention_weights(asked, asked.key).mean((1, 2)).cpu()
    return torch.where(kept, weights, 0.0).sum(-1)


def _ranges(key: Tensor, kept: Tensor, cached: Tensor) -> Tensor:
    packed = _packed(cached)
    if not packed:
        return torch.full((2, key.shape[0], key.shape[2]), torch.nan)
    size = getattr(cached.config, "group_size", PAGE) if isinstance(cached, KVTensor) else PAGE
    whole = packed // size * size
    groups = key[:, :whole].float().cpu().unflatten(1, (-1, size))
    aside = kept[:, :whole].unflatten(1, (-1, size)).unsqueeze(-1)
    everything = groups.amax(2) - groups.amin(2)
    rest = groups.masked_fill(aside, -torch.inf).amax(2) - groups.masked_fill(aside, torch.inf).amin(2)
    some = aside.any(2)
    counts = (some | ~some.any(1, keepdim=True)).float()
    return torch.stack([(found * counts).sum(1) / counts.sum(1) for found in (everything, rest)])


def _relative_norms(key: Tensor) -> Tensor:
    norms = key.float().abs().sum(-1).cpu()
    return norms / norms.median(-1, keepdim=True).values


def _at_the_end(rows: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(rows, (tokens - rows.shape[-1], 0), value=torch.nan)


def _stack(layers: Sequence[Tensor]) -> Tensor:
    sizes = [max(layer.shape[axis] for layer in layers) for axis in range(layers[0].dim())]
    result = torch.full((len(layers), *sizes), torch.nan)
    for row, layer in zip(result, layers, strict=True):
        row[tuple(slice(size) for size in layer.shape)] = layer
    return result
