"""`CacheHalf`: the packed keys, or the packed values, of one layer. The one owner of packed storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ottfx.schemes.base import CacheShape, Part, Role, Scheme, SchemeConfig, TensorSpec

MIN_PAGES = 2
"""Compiled graphs take the number of pages for a size that is neither 0 nor 1."""


class Payload:
    """What one handle (`KVTensor`) sees: the first `length` tokens of `half`, then `tail` in full precision."""

    __slots__ = ("__weakref__", "half", "length", "tail")

    def __init__(self, half: CacheHalf, length: int, tail: Tensor | None = None) -> None:
        self.half = half
        self.length = length
        self.tail = tail
        half.readers.add(weakref.ref(self, half.readers.discard))

    @property
    def total_length(self) -> int:
        """Tokens visible through this handle, tail included."""
        return self.length + (0 if self.tail is None else self.tail.shape[2])

    def dequantize(self) -> Tensor:
        """Return the visible tokens, dense `[batch, num_kv_heads, total_length, head_dim]`."""
        stored = self.half.read(self.length)
        return stored if self.tail is None else torch.cat([stored, self.tail], dim=2)

    def open_for_append(self) -> CacheHalf:
        """Return a half that holds exactly `length` tokens and may be written behind them.

        It is this handle's own half if no other live handle sees further (then whatever was cropped away is
        forgotten), otherwise a copy: appending to a branch never changes its siblings.
        """
        half = self.half
        if half.high == self.length:
            return half
        live = [reader() for reader in tuple(half.readers)]
        if any(reader is not None and reader.length > self.length for reader in live):
            half = half.map_batch(torch.clone)
        half.rewind(self.length)
        return half


class CacheHalf:
    """State tensors of one half of one layer's cache, with the two lengths that say what is in them.

    Attributes:
        tensors: name -> tensor, in the order in which the scheme's ops take them.
        high: tokens written.
        packed: how many of them are codes.
        in_ring: how many of the packed tokens, the newest, the full-precision ring still holds as well. 0 is always
            safe: it is what a half has whose tensors were put together elsewhere.
        readers: live payloads that look at this half; a `WeakSet` is slower.
        no_tokens: an empty tensor `[batch, num_kv_heads, 0, head_dim]`, which handles of this half make theirs like.
        storage: another object whenever `tensors` are others; who knows their addresses can tell by it.
    """

    __slots__ = (
        "config",
        "high",
        "in_ring",
        "no_tokens",
        "packed",
        "readers",
        "role",
        "scheme",
        "shape",
        "specs",
        "storage",
        "tensors",
    )

    def __init__(self, scheme: Scheme, config: SchemeConfig, role: Role, shape: CacheShape) -> None:
        self.scheme = scheme
        self.config = config
        self.role = role
        self.shape = shape
        self.specs: dict[str, TensorSpec] = scheme.state_spec(config, role, shape)
        self.storage = object()
        self.no_tokens = torch.empty(
            (shape.batch_size, shape.num_kv_heads, 0, shape.head_dim), dtype=shape.dtype, device=shape.device
        )
        self.high = 0
        self.packed = 0
        self.in_ring = 0
        self.readers: set[weakref.ref[Payload]] = set()
        self.tensors: dict[str, Tensor] = {}

    @classmethod
    def allocate(cls, scheme: Scheme, config: SchemeConfig, role: Role, shape: CacheShape) -> CacheHalf:
        """Make an empty half with room for `shape.pages` pages."""
        half = cls(scheme, config, role, shape)
        # Buffers made in inference mode could not be written to later outside it.
        with torch.inference_mode(False):
            half.tensors = {
                name: torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=shape.device)
                for name, spec in half.specs.items()
            }
        return half

    def grow(self, pages: int) -> None:
        """Make room for `pages` pages; never shrinks. One tensor at a time is held twice."""
        if pages <= self.shape.pages:
            return
        with torch.inference_mode(False):
            self._set_pages(pages)
            for name, spec in self.specs.items():
                if spec.paged_dim is None:
                    continue
                old = self.tensors[name]
                new = torch.empty(spec.shape, dtype=spec.dtype, device=old.device)
                kept = old.shape[spec.paged_dim]
                new.narrow(spec.paged_dim, 0, kept).copy_(old)
                new.narrow(spec.paged_dim, kept, new.shape[spec.paged_dim] - kept).fill_(spec.fill)
                self.tensors[name] = new

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> CacheHalf:
        """Return a copy whose every tensor is `function` of this one's; it may change the batch axis or the device."""
        with torch.inference_mode(False):
            tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        first = next(iter(tensors.values()))
        half = self.with_tensors(tensors, first.shape[0], first.device)
        half.in_ring = self.in_ring
        return half

    def with_tensors(self, tensors: dict[str, Tensor], batch_size: int, device: torch.device) -> CacheHalf:
        """Return a half with this one's scheme and lengths over other tensors."""
        shape = CacheShape(
            batch_size=batch_size,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            pages=self.shape.pages,
            dtype=self.shape.dtype,
            device=device,
        )
        half = CacheHalf(self.scheme, self.config, self.role, shape)
        half.tensors = tensors
        half.high, half.packed = self.high, self.packed
        return half

    def read(self, length: int) -> Tensor:
        """Return the first `length` tokens, dense `[batch, num_kv_heads, length, head_dim]`, in logical dtype."""
        return self.scheme.read(self.config, self.role, self.tensors, self.packed, length).to(self.shape.dtype)

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        if length < self.high:
            ring_start = self.packed - self.in_ring
            with torch.inference_mode(False), torch.no_grad():
                self.packed = self.scheme.rewind(
                    self.config, self.role, self.tensors, self.packed, self.in_ring, length
                )
            # What the forgotten tokens overwrote stays lost, however short the sequence is now.
            self.in_ring = max(0, self.packed - ring_start)
        self.high = length

    def advance(self, length: int) -> None:
        """Record that tokens up to `length` were written, and what the append op packed by that."""
        ring_start = self._ring_start(length)
        self.packed = self.scheme.packed_length(self.config, self.role, length, self.packed)
        self.in_ring = max(0, self.packed - ring_start)
        self.high = length

    def overwrite(self, length: int) -> None:
        """Expect the token behind `length - 1` others to be written, which may never be counted in."""
        self.in_ring = max(0, self.packed - self._ring_start(length))

    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes really held, by what they are."""
        parts: dict[Part, int] = {}
        for name, spec in self.specs.items():
            parts[spec.part] = parts.get(spec.part, 0) + self.tensors[name].nbytes
        return parts

    def _ring_start(self, length: int) -> int:
        """The first token that the ring still holds when there are `length`."""
        return max(self.packed - self.in_ring, length - self.scheme.ring_rows(self.config))

    def _set_pages(self, pages: int) -> None:
        s = self.shape
        self.shape = CacheShape(
            batch_size=s.batch_size,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            pages=pages,
            dtype=s.dtype,
            device=s.device,
        )
        self.specs = self.scheme.state_spec(self.config, self.role, self.shape)
        self.storage = object()


def make_room(halves: Sequence[CacheHalf], needed: int) -> None:
    """Grow halves to the one capacity that all of a call share: `needed` pages or more."""
    held = {half.shape.pages for half in halves}
    pages = pages_to_allocate(needed, max(held))
    if held != {pages}:
        for half in halves:
            half.grow(pages)


def near(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor from where it can be queued to a device: without this the host would wait for the copy."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def queue_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; the copy is queued."""
    return near(tensor, device).to(device, non_blocking=True)


def pages_to_allocate(needed: int, held: int) -> int:
    """Pages to hold when `needed` do not fit into `held`: an eighth more than needed, and one more at least.

    A growth copies the cache, and a recorded step is recorded anew, which takes the host as long as many steps take the
    device. A cache that is new has no room to spare: it may never be appended to.
    """
    if needed <= held:
        return held
    return max(MIN_PAGES, needed + (max(1, needed // 8) if held else 0))
