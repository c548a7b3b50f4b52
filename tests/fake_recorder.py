"""A stand-in for CUDA graphs: recording has no effect, replaying calls what was recorded with the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ottfx import step_graph
from ottfx.recorders import RECORDERS, RecordingPool


class FakeRecorder:
    """Remembers the call itself."""

    def __init__(self, device: torch.device, pool: RecordingPool) -> None:
        self._function: Callable[[], Sequence[Any]] | None = None

    def record(self, function: Callable[[], Sequence[Any]]) -> None:
        self._function = function

    def replay(self) -> Sequence[Any]:
        assert self._function is not None
        return self._function()


@contextmanager
def recording_on_cpu(recorder: type = FakeRecorder) -> Iterator[None]:
    """Record decode steps on the CPU, and count from zero."""
    RECORDERS["cpu"] = recorder
    step_graph.counters.clear()
    try:
        yield
    finally:
        del RECORDERS["cpu"]
        step_graph.counters.clear()
