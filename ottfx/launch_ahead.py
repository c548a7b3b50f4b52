"""`LaunchAhead`: starts the recording of a decode step as soon as the model is called.

Before a graph runs, Dynamo checks its guards on every layer's cache and fetches every input, and the device waits for
the host meanwhile. So a call that looks like one more step of the same cache is launched first and checked while the
device works. If it is another step after all, nothing is lost: what was launched has written one token behind the last
one of its storage, where the next append writes whatever it is, and nothing else. A step in which a group is due, or
room is short, would write more, and is never launched ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ottfx.cache_state import Payload
from ottfx.step_graph import LaunchedStep, StepGraph, counters

MOST_MISSES = 8
"""Launches in vain after which a compiled model is no longer launched ahead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """One more step of the same cache, before it is asked for."""

    graph: StepGraph
    copied: Mapping[int, Tensor]
    """Position among the graph's arguments -> tensor that is copied into a buffer, as far as it is known already."""
    sources: Mapping[int, tuple[str | int, tuple[int | None, ...]]]
    """Position -> name of the model's argument that it will be, and its shape; None for a size that may vary."""
    weights: list[Tensor]
    payloads: Sequence[weakref.ref[Payload]]
    """The caches that the last step returned, in the order of the graph's storage."""


@dataclass(slots=True)
class LaunchAhead:
    """What one compiled model was called with, and what it will probably be called with next. One call at a time."""

    _inputs: dict[Any, Any] = field(default_factory=dict)
    _likes: dict[Any, Any] = field(default_factory=dict)
    _next: NextStep | None = None
    _launched: tuple[StepGraph, LaunchedStep] | None = None
    _misses: int = 0

    def open(self, args: Sequence[Any], kwargs: dict[Any, Any]) -> None:
        """Note the arguments of a call that begins, and launch it if it looks like the expected one."""
        self._inputs = {**dict(enumerate(args)), **kwargs}
        step, self._next = self._next, None
        if step is None or self._misses >= MOST_MISSES or not _are_like(self._inputs, self._likes):
            return
        copied = dict(step.copied)
        for position, (name, shape) in step.sources.items():
            copied[position] = tensor = self._inputs[name]
            if len(tensor.shape) != len(shape) or any(
                size is not None and size != now for size, now in zip(shape, tensor.shape, strict=True)
            ):
                return
        halves = []
        for reference in step.payloads:
            payload = reference()
            if payload is None or payload.half.high != payload.length:
                return
            halves.append(payload.half)
        launched = step.graph.launch(step.weights, [half.storage for half in halves], copied)
        if launched is not None:
            self._launched = step.graph, launched
            for half in halves:
                half.overwrite(half.high + 1)

    def close(self) -> None:
        """Forget the call, which has ended."""
        self._inputs = {}
        if self._launched is None:
            return
        graph, launched = self._launched
        self._launched = None
        graph.forget_launched()
        if not launched.is_taken:
            self._misses += 1
            counters["misses"] += 1

    def expect(
        self, graph: StepGraph, arguments: Sequence[Any], lengths: Mapping[int, Tensor], payloads: Sequence[Payload]
    ) -> None:
        """Say that the step which was just replayed may come again.

        Args:
            graph: what was replayed.
            arguments: its arguments.
            lengths: position among them -> the next value of what the model's arguments do not tell.
            payloads: the caches that the model gets back, in the order of the graph's storage.
        """
        names = {id(value): name for name, value in self._inputs.items() if isinstance(value, Tensor)}
        sources = {}
        for position, widened in graph.copied.items():
            if position in lengths:
                continue
            tensor = arguments[position]
            if id(tensor) not in names:
                # It was computed: nobody knows it before.
                return
            shape = tuple(None if axis == widened else size for axis, size in enumerate(tensor.shape))
            sources[position] = (names[id(tensor)], shape)
        self._likes = {name: _like(value) for name, value in self._inputs.items()}
        self._next = NextStep(
            graph=graph,
            copied=lengths,
            sources=sources,
            weights=[arguments[i] for i in graph.weights],
            payloads=[weakref.ref(payload) for payload in payloads],
        )


def _like(value: Any) -> Any:
    """What is kept of an argument, without keeping it alive."""
    if isinstance(value, Tensor):
        return value.dtype, value.device
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        # Like nothing.
        return object()


def _are_like(inputs: dict[Any, Any], likes: dict[Any, Any]) -> bool:
    if inputs.keys() != likes.keys():
        return False
    for name, value in inputs.items():
        like = likes[name]
        if isinstance(like, weakref.ref):
            if like() is not value:
                return False
        elif isinstance(value, Tensor):
            if like != (value.dtype, value.device):
                return False
        elif type(like) is not type(value) or like != value:
            return False
    return True
