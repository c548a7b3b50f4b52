"""`Generation`: whole calls of `generate` on one model, timed, counted, and tried for whether they fit."""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.utils import counters as dynamo_counters
from transformers import PreTrainedModel

import ottfx
import ottfx.step_graph
from benchmarks.compiled_kernels import storing_microseconds
from benchmarks.configurations import QUANTIZED, Configuration, Quantization, configured, fill_cache, new_cache
from benchmarks.runner import free_memory
from benchmarks.search import largest_that_fits
from benchmarks.step_clock import StepClock
from benchmarks.timing import allocated_bytes, peak_bytes, reset_peak

WARM_UP_TOKENS = 8
"""Tokens of the run that compiles: enough for CUDA graphs to be recorded."""
TRIED_TOKENS = 3
"""Tokens that are decoded to see whether a size fits."""
PRECISION = 1 / 16
"""Relative, of a search."""
ATTEMPTS = 4
"""Measurements of smaller and smaller sizes, if the largest that fits fails for want of memory in the end."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated."""

    batch_size: int
    start: int
    """Tokens of the prompt, or of the synthetic cache."""
    synthetic: bool
    """Whether the cache starts with random content and no prompt is run."""
    new_tokens: int

    @property
    def ids(self) -> int:
        """Tokens that `generate` is given: those in the cache and the one to begin with, or the prompt."""
        return self.start + self.synthetic


class Generation:
    """One model, measured in any configuration.

    Args:
        model: its weights are shared by all measurements.
        quantization: of packed caches.
        profiled: tokens behind the timed ones of which the kernels are timed; on CUDA only.
        read_ceiling: bytes a second of a plain read on this device.
    """

    def __init__(
        self, model: PreTrainedModel, quantization: Quantization, *, profiled: int, read_ceiling: float
    ) -> None:
        self.model = model
        self.quantization = quantization
        self.profiled = profiled
        self.read_ceiling = read_ceiling
        self.device: str = model.device.type

    def measure(self, way: Configuration, workload: Workload) -> dict[str, Any]:
        """Run once to compile, once to measure."""
        warm_up_tokens = min(WARM_UP_TOKENS, workload.new_tokens)
        base = allocated_bytes(self.device)
        refusals = ottfx.step_graph.counters["refusals"]
        held: dict[str, Any] = {}
        with configured(self.model, way, self.quantization), torch.no_grad():
            past = self._filled(way, self._empty(way, workload), workload)
            cold = StepClock(self.device, warm_up_tokens)
            past = self._run(past, workload, cold)
            if way.cache == "static":
                # Compiled code is for one static cache; with another at another address it would be compiled again.
                past.reset()
            else:
                del past
                free_memory()
                past = self._empty(way, workload)
            past = self._filled(way, past, workload)

            def at_end() -> None:
                held["peak_bytes"] = peak_bytes(self.device, base)
                held["cache_bytes"] = ottfx.memory_footprint(past).total if way.cache not in QUANTIZED else None

            clock = StepClock(self.device, workload.new_tokens, self.profiled, at_end)
            counts = _counts()
            reset_peak(self.device)
            past = self._run(past, workload, clock)
            counts = {name: value - counts[name] for name, value in _counts().items()}
            if way.cache in QUANTIZED and self.device == "cuda":
                # Their tensors are out of reach: what is allocated while only the cache lives.
                gc.collect()
                held["cache_bytes"] = allocated_bytes(self.device) - base
        row = _times(clock, workload, self.profiled)
        run_seconds = (row["first_token_s"] + row["step_ms"] * (warm_up_tokens - 1) / 1e3) if row["step_ms"] else 0.0
        row |= {**held, "compile_s": max(0.0, cold.seconds - run_seconds), "graphs_compiled": counts["graphs_compiled"]}
        row |= {"floor_ms": self._floor_ms(held["cache_bytes"], workload), "read_GB_s": self.read_ceiling / 1e9}
        if way.cache == "packed":
            row |= {"scheme": self.quantization.config().describe()}
        if way.cache == "packed" and way.mode is not None:
            row |= {name: counts[name] for name in ("recordings", "replays", "warmups")}
            row |= {"refusals": ottfx.step_graph.counters["refusals"] - refusals}
        return row

    def _floor_ms(self, cache_bytes: int | None, workload: Workload) -> float | None:
        """Time of one read of the weights and of the cache halfway through the timed tokens, in milliseconds."""
        if cache_bytes is None:
            return None
        final = workload.start + workload.new_tokens
        halfway = cache_bytes * (workload.start + workload.new_tokens / 2) / final
        return 1e3 * (weight_bytes(self.model) + halfway) / self.read_ceiling

    def measure_largest(
        self, way: Configuration, make: Callable[[int], Workload], *, start: int, most: int
    ) -> tuple[Workload, dict[str, Any]]:
        """Find the largest workload that fits, and measure it; a smaller one, if that lacks memory in the end.

        Args:
            way: the configuration.
            make: from a size to the workload.
            start: the size that is tried first.
            most: the largest that is tried.

        Returns:
            What was measured, and the columns of `measure` with `stopped_by`: what went wrong with the next size.

        Raises:
            RuntimeError: nothing fits.
        """
        stopped_by = "the largest size that is tried"

        def fits(size: int) -> bool:
            nonlocal stopped_by
            error = self._try(trying, make(size))
            stopped_by = error or stopped_by
            print(f"  {size:,}: {error or 'fits'}", flush=True)
            return error is None

        # What CUDA graphs, or compiled code of others, take beside shows in the measurement.
        trying = replace(way, mode=None) if way.compiled == "ottfx" else replace(way, compiled="no")
        with configured(self.model, trying, self.quantization), torch.no_grad():
            size = largest_that_fits(fits, start=start, most=most, precision=PRECISION)
        for _ in range(ATTEMPTS):
            if size < 1:
                break
            try:
                return make(size), self.measure(way, make(size)) | {"stopped_by": stopped_by}
            except torch.OutOfMemoryError:
                print(f"  {size:,}: out of memory in the measurement", flush=True)
            free_memory()
            size -= max(1, int(size * PRECISION))
        raise RuntimeError(f"nothing fits: {stopped_by}")

    def _try(self, way: Configuration, workload: Workload) -> str | None:
        """Run the prompt, then a few tokens at the final length; return what went wrong."""
        full = replace(workload, start=workload.start + workload.new_tokens - TRIED_TOKENS, synthetic=True)
        # A static cache has its final size from the beginning.
        parts = [workload] if workload.synthetic or way.cache == "static" else [workload, full]
        error = None
        for part in parts:
            try:
                self._decode_a_little(way, part)
            except torch.OutOfMemoryError:
                error = "out of memory"
            except RuntimeError as problem:  # a size that a kernel does not take
                error = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
            free_memory()
            if error:
                break
        return error

    def _decode_a_little(self, way: Configuration, workload: Workload) -> None:
        """Generate a few tokens. No local variable of the caller may hold a cache: it would not be freed."""
        tried = replace(workload, new_tokens=TRIED_TOKENS)
        past = self._filled(way, self._empty(way, workload), tried)
        self._run(past, tried, StepClock(self.device, TRIED_TOKENS), disable_compile=True)

    def _empty(self, way: Configuration, workload: Workload) -> Any:
        return new_cache(self.model, way, workload.ids + workload.new_tokens + self.profiled)

    def _filled(self, way: Configuration, past: Any, workload: Workload) -> Any:
        if workload.synthetic:
            size = {
                "batch_size": workload.batch_size,
                "length": workload.start,
                "room": workload.new_tokens + self.profiled,
            }
            fill_cache(past, self.model, way, self.quantization, **size)
        return past

    def _run(self, past: Any, workload: Workload, clock: StepClock, **options: Any) -> Any:
        """Generate under a clock; return the cache."""
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(1, vocabulary, (workload.batch_size, workload.ids), device=self.device)
        with clock.attached(self.model) as arguments:
            result: Any = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=past,
                max_new_tokens=workload.new_tokens + self.profiled,
                do_sample=False,
                return_dict_in_generate=True,
                **arguments,
                **options,
            )
        return result.past_key_values


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that a decode step reads: all but an embedding that is not the output's, too."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = embedding.weight.nbytes if output is None or output.weight is not embedding.weight else 0
    return sum(parameter.nbytes for parameter in model.parameters()) - looked_up


def _counts() -> Counter[str]:
    recorded = ottfx.step_graph.counters
    return Counter(
        graphs_compiled=int(dynamo_counters["stats"]["unique_graphs"]),
        **{name: recorded[name] for name in ("recordings", "replays", "warmups")},
    )


def _times(clock: StepClock, workload: Workload, profiled: int) -> dict[str, Any]:
    """The columns of time of one row."""
    steps = clock.milliseconds()
    row: dict[str, Any] = dict.fromkeys(
        ("step_ms", "step_ms_p90", "forward_ms", "forward_host_ms", "outside_ms", "device_ms", "idle_ms", "append_ms")
    )
    if steps:
        forward = clock.forward_milliseconds()
        outside = [step - part for step, part in zip(steps, forward, strict=True)]
        row["step_ms"] = statistics.median(steps)
        row["step_ms_p90"] = sorted(steps)[int(0.9 * (len(steps) - 1))]
        row["forward_ms"] = statistics.median(forward)
        row["forward_host_ms"] = statistics.median(clock.forward_host_milliseconds())
        row["outside_ms"] = statistics.median(outside)
    if steps and clock.kernels is not None and clock.kernels.microseconds:
        kernels = clock.kernels.microseconds
        row["device_ms"] = sum(kernels.values()) / profiled / 1e3
        row["idle_ms"] = row["step_ms"] - row["device_ms"]
        row["append_ms"] = storing_microseconds(kernels) / profiled / 1e3
    row["first_token_s"] = clock.seconds - sum(steps) / 1e3
    row["tokens_per_s"] = workload.batch_size * workload.new_tokens / clock.seconds
    return row
