"""What records the decode steps of a device: for CUDA, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """One recording."""

    def __init__(self, device: torch.device, pool: RecordingPool) -> None: ...

    def record(self, function: Callable[[], Sequence[Any]]) -> None:
        """Record what `function` does, without a lasting effect; RuntimeError if that cannot be done."""

    def replay(self) -> Sequence[Any]:
        """Do it, and return its results, which the next replay overwrites."""


class RecordingPool:
    """What the recordings of a compiled model share, as they run one after the other: memory, a stream to record on.

    A stream of its own for each would leave a cuBLAS workspace behind with each.
    """

    def __init__(self) -> None:
        self._memory: Any = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def memory(self) -> Any:
        """Return the pool of memory, made at first use."""
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        return self._memory

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a device, made at first use."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class CudaRecorder:
    """A CUDA graph."""

    def __init__(self, device: torch.device, pool: RecordingPool) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        self._results: Sequence[Any] = ()

    def record(self, function: Callable[[], Sequence[Any]]) -> None:
        """Capture the kernels that `function` launches."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._pool.stream(self._device)):
            self._graph.capture_begin(pool=self._pool.memory(), capture_error_mode="thread_local")
            try:
                self._results = function()
            finally:
                self._graph.capture_end()

    def replay(self) -> Sequence[Any]:
        """Launch them on the current stream."""
        self._graph.replay()
        return self._results


RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder}
"""Device type -> what records there. Graphs on other devices run as they are."""
