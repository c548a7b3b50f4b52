"""Operations of KVTensor that dequantize nothing: appending, cropping, and everything on the batch axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf, Payload
from ottfx.kv_tensor import KVTensor, append, crop, map_batch, native

aten = torch.ops.aten


def _is_full(index: Any, size: int) -> bool:
    return isinstance(index, slice) and index.indices(size) == (0, size, 1)


def native_index(tensor: KVTensor, index: Any) -> KVTensor | None:
    """Crop, batch slice or batch gather without dequantizing, or None if `index` is something else."""
    index = index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in index) > 1 or any(i is None or isinstance(i, (int, bool)) for i in index):
        return None
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = index[:at] + (slice(None),) * (4 - len(index) + 1) + index[at + 1 :]
    index = index + (slice(None),) * (4 - len(index))
    batch, heads, tokens, channels = index
    if not (_is_full(heads, tensor.shape[1]) and _is_full(channels, tensor.shape[3]) and isinstance(tokens, slice)):
        return None
    start, stop, step = tokens.indices(tensor.shape[2])
    if start != 0 or step != 1:
        return None
    payload = tensor.payload
    assert payload is not None
    result = tensor if stop == tensor.shape[2] else KVTensor.from_payload(crop(payload, stop))
    if _is_full(batch, tensor.shape[0]):
        return (
            KVTensor.from_payload(Payload(payload.half, payload.length, payload.tail)) if result is tensor else result
        )
    if isinstance(batch, (slice, Tensor, list)):
        return map_batch(result, lambda t: t[batch].clone() if isinstance(batch, slice) else t[batch])
    return None


@native(aten.detach.default, aten.alias.default)
def _alias(tensor: KVTensor) -> KVTensor:
    payload = tensor.payload
    if payload is None:
        return KVTensor(tensor.anchor, tensor.shape[2], tensor.config)
    return KVTensor.from_payload(Payload(payload.half, payload.length, payload.tail))


@native(aten.clone.default)
def _clone(tensor: KVTensor, *, memory_format: Any = None) -> KVTensor:
    if tensor.payload is None:
        return KVTensor(torch.ops.ottfx.handle_crop(tensor.anchor, tensor.shape[2]), tensor.shape[2], tensor.config)
    return map_batch(tensor, torch.clone)


@native(aten._to_copy.default)
def _to_copy(tensor: KVTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Any:
    if tensor.payload is None or dtype not in (None, tensor.dtype):
        return NotImplemented
    return map_batch(tensor, lambda t: t.to(device=device, copy=True))


@native(aten.cat.default)
def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not isinstance(first, KVTensor):
        return NotImplemented
    if dim % 4 == 2 and not any(isinstance(t, KVTensor) for t in tensors[1:]):
        new = tensors[1] if len(tensors) == 2 else torch.cat(tensors[1:], dim=2)
        if first.payload is None:
            anchor = torch.ops.ottfx.handle_append(first.anchor, new)
            return KVTensor(anchor, first.shape[2] + new.shape[2], first.config)
        return append(first.payload, new)
    if dim % 4 == 0:
        return _cat_batch(tensors)
    return NotImplemented


def _cat_batch(tensors: list[Tensor]) -> Any:
    payloads = [t.payload if isinstance(t, KVTensor) else None for t in tensors]
    if any(p is None or p.tail is not None for p in payloads):
        return NotImplemented
    halves: list[CacheHalf] = [p.open_for_append() for p in payloads if p is not None]
    first = halves[0]
    if any((h.config, h.high, h.packed) != (first.config, first.high, first.packed) for h in halves):
        return NotImplemented
    for half in halves:
        half.grow(max(h.shape.pages for h in halves))
    with torch.inference_mode(False):
        joined = {name: torch.cat([h.tensors[name] for h in halves]) for name in first.tensors}
    half = first.with_tensors(joined, sum(h.shape.batch_size for h in halves), first.shape.device)
    half.in_ring = min(h.in_ring for h in halves)
    return KVTensor.from_payload(Payload(half, half.high))


@native(aten.slice.Tensor)
def _slice(tensor: KVTensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    if tensor.payload is None:
        if dim % 4 != 2 or start not in (None, 0) or step != 1:
            return NotImplemented
        length = aten.slice.Tensor(tensor.anchor.new_empty(tensor.shape), dim, start, end, step).shape[2]
        return KVTensor(torch.ops.ottfx.handle_crop(tensor.anchor, length), length, tensor.config)
    index = [slice(None)] * 4
    index[dim] = slice(start, end, step)
    result = native_index(tensor, tuple(index))
    return NotImplemented if result is None else result


@native(aten.index_select.default)
def _index_select(tensor: KVTensor, dim: int, index: Tensor) -> Any:
    if tensor.payload is None or dim % 4 != 0:
        return NotImplemented
    return map_batch(tensor, lambda t: t.index_select(0, index))


@native(aten.index.Tensor)
def _index(tensor: Tensor, indices: list[Tensor | None]) -> Any:
    if not isinstance(tensor, KVTensor) or tensor.payload is None:
        return NotImplemented
    if indices[0] is None or any(i is not None for i in indices[1:]):
        return NotImplemented
    return map_batch(tensor, lambda t: t[indices[0]])
