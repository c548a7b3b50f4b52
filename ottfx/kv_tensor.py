"""`KVTensor`: the tensor that a model keeps as its cache, with the logical shape and a few bits an element.

A `KVTensor` has the shape and dtype of the dense cache. Its content hangs, as a `Payload`, on its one inner tensor, the
*anchor* `[batch, num_kv_heads, 0, head_dim]`: compilers see a tensor of no bytes, so growth is invisible to their
guards and no two caches alias. An anchor without a payload is a stand-in inside a compiler's trace; what is traced over
it are the `ottfx::handle_*` ops of `ottfx/kv_handle_ops.py`, which find the payload again when the graph runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ottfx.cache_state import Payload
from ottfx.errors import CacheError
from ottfx.schemes.base import SchemeConfig

aten = torch.ops.aten
_warned: set[str] = set()

NATIVE: dict[Any, Callable[..., Any]] = {}


def native(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the form of `ops` that dequantizes nothing; it may return NotImplemented."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            NATIVE[op] = function
        return function

    return register


class DenseFallbackWarning(UserWarning):
    """An operation dequantized a whole KVTensor: right, but slow and as large as the dense cache."""


class KVTensor(torch.Tensor):
    """Keys or values of one layer, `[batch, num_kv_heads, length, head_dim]`, stored by a scheme.

    Native (nothing is dequantized): appending with `cat` on the length axis, cropping with a slice from 0, selecting,
    repeating and concatenating on the batch axis, `clone`, `deepcopy`, `detach`, `to(device)`. Any other operation
    works on `dequantize()` and returns a dense tensor; the first use of each warns. Writing into a KVTensor raises
    `CacheError`.
    """

    anchor: Tensor
    config: SchemeConfig | None

    # What `torch._dynamo.mark_static` would write on each handle. Heads and head_dim never vary: without this a batch
    # that happens to equal them shares their symbol.
    _dynamo_static_indices: ClassVar[set[int]] = {1, 3}
    _dynamo_weak_dynamic_indices: ClassVar[set[int]] = {2}
    _has_dynamo_dim_marking: ClassVar[bool] = True

    @staticmethod
    def __new__(cls, anchor: Tensor, length: int, config: SchemeConfig | None = None) -> KVTensor:
        """Make a tensor of `length` tokens over an anchor; see `from_payload` for one with content."""
        batch_size, num_kv_heads, _, head_dim = anchor.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, (batch_size, num_kv_heads, length, head_dim), dtype=anchor.dtype, device=anchor.device
        )

    def __init__(self, anchor: Tensor, length: int, config: SchemeConfig | None = None) -> None:
        self.anchor = anchor
        self.config = config

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def from_payload(cls, payload: Payload) -> KVTensor:
        """Make a handle of `payload`."""
        half, shape = payload.half, payload.half.shape
        anchor = torch.empty_like(half.no_tokens)
        anchor.ottfx_payload = payload  # type: ignore[attr-defined]
        anchor._dynamo_static_indices = cls._dynamo_static_indices  # type: ignore[attr-defined]
        anchor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
        # `cls(...)` would take twice as long, and each step makes two handles a layer.
        size = (shape.batch_size, shape.num_kv_heads, payload.total_length, shape.head_dim)
        handle = torch.Tensor._make_wrapper_subclass(cls, size, dtype=shape.dtype, device=shape.device)
        handle.anchor, handle.config = anchor, half.config
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

    @classmethod
    def __metadata_guard__(cls, traced: SchemeConfig | None, config: SchemeConfig | None) -> bool:
        # Equal configs are nearly always one object, and comparing all their fields takes longer.
        return config is traced or config == traced

    def dequantize(self) -> Tensor:
        """Return the content, dense, in the logical dtype. In a trace: the op that will."""
        return torch.ops.ottfx.handle_dequantize(self.anchor, self.shape[2])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        stored = "traced" if self.payload is None else self.payload.half.config.describe()
        return f"KVTensor(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}', stored={stored})"

    def __getitem__(self, index: Any) -> Tensor:
        if self.payload is None:
            return super().__getitem__(index)
        result = _native_ops.native_index(self, index)
        return self._dense("__getitem__")[index] if result is None else result

    def __setitem__(self, index: Any, value: Any) -> None:
        raise CacheError(_WRITE_ERROR.format(op="__setitem__"))

    @property
    def data(self) -> Tensor:
        """Another handle of the same content; not assignable."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise CacheError(_WRITE_ERROR.format(op="data = ..."))

    # View ops would tie the result to this handle through `_base`; these return handles of their own.
    def narrow(self, dim: int, start: Any, length: Any) -> Tensor:
        """As `Tensor.narrow`, but no view."""
        index: list[slice] = [slice(None)] * 4
        index[dim] = slice(int(start), int(start) + length)
        return self[tuple(index)]

    def split(self, split_size: Any, dim: int = 0) -> tuple[Tensor, ...]:
        """As `Tensor.split`, but no views."""
        total = self.shape[dim]
        sizes = split_size
        if isinstance(sizes, int):
            sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def repeat_interleave(self, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
        """As `Tensor.repeat_interleave`; native on the batch axis."""
        if self.payload is None or dim is None or dim % 4 != 0:
            dense = self.dequantize() if self.payload is None else self._dense("repeat_interleave")
            return dense.repeat_interleave(repeats, dim, output_size=output_size)
        rows = torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats, output_size=output_size)
        return map_batch(self, lambda t: t.index_select(0, rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(
            "ottfx.KVTensor: a quantized cache cannot be pickled. Write the whole cache with "
            "ottfx.save_cache(cache, path) and read it with ottfx.load_cache(path)."
        )

    def _dense(self, op: str) -> Tensor:
        if op not in _warned:
            _warned.add(op)
            warnings.warn(
                f"ottfx.KVTensor: {op} has no native form, so the whole tensor {list(self.shape)} was dequantized for "
                "it. The result is right, but as large as the dense cache. Each operation warns once.",
                DenseFallbackWarning,
                stacklevel=3,
            )
        return self.dequantize()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        native = NATIVE.get(func)
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


def crop(payload: Payload, length: int) -> Payload:
    """The first `length` tokens of a payload."""
    if length <= payload.length:
        return Payload(payload.half, length)
    assert payload.tail is not None
    return Payload(payload.half, payload.length, payload.tail[:, :, : length - payload.length])


def append(payload: Payload, new: Tensor) -> KVTensor:
    """A handle of `payload` with `new` [batch, num_kv_heads, n, head_dim] behind it, not yet packed."""
    tail = new.clone() if payload.tail is None else torch.cat([payload.tail, new], dim=2)
    return KVTensor.from_payload(Payload(payload.half, payload.length, tail))


def map_batch(tensor: KVTensor, function: Callable[[Tensor], Tensor]) -> KVTensor:
    """A handle of its own, whose every state tensor is `function` of this one's."""
    payload = tensor.payload
    assert payload is not None
    half = payload.half.map_batch(function)
    half.rewind(payload.length)
    return KVTensor.from_payload(
        Payload(half, payload.length, None if payload.tail is None else function(payload.tail))
    )


# Fill `NATIVE`, and register the ops that `dequantize` calls. Both need the class.
from ottfx import kv_handle_ops as _handle_ops  # noqa: E402, F401
from ottfx import kv_native_ops as _native_ops  # noqa: E402
