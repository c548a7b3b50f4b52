"""`ProgramCache`: the packed cache of a loaded program, all layers under one length, without handles."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf, make_room, pages_to_allocate, queue_to
from ottfx.errors import CacheError
from ottfx.registry import get_scheme
from ottfx.schemes.base import ROLES, CacheShape, Part, Scheme, SchemeConfig

Layer = tuple[CacheHalf, CacheHalf]


@dataclass(frozen=True, kw_only=True)
class CacheSite:
    """What a program knows of one attention that keeps a cache."""

    name: str
    config: SchemeConfig
    """With everything that varies by layer resolved (`at_layer`)."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def scheme(self) -> Scheme:
        """The scheme that stores it."""
        return get_scheme(self.config.scheme)


class ProgramCache:
    """Packed keys and values of every layer of a loaded program.

    It is written in place: each call of a program appends to it. `clone()` it first to continue one prompt twice.
    All halves hold the same number of tokens and share one capacity, counted in pages.

    Args:
        layers: (keys, values) of each layer, in the program's order; at least one.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = list(layers)
        # The names depend on schemes alone, and are asked for in every step.
        tree: Any = {"layers": [_by_role(layer) for layer in self._layers]}
        self._names = [".".join(map(str, path)) for path in optree.tree_paths(tree)]

    @classmethod
    def allocate(
        cls, sites: Sequence[CacheSite], batch_size: int, max_length: int = 0, device: torch.device | str = "cpu"
    ) -> ProgramCache:
        """Make an empty cache.

        Args:
            sites: one for each layer.
            batch_size: sequences.
            max_length: tokens that fit before the storage must grow.
            device: where the storage is.
        """
        # "cuda" becomes the device that tensors name.
        device = torch.empty(0, device=device).device
        pages = max(pages_to_allocate(site.scheme.pages_needed(site.config, max_length), 0) for site in sites)
        layers = []
        for site in sites:
            shape = CacheShape(
                batch_size=batch_size,
                num_kv_heads=site.num_kv_heads,
                head_dim=site.head_dim,
                pages=pages,
                dtype=site.dtype,
                device=device,
            )
            key, value = (CacheHalf.allocate(site.scheme, site.config, role, shape) for role in ROLES)
            layers.append((key, value))
        return cls(layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """(keys, values) of each layer."""
        return tuple(self._layers)

    @property
    def length(self) -> int:
        """Tokens stored, padding included."""
        return self._layers[0][0].high

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self._layers[0][0].shape.batch_size

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self._layers[0][0].shape.device

    @property
    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes held, spare capacity included, by what they are."""
        parts: dict[Part, int] = {}
        for half in self._halves():
            for part, size in half.bytes_by_part().items():
                parts[part] = parts.get(part, 0) + size
        return parts

    def __repr__(self) -> str:
        half = self._layers[0][0]
        return (
            f"ProgramCache(layers={len(self._layers)}, batch_size={self.batch_size}, length={self.length}, "
            f"device='{self.device}', stored={half.config.describe()})"
        )

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by name, such as "layers.0.key.key_codes", in the order in which programs and ops take them."""
        tensors = [tensor for half in self._halves() for tensor in half.tensors.values()]
        return dict(zip(self._names, tensors, strict=True))

    def lengths(self) -> Tensor:
        """(tokens stored, of which keys packed, values packed): int64 [layers, 3] on the device."""
        rows = [(key.high, key.packed, value.packed) for key, value in self._layers]
        return queue_to(torch.tensor(rows, dtype=torch.int64), self.device)

    def make_room(self, length: int) -> None:
        """Grow every half to one capacity in which `length` tokens fit; never shrinks."""
        halves = list(self._halves())
        make_room(halves, max(half.scheme.pages_needed(half.config, length) for half in halves))

    def advance(self, length: int) -> None:
        """Record that a program wrote the tokens up to `length`."""
        for half in self._halves():
            half.advance(length)

    def crop(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            CacheError: the cache does not hold so many tokens.
        """
        if not 0 <= length <= self.length:
            raise CacheError(
                f"ottfx.ProgramCache.crop: length must be from 0 to the {self.length} tokens stored. Got {length}."
            )
        for half in self._halves():
            half.rewind(length)

    def clone(self) -> ProgramCache:
        """Return a cache of the same content and capacity that shares no memory with this one."""
        return ProgramCache([_map_batch(layer, torch.clone) for layer in self._layers])

    def select(self, rows: Tensor) -> None:
        """Replace the sequences by those at `rows`, int64 [new batch size], in place; one may come several times.

        Raises:
            CacheError: `rows` is empty or names a sequence that is not there.
        """
        numbers = rows.tolist()
        if not numbers or not all(0 <= number < self.batch_size for number in numbers):
            raise CacheError(
                f"ottfx.ProgramCache.select: rows must be numbers of the {self.batch_size} sequences, 0 to "
                f"{self.batch_size - 1}, at least one. Got {numbers}."
            )
        rows = rows.to(self.device)
        # One layer at a time is held twice.
        for index in range(len(self._layers)):
            self._layers[index] = _map_batch(self._layers[index], lambda tensor: tensor.index_select(0, rows))

    def repeat_interleave(self, n: int) -> None:
        """Repeat each sequence `n` times, in place: a, a, b, b for n = 2."""
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(n))

    def _halves(self) -> Iterator[CacheHalf]:
        for layer in self._layers:
            yield from layer


def _by_role(layer: Layer) -> dict[str, OrderedDict[str, Tensor]]:
    # optree sorts the keys of a dict, and keeps the order of an OrderedDict.
    key, value = (OrderedDict(half.tensors) for half in layer)
    return {"key": key, "value": value}


def _map_batch(layer: Layer, function: Callable[[Tensor], Tensor]) -> Layer:
    key, value = layer
    return key.map_batch(function), value.map_batch(function)
