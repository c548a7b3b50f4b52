"""Time and memory of a prompt's forward pass: attention is dense with any cache, ottfx packs the result as well.

`python -m benchmarks.prefill --shape llama-3-8b --layers 8 --prompts 1024 8192 32768` on a GPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.configurations import (
    CONFIGURATIONS,
    FORWARD_ONLY,
    Quantization,
    add_model_options,
    configured,
    model_labels,
    model_notes,
    model_of,
    new_cache,
    quantization_of,
)
from benchmarks.runner import Case, command_line, free_memory, run_cases
from benchmarks.timing import allocated_bytes, host_seconds, peak_bytes, reset_peak

REPETITIONS = 5


def measure(
    model: PreTrainedModel, name: str, quantization: Quantization, batch_size: int, prompt: int
) -> dict[str, Any]:
    """Run the prompt once to compile, then time it some times, each into a new cache."""
    way = CONFIGURATIONS[name]
    device = model.device.type
    ids = torch.randint(1, model.config.vocab_size, (batch_size, prompt), device=device)

    def run() -> None:
        model(ids, past_key_values=new_cache(model, way, prompt), logits_to_keep=1)

    with configured(model, way, quantization), torch.no_grad():
        cold_seconds = host_seconds(run, device)
        free_memory()
        base = allocated_bytes(device)
        reset_peak(device)
        seconds = statistics.median(host_seconds(run, device) for _ in range(REPETITIONS))
        peak = peak_bytes(device, base)
    return {
        "ms": 1e3 * seconds,
        "tokens_per_s": batch_size * prompt / seconds,
        "peak_bytes": peak,
        "compile_s": max(0.0, cold_seconds - seconds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "prefill")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of each prompt")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.shape, options.prompts = "tiny", [150]
    model = cache(lambda: model_of(options))

    def run(name: str, prompt: int) -> dict[str, Any]:
        return measure(model(), name, quantization_of(options), options.batch_size, prompt)

    labels = {**model_labels(options), "batch_size": options.batch_size}
    cases = [
        Case(
            labels={**labels, "prompt": prompt, "configuration": name},
            measure=partial(run, name, prompt),
            quick=prompt == max(options.prompts) and name in ("dynamic-eager", "ottfx"),
            # A prompt is never recorded as a CUDA graph.
            default=name != "ottfx-graphs",
        )
        for prompt in options.prompts
        for name in FORWARD_ONLY
    ]
    return run_cases(cases, options, model_notes(options))


if __name__ == "__main__":
    sys.exit(main())
