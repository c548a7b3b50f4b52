"""Bits of an element of a filled transformers cache: really held, and by the formula of papers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ottfx
from ottfx.cache_state import CacheHalf
from ottfx.kv_tensor import KVTensor
from ottfx.metrics import formula_bits
from ottfx.schemes.base import Role


def cache_bits(cache: Any) -> tuple[float, float, str]:
    """Return the effective bits of an element of a filled transformers cache, and how its last layer is stored.

    Returns:
        (bits really held, bits by formula, description). A dense tensor counts with its own width as held and with 16
        bits in the formula.
    """
    elements, description = 0, "dense"
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            elements += tensor.numel()
            if (half := _packed_half(tensor)) is not None:
                description = half.config.describe()
    return ottfx.memory_footprint(cache).total * 8 / elements, bits_at_length(cache), description


def bits_at_length(cache: Any, length: int | None = None) -> float:
    """Return the bits of an element by formula (`ottfx.metrics.formula_bits`), over all layers.

    Args:
        cache: a filled transformers cache. A dense layer counts with 16 bits; if it is a sliding one, it never holds
            more than its window.
        length: tokens that the cache is thought to hold; those that it holds if None.
    """
    elements, bits = 0, 0.0
    for layer in cache.layers:
        halves: tuple[tuple[Role, Tensor], ...] = (("key", layer.keys), ("value", layer.values))
        for role, tensor in halves:
            tokens = tensor.shape[2] if length is None else _tokens_held(layer, length)
            count = tensor.shape[0] * tensor.shape[1] * tokens * tensor.shape[3]
            half = _packed_half(tensor)
            elements += count
            bits += count * (16.0 if half is None else formula_bits(half.scheme, half.config, role, half.shape, tokens))
    return bits / elements


def quantized_layers(cache: Any) -> int:
    """Return how many layers of a filled transformers cache a scheme stores; the others are dense."""
    return sum(isinstance(layer.keys, KVTensor) and isinstance(layer.values, KVTensor) for layer in cache.layers)


def _tokens_held(layer: Any, length: int) -> int:
    # A sliding layer of transformers keeps what the next token may see besides itself.
    return min(length, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else length


def _packed_half(tensor: Tensor) -> CacheHalf | None:
    return tensor.payload.half if isinstance(tensor, KVTensor) and tensor.payload is not None else None
