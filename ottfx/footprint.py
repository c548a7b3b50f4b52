"""`memory_footprint`: the bytes that a cache really holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor

from ottfx.errors import CacheError
from ottfx.kv_tensor import KVTensor


@dataclass(frozen=True, kw_only=True)
class MemoryFootprint:
    """Bytes of a cache, allocated capacity included, and what the same tokens take at the model's own precision."""

    total: int
    """All bytes held."""
    parts: dict[str, int]
    """`codes`, `scales` (with zero points), `residual`, `pool`, `tables`, and `dense` for what is not quantized."""
    per_layer: list[dict[str, int]]
    """The same parts for each layer."""
    dense_total: int
    """Bytes of the same tokens in a stock cache of the same dtype."""

    @property
    def ratio(self) -> float:
        """How many times smaller than the stock cache."""
        return self.dense_total / max(self.total, 1)


def memory_footprint(cache: Any) -> MemoryFootprint:
    """Count the bytes that a cache holds.

    Args:
        cache: a transformers cache, or a sequence with one nesting of tuples, lists or dicts of tensors a layer.

    Raises:
        CacheError: the cache holds no tensor.
    """
    layers = [_layer_tensors(layer) for layer in getattr(cache, "layers", cache)]
    if not any(layers):
        raise CacheError(
            f"ottfx.memory_footprint: expected a cache with tensors in it. Got {type(cache).__name__} without any. "
            "Run the model once, and pass its past_key_values."
        )
    per_layer: list[dict[str, int]] = []
    dense_total = 0
    for tensors in layers:
        parts: dict[str, int] = {}
        for tensor in tensors:
            dense_total += tensor.numel() * tensor.element_size()
            for part, size in _bytes_by_part(tensor).items():
                parts[part] = parts.get(part, 0) + size
        per_layer.append(parts)
    names = sorted({part for layer in per_layer for part in layer})
    total = {part: sum(layer.get(part, 0) for layer in per_layer) for part in names}
    return MemoryFootprint(total=sum(total.values()), parts=total, per_layer=per_layer, dense_total=dense_total)


def _layer_tensors(layer: Any) -> list[Tensor]:
    if hasattr(layer, "keys") and not isinstance(layer, dict):
        layer = (layer.keys, layer.values)
    return [leaf for leaf in optree.tree_leaves(layer) if isinstance(leaf, Tensor)]


def _bytes_by_part(tensor: Tensor) -> dict[str, int]:
    if not isinstance(tensor, KVTensor) or tensor.payload is None:
        return {"dense": tensor.nbytes}
    parts: dict[str, int] = {str(part): size for part, size in tensor.payload.half.bytes_by_part().items()}
    if tensor.payload.tail is not None:
        parts["residual"] = parts.get("residual", 0) + tensor.payload.tail.nbytes
    return parts
