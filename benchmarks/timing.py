"""Times on a device: of one call replayed from a CUDA graph with a cold L2, of a stretch of host code, of a read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20
"""More than the L2 of any card, so that every timed call reads from memory."""


def device_microseconds(
    function: Callable[[], Any],
    device: str,
    *,
    reset: Callable[[], Any] | None = None,
    seconds: float = 0.05,
    fewest: int = 7,
    most: int = 60,
) -> float:
    """Return the median time of one call, in microseconds.

    On CUDA the call is recorded as a CUDA graph and each replay timed with events: launches from the host cost nothing.
    Before each replay, outside of the timed region, `reset` runs and 256 MiB are written.

    Args:
        function: the call. It must find its inputs in place and leave them usable.
        device: `cuda` or `cpu`.
        reset: puts back what a call changes.
        seconds: about how long to measure.
        fewest: repetitions at least.
        most: repetitions at most.
    """
    reset = reset or _nothing
    timed = _timed_replay(function, reset) if device == "cuda" else _timed_call(function, reset)
    with torch.no_grad():
        estimate = statistics.median(timed() for _ in range(3))
        repetitions = int(min(most, max(fewest, seconds * 1e6 / max(estimate, 1.0))))
        return statistics.median(timed() for _ in range(repetitions))


def _nothing() -> None:
    return None


def _timed_call(function: Callable[[], Any], reset: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        reset()
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e6

    return timed


def _timed_replay(function: Callable[[], Any], reset: Callable[[], Any]) -> Callable[[], float]:
    with torch.no_grad():
        # Kernels are compiled and libraries made ready before the recording, on a stream like that of the recording.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            reset()
            function()
        torch.cuda.synchronize()
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        reset()
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return timed


class KernelProfile:
    """The time of each kernel between `start` and `stop`, on a CUDA device."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self.microseconds: dict[str, float] = {}
        """Of all kernels of a name, copies and fills of memory included."""

    def start(self) -> None:
        """Begin, when the device has finished what it was given."""
        torch.cuda.synchronize()
        self._profile.start()

    def stop(self) -> None:
        """Wait for the device, and add up."""
        torch.cuda.synchronize()
        self._profile.stop()
        self.microseconds = kernel_times(self._profile.key_averages())


def kernel_times(averages: Iterable[Any]) -> dict[str, float]:
    """Return the microseconds of what ran on the device, by name; ranges that were only marked do not count."""
    cuda = torch.autograd.DeviceType.CUDA
    return {
        event.key: event.device_time_total
        for event in averages
        if event.device_type == cuda and event.device_time_total > 0 and not event.is_user_annotation
    }


def kernel_microseconds(
    function: Callable[[], Any], device: str, *, reset: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Return the time of each kernel of one call in microseconds, by name; nothing on the CPU.

    A plain run under the profiler: kernels of one name are added up, and caches are as the call before left them.
    `reset` puts back what a call changes, outside of the profile.
    """
    if device != "cuda":
        return {}
    reset = reset or _nothing
    reset()
    function()
    reset()
    profiled = KernelProfile()
    profiled.start()
    function()
    profiled.stop()
    return profiled.microseconds


def read_microseconds(data: Tensor, device: str) -> float:
    """Return how long it takes to read a tensor once: `torch.sum` over its bytes as float32."""
    words = data.reshape(-1).view(torch.float32)
    return device_microseconds(lambda: torch.sum(words), device)


def read_ceiling(device: str, nbytes: int = 2 << 30) -> float:
    """Return the bytes a second of a plain read of `nbytes`, by which other reads are judged."""
    data = torch.zeros(nbytes // 4, device=device)
    return nbytes / read_microseconds(data, device) * 1e6


def synchronize(device: str) -> None:
    """Wait until the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def host_seconds(function: Callable[[], Any], device: str) -> float:
    """Return the wall time of one call and of the work on the device that it started."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def allocated_bytes(device: str) -> int:
    """Return the bytes of all tensors on the device; 0 on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_bytes(device: str, base: int) -> int | None:
    """Return the most bytes of tensors at once since `reset_peak`, less `base` of them; None on the CPU."""
    return torch.cuda.max_memory_allocated() - base if device == "cuda" else None


def reset_peak(device: str) -> None:
    """Start counting for `peak_bytes`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
