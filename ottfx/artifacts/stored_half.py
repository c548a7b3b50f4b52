"""One half (keys or values) of one layer in a cache file: its entry, the tensors that belong to it, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ottfx.artifacts.entries import config_from_options, dtype_name, options_of
from ottfx.artifacts.json_fields import read_fields
from ottfx.cache_state import CacheHalf, Payload
from ottfx.errors import ArtifactError, ConfigError
from ottfx.kv_tensor import KVTensor
from ottfx.registry import get_scheme
from ottfx.schemes.base import CacheShape, Role, Scheme, SchemeConfig

DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
}
"""Types of keys and values, by the names that stand in a file."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors of a half: name behind the half's own -> shape and dtype. The name "" is a dense half itself."""

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class DenseHalf:
    """An ordinary tensor `[batch, num_kv_heads, length, head_dim]`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens to be seen."""
        return self.shape[2]

    def problem(self, role: Role) -> str | None:
        """Say what is wrong with this entry as a layer's `role`, or None."""
        if len(self.shape) != 4:
            return f"a dense tensor must be [batch, num_kv_heads, length, head_dim], got {list(self.shape)}"
        return _dtype_problem(self.dtype)

    def pages_needed(self) -> int:
        """Pages of packed storage: none."""
        return 0

    def layout(self) -> Layout:
        """Return the shape and dtype of the tensor."""
        return {"": (self.shape, DTYPES[self.dtype])}

    def restore(self, tensors: Mapping[str, Tensor], pages: int, device: torch.device) -> Tensor:
        """Return the tensor on `device`, in memory of its own."""
        return tensors[""].to(device, copy=True)


@dataclass(frozen=True, kw_only=True)
class PackedHalf:
    """`length` tokens in the storage of a scheme, and `tail` tokens behind them in full precision."""

    scheme: str
    options: dict[str, Any]
    role: str
    batch_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    length: int
    packed: int
    in_ring: int
    tail: int

    @property
    def tokens(self) -> int:
        """Tokens to be seen."""
        return self.length + self.tail

    @cached_property
    def config(self) -> SchemeConfig:
        """The scheme's config. Raises ConfigError, or what an option of an odd type leads to."""
        return config_from_options(self.scheme, self.options)

    def problem(self, role: Role) -> str | None:
        """Say what is wrong with this entry as a layer's `role`, or None."""
        if self.role != role:
            return f"must hold {role}s, got {self.role!r}"
        if min(self.batch_size, self.num_kv_heads, self.head_dim) < 1:
            sizes = (self.batch_size, self.num_kv_heads, self.head_dim)
            return f"batch, num_kv_heads and head_dim must be positive, got {sizes}"
        if not 0 <= self.packed <= self.length or self.tail < 0:
            return (
                "lengths must be 0 <= packed <= length and 0 <= tail, "
                f"got packed={self.packed}, length={self.length}, tail={self.tail}"
            )
        problem = _dtype_problem(self.dtype)
        if problem is not None:
            return problem
        try:
            scheme, config = get_scheme(self.scheme), self.config
        except (ConfigError, TypeError, ValueError) as error:
            return f"the scheme must be known here and take the options, got {self.scheme} {self.options}: {error}"
        problem = scheme.check(config, self._shape(1, CPU))
        if problem is not None:
            return problem
        due = scheme.packed_length(config, role, self.length, self.packed)
        if due != self.packed:
            return f"of length={self.length} tokens the scheme packs {due}, got packed={self.packed}"
        room = max(0, scheme.ring_rows(config) - (self.length - self.packed))
        if not 0 <= self.in_ring <= min(self.packed, room):
            return f"the ring can hold 0 to {min(self.packed, room)} packed tokens as well, got in_ring={self.in_ring}"
        return None

    def pages_needed(self) -> int:
        """Pages that the packed tokens fill."""
        return self._scheme().pages_needed(self.config, self.length)

    def layout(self) -> Layout:
        """Return the shape and dtype of each state tensor over the pages in use, in the scheme's order; then the tail.

        A state tensor's name here starts with a dot, so none can be called as the tail is.
        """
        shape = self._shape(self.pages_needed(), CPU)
        specs = self._scheme().state_spec(self.config, self._role(), shape)
        layout: Layout = {f".{name}": (spec.shape, spec.dtype) for name, spec in specs.items()}
        if self.tail:
            layout["_tail"] = ((self.batch_size, self.num_kv_heads, self.tail, self.head_dim), shape.dtype)
        return layout

    def restore_half(self, tensors: Mapping[str, Tensor], pages: int, device: torch.device) -> CacheHalf:
        """Return storage of its own with room for `pages` pages and what `tensors` hold."""
        half = CacheHalf.allocate(self._scheme(), self.config, self._role(), self._shape(pages, device))
        for name, spec in half.specs.items():
            saved, tensor = tensors[f".{name}"], half.tensors[name]
            if spec.paged_dim is not None:
                tensor = tensor.narrow(spec.paged_dim, 0, saved.shape[spec.paged_dim])
            tensor.copy_(saved)
        half.high, half.packed, half.in_ring = self.length, self.packed, self.in_ring
        return half

    def restore(self, tensors: Mapping[str, Tensor], pages: int, device: torch.device) -> Tensor:
        """Return a handle of restored storage."""
        half = self.restore_half(tensors, pages, device)
        tail = tensors["_tail"].to(device, copy=True) if self.tail else None
        return KVTensor.from_payload(Payload(half, self.length, tail))

    def _scheme(self) -> Scheme:
        return get_scheme(self.scheme)

    def _role(self) -> Role:
        return "key" if self.role == "key" else "value"

    def _shape(self, pages: int, device: torch.device) -> CacheShape:
        return CacheShape(
            batch_size=self.batch_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            pages=pages,
            dtype=DTYPES[self.dtype],
            device=device,
        )


StoredHalf = DenseHalf | PackedHalf

KINDS: dict[str, type[DenseHalf] | type[PackedHalf]] = {"dense": DenseHalf, "packed": PackedHalf}
"""By the word that stands in an entry under "stored"."""


def store_tensor(tensor: Tensor) -> tuple[StoredHalf, dict[str, Tensor]]:
    """Return the entry of a layer's keys or values, and its tensors on the CPU by name. Changes nothing."""
    if not isinstance(tensor, KVTensor):
        entry = DenseHalf(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
        return entry, {"": _to_cpu(tensor)}
    payload = tensor.payload
    if payload is None:
        raise ArtifactError(
            "ottfx.save_cache: expected a cache with content. Got the stand-in that a compiler traces with. "
            "Call save_cache outside of compiled functions."
        )
    half = payload.half
    if half.high > payload.length:
        half = half.map_batch(torch.clone)
        half.rewind(payload.length)
    return store_half(half, payload.tail)


def store_half(half: CacheHalf, tail: Tensor | None = None) -> tuple[PackedHalf, dict[str, Tensor]]:
    """Return the entry of packed storage with `tail` behind it, and its tensors on the CPU by name."""
    config = half.config
    entry = PackedHalf(
        scheme=config.scheme,
        options=options_of(config),
        role=half.role,
        batch_size=half.shape.batch_size,
        num_kv_heads=half.shape.num_kv_heads,
        head_dim=half.shape.head_dim,
        dtype=dtype_name(half.shape.dtype),
        length=half.high,
        packed=half.packed,
        in_ring=half.in_ring,
        tail=0 if tail is None else tail.shape[2],
    )
    layout = entry.layout()
    tensors = {}
    for name, spec in half.specs.items():
        tensor = half.tensors[name]
        if spec.paged_dim is not None:
            shape, _ = layout[f".{name}"]
            tensor = tensor.narrow(spec.paged_dim, 0, shape[spec.paged_dim])
        tensors[f".{name}"] = _to_cpu(tensor)
    if tail is not None and entry.tail:
        tensors["_tail"] = _to_cpu(tail)
    return entry, tensors


def half_to_json(entry: StoredHalf) -> dict[str, Any]:
    """Return the entry as it stands in a file."""
    stored = "dense" if isinstance(entry, DenseHalf) else "packed"
    return {"stored": stored, **dataclasses.asdict(entry)}


def half_from_json(raw: Any, where: str) -> StoredHalf:
    """Return the entry that `half_to_json` made, its fields of the right types but not yet asked for a `problem`.

    Raises:
        ArtifactError: it is none; the text starts with `where`.
    """
    stored = raw.get("stored") if isinstance(raw, dict) else raw
    if stored not in list(KINDS):
        raise damaged(f'{where}: "stored" must be one of {list(KINDS)}, got {stored!r}')
    return read_fields(KINDS[stored], {name: value for name, value in raw.items() if name != "stored"}, where)


def damaged(problem: str) -> ArtifactError:
    """An error about the content of a cache file; `problem` says where, what was expected and what came."""
    return ArtifactError(
        f"{problem}. The file is damaged, or written by another version of ottfx or of the scheme. "
        "Save the cache again with the ottfx that is installed here; nothing was loaded."
    )


def _dtype_problem(name: str) -> str | None:
    return None if name in DTYPES else f"dtype must be one of {list(DTYPES)}, got {name!r}"


def _to_cpu(tensor: Tensor) -> Tensor:
    # Always a copy: two tensors of a file may not share memory.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
