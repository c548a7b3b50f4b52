"""`KVTensor`: the tensor that a model keeps as its cache, with the logical shape and a few bits an element.

A `KVTensor` has the shape and dtype of the dense cache. Its content hangs, as a `Payload`, on its one inner tensor, the
*anchor* `[batch, num_kv_heads, 0, head_dim]`: compilers see a tensor of no bytes, so growth is invisible to their guards and
no two caches alias. An anchor without a payload is a stand-in inside a compiler's trace; what is traced over it are the
`ottfx::handle_*` ops of this file, which find the payload again when the graph runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ottfx.cache_state import CacheHalf, Payload
from ottfx.errors import CacheError
from ottfx.schemes.base import SchemeConfig

aten = torch.ops.aten
_warned: set[str] = set()


class DenseFallbackWarning(UserWarning):
    """An operation dequantized a whole KVTensor: right, but slow and as large as the dense cache."""


class KVTensor(torch.Tensor):
    """Keys or values of one layer, `[batch, num_kv_heads, length, head_dim]`, stored by a scheme.

    Native (nothing is dequantized): appending with `cat` on the length axis, cropping with a slice from 0, selecting, repeating and
    concatenating on the batch axis, `clone`, `deepcopy`, `detach`, `to(device)`. Any other operation works on `dequantize()`
    and returns a dense tensor; the first use of each warns. Writing into a KVTensor raises `CacheError`.
    """

    anchor: Tensor
    config: SchemeConfig | None

    @staticmethod
    def __new__(cls, anchor: Tensor, length: int, config: SchemeConfig | None = None) -> KVTensor:
        batch_size, num_kv_heads, _, head_dim = anchor.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, (batch_size, num_kv_heads, length, head_dim), dtype=anchor.dtype, device=anchor.device
        )

    def __init__(self, anchor: Tensor, length: int, config: SchemeConfig | None = None) -> None:
        self.anchor = anchor
        self.config = config

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def from_payload(cls, payload: Payload) -> KVTensor:
        """Make a handle of `payload`."""
        shape = payload.half.shape
        anchor = torch.empty(
            (shape.batch_size, shape.num_kv_heads, 0, shape.head_dim), dtype=shape.dtype, device=shape.device
        )
        anchor.ottfx_payload = payload
        handle = cls(anchor, payload.total_length, payload.half.config)
        for tensor in (anchor, handle):
            # Heads and head_dim never vary: without this a batch that happens to equal them shares their symbol.
            tensor._dynamo_static_indices = {1, 3}
            tensor._has_dynamo_dim_marking = True
        handle._dynamo_weak_dynamic_indices = {2}
        return handle

    @property
    def payload(self) -> Payload | None:
        """The content, or None inside a compiler's trace."""
        return getattr(self.anchor, "ottfx_payload", None)

    def __tensor_flatten__(self) -> tuple[list[str], SchemeConfig | None]:
        return ["anchor"], self.config

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], config: SchemeConfig | None, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> KVTensor:
        return KVTensor(inner["anchor"], size[2], config)

    def dequantize(self) -> Tensor:
        """Return the content, dense, in the logical dtype. In a trace: the op that will."""
        return torch.ops.ottfx.handle_dequantize(self.anchor, self.shape[2])

    def __repr__(self, *, tensor_contents: object = None) -> str:
        stored = "traced" if self.payload is None else self.payload.half.config.describe()
        return f"KVTensor(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}', stored={stored})"

    def __getitem__(self, index: Any) -> Tensor:
        if self.payload is None:
            return super().__getitem__(index)
        result = _native_index(self, index)
        return self._dense("__getitem__")[index] if result is None else result

    def __setitem__(self, index: Any, value: Any) -> None:
        raise CacheError(_WRITE_ERROR.format(op="__setitem__"))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise CacheError(_WRITE_ERROR.format(op="data = ..."))

    # View ops would tie the result to this handle through `_base`; these return handles of their own.
    def narrow(self, dim: int, start: Any, length: int) -> Tensor:
        index: list[slice] = [slice(None)] * 4
        index[dim] = slice(int(start), int(start) + length)
        return self[tuple(index)]

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[Tensor, ...]:
        total = self.shape[dim]
        sizes = split_size
        if isinstance(sizes, int):
            sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def repeat_interleave(self, repeats: Any, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
        if self.payload is None or dim is None or dim % 4 != 0:
            dense = self.dequantize() if self.payload is None else self._dense("repeat_interleave")
            return dense.repeat_interleave(repeats, dim, output_size=output_size)
        rows = torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats, output_size=output_size)
        return _map_batch(self, lambda t: t.index_select(0, rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(
            "ottfx.KVTensor: a quantized cache cannot be pickled. Save `tensor.dequantize()`, or keep the prompt and run it again."
        )

    def _dense(self, op: str) -> Tensor:
        if op not in _warned:
            _warned.add(op)
            warnings.warn(
                f"ottfx.KVTensor: {op} has no native form, so the whole tensor {list(self.shape)} was dequantized for it. "
                "The result is right, but as large as the dense cache. This warning is shown once for each operation.",
                DenseFallbackWarning,
                stacklevel=3,
            )
        return self.dequantize()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        native = _NATIVE.get(func)
        if native is not None:
            result = native(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            _refuse_write(func, args, kwargs)

        def dense(x: Any) -> Any:
            if not isinstance(x, KVTensor):
                return x
            return x.dequantize() if x.payload is None else x._dense(str(func))

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


_WRITE_ERROR = (
    "ottfx.KVTensor: {op} would write into a quantized cache, which only appends. "
    "Work on `tensor.dequantize()` and hand the dense tensor to the cache instead."
)


def _refuse_write(func: Any, args: tuple, kwargs: dict) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.is_write and isinstance(value, KVTensor):
            raise CacheError(_WRITE_ERROR.format(op=func))
    for argument in func._schema.arguments:
        if argument.is_write and isinstance(kwargs.get(argument.name), KVTensor):
            raise CacheError(_WRITE_ERROR.format(op=func))


# -- what compilers trace over an anchor -----------------------------------------------------------------------------


def _payload_of(anchor: Tensor, op: str) -> Payload:
    payload = getattr(anchor, "ottfx_payload", None)
    if payload is None:
        raise CacheError(
            f"ottfx.{op}: the quantized cache behind this tensor is gone: a compiled graph kept its shape but not its content. "
            "Compile the model with ottfx.compile or backend='ott', or pass `tensor.dequantize()` to the other compiler."
        )
    return payload


def _crop(payload: Payload, length: int) -> Payload:
    if length <= payload.length:
        return Payload(payload.half, length)
    assert payload.tail is not None
    return Payload(payload.half, payload.length, payload.tail[:, :, : length - payload.length])


@torch.library.custom_op("ottfx::handle_dequantize", mutates_args=())
def handle_dequantize(anchor: Tensor, length: int) -> Tensor:
    """Dense `[batch, num_kv_heads, length, head_dim]` of the cache behind `anchor`."""
    payload = _payload_of(anchor, "handle_dequantize")
    if payload.total_length != length:
        raise CacheError(
            f"ottfx.handle_dequantize: the graph expects {length} tokens, the cache behind the tensor holds "
            f"{payload.total_length}. Another compiler lost an append; use backend='ott'."
        )
    return payload.dequantize()


@handle_dequantize.register_fake
def _(anchor: Tensor, length: int) -> Tensor:
    return anchor.new_empty((anchor.shape[0], anchor.shape[1], length, anchor.shape[3]))


@torch.library.custom_op("ottfx::handle_append", mutates_args=())
def handle_append(anchor: Tensor, new: Tensor) -> Tensor:
    """Anchor of the cache behind `anchor` with `new` `[batch, num_kv_heads, n, head_dim]` behind it, not yet packed."""
    return _append(_payload_of(anchor, "handle_append"), new).anchor


@handle_append.register_fake
def _(anchor: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(anchor)


@torch.library.custom_op("ottfx::handle_crop", mutates_args=())
def handle_crop(anchor: Tensor, length: int) -> Tensor:
    """Anchor of the first `length` tokens of the cache behind `anchor`."""
    return KVTensor.from_payload(_crop(_payload_of(anchor, "handle_crop"), length)).anchor


@handle_crop.register_fake
def _(anchor: Tensor, length: int) -> Tensor:
    return torch.empty_like(anchor)


# -- native operations -------------------------------------------------------------------------------------------------

_NATIVE: dict[Any, Callable[..., Any]] = {}


def _native(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            _NATIVE[op] = function
        return function

    return register


def _append(payload: Payload, new: Tensor) -> KVTensor:
    tail = new.clone() if payload.tail is None else torch.cat([payload.tail, new], dim=2)
    return KVTensor.from_payload(Payload(payload.half, payload.length, tail))


def _map_batch(tensor: KVTensor, function: Callable[[Tensor], Tensor]) -> KVTensor:
    payload = tensor.payload
    assert payload is not None
    half = payload.half.map_batch(function)
    half.rewind(payload.length)
    return KVTensor.from_payload(Payload(half, payload.length, None if payload.tail is None else function(payload.tail)))


def _is_full(index: Any, size: int) -> bool:
    return isinstance(index, slice) and index.indices(size) == (0, size, 1)


def _native_index(tensor: KVTensor, index: Any) -> KVTensor | None:
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
    result = tensor if stop == tensor.shape[2] else KVTensor.from_payload(_crop(payload, stop))
    if _is_full(batch, tensor.shape[0]):
        return KVTensor.from_payload(Payload(payload.half, payload.length, payload.tail)) if result is tensor else result
    if isinstance(batch, (slice, Tensor, list)):
        return _map_batch(result, lambda t: t[batch].clone() if isinstance(batch, slice) else t[batch])
    return None


@_native(aten.detach.default, aten.alias.default)
def _alias(tensor: KVTensor) -> KVTensor:
    payload = tensor.payload
    if payload is None:
        return KVTensor(tensor.anchor, tensor.shape[2], tensor.config)
    return KVTensor.from_payload(Payload(payload.half, payload.length, payload.tail))


@_native(aten.clone.default)
def _clone(tensor: KVTensor, *, memory_format: Any = None) -> KVTensor:
    if tensor.payload is None:
        return KVTensor(torch.ops.ottfx.handle_crop(tensor.anchor, tensor.shape[2]), tensor.shape[2], tensor.config)
    return _map_batch(tensor, torch.clone)


@_native(aten._to_copy.default)
def _to_copy(tensor: KVTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Any:
    if tensor.payload is None or dtype not in (None, tensor.dtype):
        return NotImplemented
    return _map_batch(tensor, lambda t: t.to(device=device, copy=True))


@_native(aten.cat.default)
def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not isinstance(first, KVTensor):
        return NotImplemented
    if dim % 4 == 2 and not any(isinstance(t, KVTensor) for t in tensors[1:]):
        new = tensors[1] if len(tensors) == 2 else torch.cat(tensors[1:], dim=2)
        if first.payload is None:
            anchor = torch.ops.ottfx.handle_append(first.anchor, new)
            return KVTensor(anchor, first.shape[2] + new.shape[2], first.config)
        return _append(first.payload, new)
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
    return KVTensor.from_payload(Payload(half, half.high))


@_native(aten.slice.Tensor)
def _slice(tensor: KVTensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    if tensor.payload is None:
        if dim % 4 != 2 or start not in (None, 0) or step != 1:
            return NotImplemented
        length = aten.slice.Tensor(tensor.anchor.new_empty(tensor.shape), dim, start, end, step).shape[2]
        return KVTensor(torch.ops.ottfx.handle_crop(tensor.anchor, length), length, tensor.config)
    index = [slice(None)] * 4
    index[dim] = slice(start, end, step)
    result = _native_index(tensor, tuple(index))
    return NotImplemented if result is None else result


@_native(aten.index_select.default)
def _index_select(tensor: KVTensor, dim: int, index: Tensor) -> Any:
    if tensor.payload is None or dim % 4 != 0:
        return NotImplemented
    return _map_batch(tensor, lambda t: t.index_select(0, index))


@_native(aten.index.Tensor)
def _index(tensor: Tensor, indices: list[Tensor | None]) -> Any:
    if not isinstance(tensor, KVTensor) or tensor.payload is None:
        return NotImplemented
    if indices[0] is None or any(i is not None for i in indices[1:]):
        return NotImplemented
    return _map_batch(tensor, lambda t: t[indices[0]])
