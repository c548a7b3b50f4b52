"""Whole calls of `generate` with random weights: time of a decode step, memory, seconds of compiling.

`python -m benchmarks.generate --shape llama-3-8b --batch-size 8 --prompt 8192 --new-tokens 256` on a GPU.
`--synthetic 32768` starts from a cache that holds so many random tokens, without running a prompt.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import ottfx
from benchmarks.configurations import (
    CONFIGURATIONS,
    QUANTIZED,
    Configuration,
    add_model_options,
    configured,
    fill_cache,
    model_labels,
    model_notes,
    model_of,
    new_cache,
    quantization_of,
)
from benchmarks.runner import Case, command_line, free_memory, run_cases
from benchmarks.timing import allocated_bytes, host_seconds, peak_bytes, reset_peak

WARM_UP_TOKENS = 8
"""Tokens of the run that compiles: enough for CUDA graphs to be recorded."""


class StepClock(StoppingCriteria):
    """Notes the moment after each new token, and stops after `most` tokens. Adds no synchronization of its own."""

    def __init__(self, device: str, most: int) -> None:
        self._device = device
        self._most = most
        self._moments: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Called by `generate` with int64 [batch, tokens so far]; returns bool [batch], True to stop."""
        if self._device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())
        stop = len(self._moments) >= self._most
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def step_milliseconds(self) -> list[float]:
        """Return the time of each step after the first token. On CUDA the device must have finished."""
        pairs = zip(self._moments, self._moments[1:], strict=False)
        if self._device == "cuda":
            return [before.elapsed_time(after) for before, after in pairs]
        return [1e3 * (after - before) for before, after in pairs]


class Generation:
    """One workload on one model, measured with any configuration."""

    def __init__(self, model: PreTrainedModel, options: argparse.Namespace) -> None:
        self.model = model
        self.options = options
        self.quantization = quantization_of(options)
        self.start = options.synthetic + 1 if options.synthetic else options.prompt
        self.ids = torch.randint(1, model.config.vocab_size, (options.batch_size, self.start), device=options.device)

    def measure(self, way: Configuration) -> dict[str, Any]:
        """Run once to compile, once to measure."""
        options, device = self.options, self.options.device
        warm_up_tokens = min(WARM_UP_TOKENS, options.new_tokens)
        base = allocated_bytes(device)
        with configured(self.model, way, self.quantization), torch.no_grad():
            past = self._filled(way, self._empty(way))
            cold_seconds = self._run(past, warm_up_tokens)[0]
            if way.cache == "static":
                # Compiled code is for one static cache; with another at another address it would be compiled again.
                past.reset()
            else:
                del past
                free_memory()
                past = self._empty(way)
            past = self._filled(way, past)
            reset_peak(device)
            seconds, clock, past = self._run(past, options.new_tokens)
            steps = clock.step_milliseconds()
            peak = peak_bytes(device, base)
            held = self._cache_bytes(way, past, base)
        step_ms = statistics.median(steps)
        first_seconds = seconds - sum(steps) / 1e3
        return {
            "step_ms": step_ms,
            "step_ms_p90": sorted(steps)[int(0.9 * (len(steps) - 1))],
            "first_token_s": first_seconds,
            "tokens_per_s": options.batch_size * options.new_tokens / seconds,
            "cache_bytes": held,
            "peak_bytes": peak,
            "compile_s": max(0.0, cold_seconds - first_seconds - step_ms * (warm_up_tokens - 1) / 1e3),
        }

    def _empty(self, way: Configuration) -> Any:
        return new_cache(self.model, way, self.start + self.options.new_tokens)

    def _filled(self, way: Configuration, past: Any) -> Any:
        if length := self.options.synthetic:
            batch_size = self.options.batch_size
            fill_cache(past, self.model, way, self.quantization, batch_size=batch_size, length=length)
        return past

    def _run(self, past: Any, new_tokens: int) -> tuple[float, StepClock, Any]:
        """Generate, and return wall seconds, the clock of the steps, and the cache."""
        clock = StepClock(self.options.device, new_tokens)
        caches = []

        def run() -> None:
            result: Any = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                past_key_values=past,
                max_new_tokens=self.options.new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
                return_dict_in_generate=True,
            )
            caches.append(result.past_key_values)

        return host_seconds(run, self.options.device), clock, caches[0]

    def _cache_bytes(self, way: Configuration, past: Any, base: int) -> int | None:
        if way.cache not in QUANTIZED:
            return ottfx.memory_footprint(past).total
        # Their tensors are out of reach: what is allocated while only the cache lives.
        gc.collect()
        return allocated_bytes(self.options.device) - base if self.options.device == "cuda" else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "generate")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--synthetic", type=int, help="tokens of a cache of random content, instead of a prompt")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.shape, options.batch_size, options.new_tokens = "tiny", 2, 6
        options.prompt, options.synthetic = 150, options.synthetic and 150

    @cache
    def generation() -> Generation:
        return Generation(model_of(options), options)

    def measure(name: str) -> dict[str, Any]:
        return generation().measure(CONFIGURATIONS[name])

    labels = {
        **model_labels(options),
        "batch_size": options.batch_size,
        "start": f"synthetic {options.synthetic}" if options.synthetic else f"prompt {options.prompt}",
        "new_tokens": options.new_tokens,
    }
    cases = [
        Case(
            labels={**labels, "configuration": name},
            measure=partial(measure, name),
            quick=name in ("ottfx", "ottfx-graphs", "dynamic-compiled"),
            default=way.available,
        )
        for name, way in CONFIGURATIONS.items()
    ]
    return run_cases(cases, options, model_notes(options))


if __name__ == "__main__":
    sys.exit(main())
