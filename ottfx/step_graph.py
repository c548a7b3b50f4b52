"""`StepGraph`: runs a decode graph whose arguments differ in content alone by replaying a recording of it.

A CUDA graph knows addresses. So arguments that come at new addresses in each step are copied into buffers; weights and
packed storage stay where they are, and a recording holds for one set of their addresses. The first step at new
addresses runs as it is (it compiles kernels), the second is recorded and replayed, later ones are replayed. Where a
recorded cache has only grown, kernels are there already, and its first step is recorded. Whatever happens, a step runs
once.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ottfx.recorders import RECORDERS, Recorder, RecordingPool
from ottfx.schemes.base import PAGE

log = logging.getLogger("ottfx")

MOST_RECORDINGS = 4
"""Recordings that a compiled graph keeps: of the sets of addresses that were used last."""

counters: Counter[str] = Counter()
"""How often, in this process: `warmups`, `recordings`, `replays`, and `refusals` of graphs that cannot be recorded; of
the replays, those `ahead` of the call; `misses` were launched ahead in vain."""


InputKind = Literal["weight", "state", "copied", "number"]
"""`weight` and `state` are used where they are, `copied` comes from anywhere, a `number` is an int."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """One argument of the graph."""

    kind: InputKind
    widened: int | None = None
    """Of a copied tensor: the axis along which the graph takes as many entries as the storage has room for tokens."""
    below_capacity: int | None = None
    """Of a number that is always to be this much less than the tokens that the storage has room for."""


class _Step:
    """Buffers and, once it is recorded, the recording for one set of addresses."""

    __slots__ = ("buffers", "has_run", "is_due", "numbers", "recorder", "storages", "weights")

    def __init__(self, numbers: list[int], weights: list[int], buffers: list[tuple[int, Tensor]]) -> None:
        self.numbers = numbers
        self.weights = weights
        self.buffers = buffers
        self.storages: list[object] = []
        self.has_run = False
        self.is_due = False
        """Whether the next call is to be recorded."""
        self.recorder: Recorder | None = None


@dataclass(slots=True)
class LaunchedStep:
    """A replay that was started before the call that takes its results."""

    inputs: dict[int, tuple[Tensor, int]]
    """Position -> what was copied, and its version."""
    results: Sequence[Any]
    is_taken: bool = False

    def serves(self, arguments: Sequence[Any]) -> bool:
        """Whether the copied arguments of a call are what was copied."""
        return all(arguments[i] is x and _version(x) == version for i, (x, version) in self.inputs.items())


class StepGraph:
    """A compiled decode graph, recorded. One call at a time.

    Attributes:
        weights: positions of the arguments that are weights.
        copied: position of each copied argument -> its axis that the graph takes wider, or None.

    Args:
        inner: the compiled graph; for the same weights, state and numbers it reads and writes the same memory.
        inputs: its arguments, in order. A number is a size: of the batch or of the storage.
        pages: position of the argument that counts the pages of the storage.
        device: of all tensors.
        pool: memory for intermediate results.
    """

    def __init__(
        self,
        inner: Callable[..., Sequence[Any]],
        inputs: Sequence[StepInput],
        pages: int,
        device: torch.device,
        pool: RecordingPool,
    ) -> None:
        self._inner = inner
        self._pages = pages
        self._device = device
        self._pool = pool
        positions: dict[str, list[int]] = {"weight": [], "state": [], "copied": [], "number": []}
        for i, x in enumerate(inputs):
            positions[x.kind].append(i)
        self.weights, self._state, copied, self._numbers = positions.values()
        self.copied = {i: inputs[i].widened for i in copied}
        self._below_capacity = [(i, below) for i, x in enumerate(inputs) if (below := x.below_capacity) is not None]
        of_capacity = {pages, *(i for i, _ in self._below_capacity)}
        self._other_sizes = [n for n, i in enumerate(self._numbers) if i not in of_capacity]
        self._recorded: OrderedDict[tuple[int, ...], _Step] = OrderedDict()
        self._last: _Step | None = None
        self._launched: LaunchedStep | None = None
        self._is_recordable = True

    def __call__(
        self, arguments: list[Any], storages: list[object], state: Callable[[], Sequence[Tensor]]
    ) -> list[Any]:
        """Run one step.

        Args:
            arguments: of the graph, with anything in place of the state. Copied tensors may be on the host, in pinned
                memory.
            storages: objects that are others whenever state tensors are others.
            state: gives the state tensors in order. They are many, and a step that is replayed needs none of them.

        Returns:
            The results of the graph, the caller's own.
        """
        capacity = arguments[self._pages] * PAGE
        for i, below in self._below_capacity:
            arguments[i] = capacity - below
        numbers = [arguments[i] for i in self._numbers]
        tensors = [arguments[i] for i in self.weights]
        launched, self._launched = self._launched, None
        step = self._last
        if step is None or step.numbers != numbers or step.storages != storages or not _are_at(tensors, step.weights):
            weights = [tensor.data_ptr() for tensor in tensors]
            self._put(state(), arguments)
            has_grown = step is not None and self._differs_in_capacity(step, numbers, weights)
            step = self._last = self._find(arguments, numbers, weights)
            step.storages = storages
            step.is_due = step.is_due or has_grown
        elif launched is not None and launched.serves(arguments):
            launched.is_taken = True
            counters["replays"] += 1
            counters["ahead"] += 1
            return _own(launched.results)
        for i, buffer in step.buffers:
            _copy(arguments[i], buffer, self.copied[i])
        if step.recorder is None:
            # The caller's list says where each one came from.
            arguments = list(arguments)
            self._put(state(), arguments)
            for i, buffer in step.buffers:
                arguments[i] = buffer
            if not (step.is_due and self._is_recordable and self._record(step, arguments)):
                step.is_due = step.has_run = True
                counters["warmups"] += 1
                return _own(self._inner(*arguments))
        assert step.recorder is not None
        counters["replays"] += 1
        return _own(step.recorder.replay())

    def launch(
        self, weights: list[Tensor], storages: list[object], copied: Mapping[int, Tensor]
    ) -> LaunchedStep | None:
        """Replay the last step before it is called again. The next call takes the results if they are its own.

        Args:
            weights: the arguments that are weights, as they were.
            storages: as for a call.
            copied: all copied arguments of the call that is expected.

        Returns:
            None if nothing was done: the last step has no recording, or one for other addresses.
        """
        step = self._last
        if step is None or step.recorder is None or step.storages != storages or not _are_at(weights, step.weights):
            return None
        for i, buffer in step.buffers:
            _copy(copied[i], buffer, self.copied[i])
        inputs = {i: (x, _version(x)) for i, x in copied.items()}
        self._launched = LaunchedStep(inputs, step.recorder.replay())
        return self._launched

    def forget_launched(self) -> None:
        """Let no later call take the results of a launch: the next replay overwrites them."""
        self._launched = None

    def _put(self, state: Sequence[Tensor], arguments: list[Any]) -> None:
        for i, tensor in zip(self._state, state, strict=True):
            arguments[i] = tensor

    def _find(self, arguments: list[Any], numbers: list[int], weights: list[int]) -> _Step:
        """The step that was recorded for these addresses, or a new one."""
        key = self._key(arguments, numbers, weights)
        step = self._recorded.get(key)
        if step is not None:
            self._recorded.move_to_end(key)
            return step
        # Buffers made in inference mode could not be written to later outside it.
        with torch.inference_mode(False):
            buffers = [(i, self._buffer(arguments[i], axis, arguments[self._pages])) for i, axis in self.copied.items()]
        return _Step(numbers, weights, buffers)

    def _differs_in_capacity(self, step: _Step, numbers: list[int], weights: list[int]) -> bool:
        """Whether a recorded step was of the same kind as these, but for the room in its storage."""
        same = [step.numbers[n] == numbers[n] for n in self._other_sizes]
        return step.recorder is not None and step.numbers != numbers and step.weights == weights and all(same)

    def _key(self, arguments: list[Any], numbers: list[int], weights: list[int]) -> tuple[int, ...]:
        return (*numbers, *weights, *(arguments[i].data_ptr() for i in self._state))

    def _buffer(self, like: Tensor, widened: int | None, pages: int) -> Tensor:
        shape = list(like.shape)
        if widened is not None:
            shape[widened] = pages * PAGE
        return torch.zeros(shape, dtype=like.dtype, device=self._device)

    def _record(self, step: _Step, arguments: list[Any]) -> bool:
        """Record a step; say whether that was possible."""
        try:
            try:
                recorder = self._recording(arguments)
            except torch.OutOfMemoryError:
                # What the allocator keeps for other sizes is out of reach of a recording.
                torch.cuda.empty_cache()
                recorder = self._recording(arguments)
        except RuntimeError as error:
            if not step.has_run:
                log.debug("a step of a grown cache could not be recorded at once: %s", error)
                return False
            self._is_recordable = False
            counters["refusals"] += 1
            log.warning("ottfx: a decode step could not be recorded and runs as without a mode: %s", error)
            return False
        counters["recordings"] += 1
        step.recorder = recorder
        self._recorded[self._key(arguments, step.numbers, step.weights)] = step
        while len(self._recorded) > MOST_RECORDINGS:
            self._recorded.popitem(last=False)
        return True

    def _recording(self, arguments: list[Any]) -> Recorder:
        recorder = RECORDERS[self._device.type](self._device, self._pool)
        recorder.record(lambda: self._inner(*arguments))
        return recorder


def _copy(source: Tensor, buffer: Tensor, widened: int | None) -> None:
    if widened is not None:
        size = min(source.shape[widened], buffer.shape[widened])
        source, buffer = source.narrow(widened, 0, size), buffer.narrow(widened, 0, size)
    buffer.copy_(source, non_blocking=True)


def _are_at(tensors: list[Tensor], addresses: list[int]) -> bool:
    """Whether tensors are at these addresses."""
    if _COMPARE is None:
        return [tensor.data_ptr() for tensor in tensors] == addresses
    return _COMPARE(tensors, addresses, list(range(len(addresses))))


# There are hundreds of weights. Torch for a CPU does not have it.
_COMPARE = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where torch does not count it."""
    return -1 if tensor.is_inference() else tensor._version


def _own(results: Sequence[Any]) -> list[Any]:
    return [result.clone() if isinstance(result, Tensor) else result for result in results]
