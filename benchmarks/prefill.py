"""Time and memory of a prompt's forward pass: attention is dense with any cache, ottfx packs the result as well.

`python -m benchmarks.prefill --shape llama-3-8b --layers 8 --batch-size 4 --prompts 8192` on a GPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.compiled_kernels import storing_microseconds
from benchmarks.configurations import (
    CONFIGURATIONS,
    FORWARD_ONLY,
    PROMPT_ONLY,
    Quantization,
    add_model_options,
    configured,
    model_labels,
    model_notes,
    model_of,
    new_cache,
    quantization_of,
    whole_numbers,
)
from benchmarks.runner import Case, command_line, free_memory, run_cases
from benchmarks.timing import allocated_bytes, host_seconds, kernel_microseconds, peak_bytes, reset_peak

REPETITIONS = 9
WAYS = {**{name: CONFIGURATIONS[name] for name in FORWARD_ONLY}, **PROMPT_ONLY}


def measure(
    model: PreTrainedModel, name: str, quantization: Quantization, batch_size: int, prompt: int
) -> dict[str, Any]:
    """Run the prompt once to compile, then time it some times, each into a new cache; then once for its kernels."""
    way = WAYS[name]
    device = model.device.type
    ids = torch.randint(1, model.config.vocab_size, (batch_size, prompt), device=device)

    def run() -> None:
        model(ids, past_key_values=new_cache(model, way, prompt), logits_to_keep=1)

    with configured(model, way, quantization), torch.no_grad():
        cold_seconds = host_seconds(run, device)
        free_memory()
        base = allocated_bytes(device)
        reset_peak(device)
        times = sorted(host_seconds(run, device) for _ in range(REPETITIONS))
        peak = peak_bytes(device, base)
        kernels = kernel_microseconds(run, device)
    seconds = statistics.median(times)
    return {
        "ms": 1e3 * seconds,
        "ms_min": 1e3 * times[0],
        "device_ms": sum(kernels.values()) / 1e3 if kernels else None,
        "append_ms": storing_microseconds(kernels) / 1e3 if kernels else None,
        "tokens_per_s": batch_size * prompt / seconds,
        "peak_bytes": peak,
        "compile_s": max(0.0, cold_seconds - seconds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "prefill")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=whole_numbers, default=[1, 4], help="sequences: one number, or several")
    parser.add_argument("--prompts", type=whole_numbers, default=[1024, 8192], help="tokens of a prompt")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.shape, options.prompts, options.batch_size = "tiny", [150], [2]
    model = cache(lambda: model_of(options))

    def run(name: str, batch_size: int, prompt: int) -> dict[str, Any]:
        return measure(model(), name, quantization_of(options), batch_size, prompt)

    cases = [
        Case(
            labels={**model_labels(options), "batch_size": batch_size, "prompt": prompt, "configuration": name},
            measure=partial(run, name, batch_size, prompt),
            quick=prompt == max(options.prompts) and name in ("ottfx", "dynamic-compiled"),
            # A prompt is never recorded as a CUDA graph.
            default=name != "ottfx-graphs",
        )
        for prompt, batch_size, name in product(options.prompts, options.batch_size, WAYS)
    ]
    return run_cases(cases, options, model_notes(options))


if __name__ == "__main__":
    sys.exit(main())
