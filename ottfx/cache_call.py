"""`CacheCall`: one call of a rewritten Dynamo graph, with the packed state found, grown and handed in around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf, Payload, make_room, near, pages_to_allocate, queue_to
from ottfx.errors import CacheError
from ottfx.kv_tensor import KVTensor
from ottfx.launch_ahead import LaunchAhead
from ottfx.schemes.base import ROLES, CacheShape, Role, Scheme, SchemeConfig
from ottfx.size_reader import Reader
from ottfx.step_graph import StepGraph

LENGTHS_WIDTH = 4
"""Numbers of a row of the lengths: three, and one that nothing reads. Kernels want rows that start at 16 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCall:
    """What a call needs to know of one rewritten attention."""

    name: str
    scheme: Scheme
    config: SchemeConfig
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    past: tuple[int, int] | None
    """Positions of the stored keys and values among the call's arguments; None for a fresh prompt."""
    batch_size: Reader
    q_len: Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class StateInput:
    """One added input of the rewritten graph."""

    kind: Literal["state", "lengths", "past_length", "pages"]
    row: int = 0
    role: Role = "key"
    name: str = ""


_Row = tuple[int, int, int, int]
"""Lengths of a site: past, packed keys, packed values, and what nobody reads."""


class _Cache(NamedTuple):
    """Both halves of one site, ready to be written behind `past` tokens."""

    halves: tuple[CacheHalf, CacheHalf]
    past: int
    q_len: int


class CacheCall:
    """Callable with the arguments and results of the graph that Dynamo captured.

    Before the graph: opens each site's halves for appending (copying a branch, forgetting what was cropped, packing
    what eager code appended, importing a dense cache), makes room, and writes all lengths to the device in one copy.
    After it: wraps the halves in `KVTensor`s where the graph used to return dense tensors.

    Args:
        inner: the compiled rewritten graph, or its recordings.
        sites: one for each row of `lengths`.
        kept_arguments: positions of the captured graph's arguments that the inner graph still takes, in its order.
        added_inputs: what it takes behind them.
        num_outputs: results of the captured graph.
        cache_outputs: result position -> (row, role), for the results that are caches now.
        ahead: launches the next call, where `inner` is recorded.
    """

    def __init__(
        self,
        inner: Callable[..., Any] | StepGraph,
        sites: Sequence[SiteCall],
        kept_arguments: Sequence[int],
        added_inputs: Sequence[StateInput],
        num_outputs: int,
        cache_outputs: dict[int, tuple[int, Role]],
        ahead: LaunchAhead | None = None,
    ) -> None:
        self._inner = inner
        self._ahead = ahead
        self._next_lengths: tuple[list[_Row], Tensor] | None = None
        self._sites = tuple(sites)
        stored = {(type(site.scheme), site.config): (site.scheme, site.config) for site in sites}
        self._stored = list(stored.values())
        self._stored_as = [list(stored).index((type(site.scheme), site.config)) for site in sites]
        self._kept = tuple(kept_arguments)
        placed = list(enumerate(added_inputs, len(self._kept)))
        self._state = [(i, x.row, ROLES.index(x.role), x.name) for i, x in placed if x.kind == "state"]
        self._others = [(i, x) for i, x in placed if x.kind != "state"]
        self._kept_outputs = [i for i in range(num_outputs) if i not in cache_outputs]
        self._num_outputs = num_outputs
        self._cache_outputs = [(i, row, ROLES.index(role)) for i, (row, role) in cache_outputs.items()]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph on Dynamo's arguments."""
        caches = [_open(site, args) for site in self._sites]
        halves = [half for cache in caches for half in cache.halves]
        longest = max([cache.past + cache.q_len for cache in caches])
        make_room(halves, max([scheme.pages_needed(config, longest) for scheme, config in self._stored]))
        lengths = self._lengths([_row(cache.halves) for cache in caches])
        arguments = [args[i] for i in self._kept] + [None] * (len(self._state) + len(self._others))
        for i, added in self._others:
            if added.kind == "lengths":
                arguments[i] = lengths
            elif added.kind == "pages":
                arguments[i] = caches[0].halves[0].shape.pages
            else:
                arguments[i] = caches[added.row].past

        def state() -> list[Tensor]:
            return [caches[row].halves[half].tensors[name] for _, row, half, name in self._state]

        if isinstance(self._inner, StepGraph):
            results = self._inner(arguments, [half.storage for half in halves], state)
        else:
            for (i, *_), tensor in zip(self._state, state(), strict=True):
                arguments[i] = tensor
            results = self._inner(*arguments)
        for cache in caches:
            for half in cache.halves:
                half.advance(cache.past + cache.q_len)
        outputs: list[Any] = [None] * self._num_outputs
        for i, result in zip(self._kept_outputs, results, strict=True):
            outputs[i] = result
        for i, row, half_index in self._cache_outputs:
            half = caches[row].halves[half_index]
            outputs[i] = KVTensor.from_payload(Payload(half, half.high))
        if isinstance(self._inner, StepGraph) and self._ahead is not None:
            self._expect_next(self._inner, self._ahead, arguments, caches, outputs)
        return tuple(outputs)

    def _expect_next(
        self, graph: StepGraph, ahead: LaunchAhead, arguments: list[Any], caches: list[_Cache], outputs: Sequence[Any]
    ) -> None:
        """Prepare for one more token of the same caches, if nothing else will be written with it."""
        payloads = {(row, half): outputs[i].payload for i, row, half in self._cache_outputs}
        if len(payloads) != 2 * len(caches):
            return
        rows = [_row(cache.halves) for cache in caches]
        for index, (past, *packed, _) in {*zip(self._stored_as, rows, strict=True)}:
            scheme, config = self._stored[index]
            fits = scheme.pages_needed(config, past + 1) <= caches[0].halves[0].shape.pages
            due = [scheme.packed_length(config, role, past + 1, n) != n for role, n in zip(ROLES, packed, strict=True)]
            if not fits or any(due):
                return
        lengths = self._lengths(rows)
        self._next_lengths = rows, lengths
        copied = {i: lengths for i, added in self._others if added.kind == "lengths"}
        in_order = [payloads[row, half] for row in range(len(caches)) for half in range(2)]
        ahead.expect(graph, arguments, copied, in_order)

    def _lengths(self, rows: list[_Row]) -> Tensor:
        if self._next_lengths is not None and self._next_lengths[0] == rows:
            return self._next_lengths[1]
        # `torch.tensor` takes twice as long.
        lengths, device = torch.from_numpy(np.array(rows, dtype=np.int64)), self._sites[0].device
        # A recorded step copies it into a buffer of its own.
        return near(lengths, device) if isinstance(self._inner, StepGraph) else queue_to(lengths, device)


def _row(halves: tuple[CacheHalf, CacheHalf]) -> _Row:
    key, value = halves
    return key.high, key.packed, value.packed, 0


def _open(site: SiteCall, args: Sequence[Any]) -> _Cache:
    q_len = site.q_len(args)
    if site.past is None:
        halves = [_allocate(site, role, site.batch_size(args), q_len) for role in ROLES]
        return _Cache(halves=(halves[0], halves[1]), past=0, q_len=q_len)
    key, value = site.past
    past = args[key], args[value]
    open_halves = _open_already(*past)
    if open_halves is not None:
        return _Cache(open_halves, open_halves[0].high, q_len)
    lengths = [p.shape[2] for p in past]
    if lengths[0] != lengths[1]:
        raise CacheError(
            f"ottfx: {site.name}: keys and values of one layer must have the same length. "
            f"Got {lengths[0]} keys and {lengths[1]} values. Crop and append both together."
        )
    halves = []
    tails: list[Tensor | None] = []
    for role, tensor in zip(ROLES, past, strict=True):
        half, tail = _split(site, role, tensor, q_len)
        halves.append(half)
        tails.append(tail)
    stored = halves[0].high
    if halves[1].high != stored or (tails[0] is None) != (tails[1] is None):
        raise CacheError(
            f"ottfx: {site.name}: keys and values of one layer come from different steps of a cache "
            f"({stored} and {halves[1].high} packed tokens). Pass the pair that one forward call returned."
        )
    key_tail, value_tail = tails
    if key_tail is not None and value_tail is not None and key_tail.shape[2] > 0:
        _pack_tail(site, halves, key_tail, value_tail)
    return _Cache(halves=(halves[0], halves[1]), past=halves[0].high, q_len=q_len)


def _open_already(key: Tensor, value: Tensor) -> tuple[CacheHalf, CacheHalf] | None:
    """The halves of two handles that see all of them, as in every step of plain decoding; otherwise None."""
    if type(key) is not KVTensor or type(value) is not KVTensor:
        return None
    k, v = key.payload, value.payload
    if k is None or v is None or k.tail is not None or v.tail is not None:
        return None
    return (k.half, v.half) if k.half.high == k.length == v.length == v.half.high else None


def _split(site: SiteCall, role: Role, tensor: Tensor, q_len: int) -> tuple[CacheHalf, Tensor | None]:
    """Storage of a past and the tokens of it that are still dense."""
    if not isinstance(tensor, KVTensor):
        return _allocate(site, role, tensor.shape[0], tensor.shape[2] + q_len), tensor
    payload = tensor.payload
    assert payload is not None, "a traced KVTensor reached run time"
    return payload.open_for_append(), payload.tail


def _allocate(site: SiteCall, role: Role, batch_size: int, length: int) -> CacheHalf:
    shape = CacheShape(
        batch_size=batch_size,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        pages=pages_to_allocate(site.scheme.pages_needed(site.config, length), 0),
        dtype=site.dtype,
        device=site.device,
    )
    return CacheHalf.allocate(site.scheme, site.config, role, shape)


def _pack_tail(site: SiteCall, halves: list[CacheHalf], key: Tensor, value: Tensor) -> None:
    """Append tokens that eager code put behind a handle, or a whole dense cache, to the packed storage."""
    past = halves[0].high
    total = past + key.shape[2]
    for half in halves:
        half.grow(pages_to_allocate(site.scheme.pages_needed(site.config, total), half.shape.pages))
    lengths = queue_to(torch.tensor([[past, halves[0].packed, halves[1].packed]]), site.device)
    state = [tensor for half in halves for tensor in half.tensors.values()]
    with torch.no_grad():
        site.scheme.append_op(key, value, None, lengths, 0, *state, *site.scheme.constants(site.config))
    for half in halves:
        half.advance(total)
