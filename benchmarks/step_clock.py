"""`StepClock`: where the time of a decode step of `generate` goes, without more waiting than `generate` does itself.

One step, as `generate` runs it:

    begun ---- forward ---- ended ---- choose a token ---- chosen ---- wait for the device, prepare inputs ---- begun

At each of the three moments the host's clock is read and an event recorded on the device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.timing import KernelProfile, synchronize


@dataclass(frozen=True)
class Moment:
    """A moment of the host, and when the device has done what it was given until then."""

    host: float
    """Seconds of `time.perf_counter`."""
    event: torch.cuda.Event | None
    """None on a CPU."""

    @staticmethod
    def now(device: str) -> Moment:
        """Take the moment."""
        event = None
        if device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return Moment(time.perf_counter(), event)

    def host_ms_until(self, later: Moment) -> float:
        """Return the milliseconds by the host's clock."""
        return 1e3 * (later.host - self.host)

    def ms_until(self, later: Moment) -> float:
        """Return the milliseconds on the device, which must have finished; by the host's clock on a CPU."""
        if self.event is None or later.event is None:
            return self.host_ms_until(later)
        return float(self.event.elapsed_time(later.event))


@dataclass(frozen=True)
class Step:
    """The moments of one token."""

    begun: Moment
    ended: Moment
    chosen: Moment


class StepClock(StoppingCriteria):
    """Notes the moments of each token, ends the timed part after some tokens, and profiles some tokens behind it.

    Args:
        device: `cuda` or `cpu`.
        timed: tokens of the timed part.
        profiled: tokens after it that run under the profiler (on CUDA), which slows the host down. Then it stops.
        at_end: called at the end of the timed part, when the device has finished.
    """

    def __init__(self, device: str, timed: int, profiled: int = 0, at_end: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._timed = timed
        self._last = timed + (profiled if device == "cuda" else 0)
        self._at_end = at_end
        self._begun: Moment | None = None
        self._ended: Moment | None = None
        self._tokens = 0
        self._start = 0.0
        self.steps: list[Step] = []
        """Of the timed tokens, the first one, which has the prompt, included."""
        self.seconds = 0.0
        """Wall time of the timed part."""
        self.kernels: KernelProfile | None = None
        """Of the profiled tokens."""

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
        """Give the arguments of one call of `generate` inside the block, in which the clock runs."""
        prepare = model.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def prepare_and_note(*args: Any, **kwargs: Any) -> Any:
            inputs = prepare(*args, **kwargs)
            self._begun = Moment.now(self._device)
            return inputs

        model.prepare_inputs_for_generation = prepare_and_note  # type: ignore[method-assign]
        synchronize(self._device)
        self._start = time.perf_counter()
        try:
            yield {
                "logits_processor": LogitsProcessorList([_NotesTheEnd(self)]),
                "stopping_criteria": StoppingCriteriaList([self]),
            }
        finally:
            del model.__dict__["prepare_inputs_for_generation"]

    def note_end(self) -> None:
        """Note that the forward pass has been given to the device."""
        self._ended = Moment.now(self._device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Called by `generate` with int64 [batch, tokens so far]; returns bool [batch], True to stop."""
        self._tokens += 1
        if self._tokens <= self._timed:
            assert self._begun is not None and self._ended is not None, "not attached to this call of generate"
            self.steps.append(Step(self._begun, self._ended, Moment.now(self._device)))
        if self._tokens == self._timed:
            synchronize(self._device)
            self.seconds = time.perf_counter() - self._start
            self._at_end()
            if self._last > self._timed:
                self.kernels = KernelProfile()
                self.kernels.start()
        stop = self._tokens >= self._last
        if stop and self.kernels is not None:
            self.kernels.stop()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """Return the time of each step after the first token, from choice to choice."""
        return [before.chosen.ms_until(after.chosen) for before, after in self._pairs()]

    def forward_milliseconds(self) -> list[float]:
        """Return the part of each step between the begin and the end of its forward pass, as the device sees it."""
        return [after.begun.ms_until(after.ended) for _, after in self._pairs()]

    def forward_host_milliseconds(self) -> list[float]:
        """Return how long the host took to call each step's forward pass; it does not wait for the device there."""
        return [after.begun.host_ms_until(after.ended) for _, after in self._pairs()]

    def _pairs(self) -> Iterator[tuple[Step, Step]]:
        return zip(self.steps, self.steps[1:], strict=False)


class _NotesTheEnd(LogitsProcessor):
    """Changes nothing; `generate` calls it right after the forward pass."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called with int64 [batch, tokens so far] and float [batch, vocabulary]; returns the latter."""
        self._clock.note_end()
        return scores
