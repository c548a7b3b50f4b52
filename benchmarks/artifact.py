"""An exported artifact against `ottfx.compile`, each in a new process: seconds to the first tokens, then a decode step.

`python -m benchmarks.artifact --shape llama-3-8b --layers 4` on a GPU. Case names: SHAPE/LAYERS/CONFIGURATION.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import ottfx
from benchmarks.compile_time import in_new_process
from benchmarks.configurations import add_model_options, model_labels, model_notes, model_of, quantization_of
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.timing import host_seconds

WAYS = ("compiled", "compiled-warm", "artifact")
"""`ottfx.compile` with empty disk caches; with those of the process before; `ottfx.load`."""
BATCH_SIZE, PROMPT, STEPS = 2, 512, 32


def first_tokens(options: argparse.Namespace) -> dict[str, float]:
    """Time the first tokens in this process. Libraries are loaded before, and so are a compiled model's weights."""
    ids = torch.randint(1, 100, (BATCH_SIZE, PROMPT), device=options.device)
    torch.nn.functional.linear(torch.randn(4, 64, device=options.device), torch.randn(64, 64, device=options.device))
    model = None if options.child == "artifact" else model_of(options)
    call: list[Callable[[Tensor], Any]] = []

    def begin() -> None:
        if model is None:
            program = ottfx.load(options.artifact)
            cache = program.new_cache(BATCH_SIZE)
            call.append(lambda part: program.prefill(part, cache))
        else:
            ottfx.compile(model, scheme=quantization_of(options).config(), lower=options.lower)
            past = DynamicCache(config=model.config)
            call.append(lambda part: model(part, past_key_values=past, logits_to_keep=1))
        call[0](ids)

    with torch.no_grad():
        first = host_seconds(begin, options.device)
        second = host_seconds(lambda: call[0](ids[:, :1]), options.device)
        steps = [host_seconds(lambda: call[0](ids[:, :1]), options.device) for _ in range(STEPS)]
    return {
        "first_token_s": first,
        "second_token_s": first + second,
        "step_ms": 1e3 * statistics.median(steps),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "artifact")
    add_model_options(parser)
    parser.add_argument("--child", choices=WAYS, help="measure this in this process, print JSON")
    parser.add_argument("--artifact", type=Path, help="an artifact of this model to measure; default: export one")
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(first_tokens(options)))
        return 0
    if options.tiny:
        options.shape, options.layers = "tiny", 1
    labels = model_labels(options)
    with tempfile.TemporaryDirectory() as folder:
        path = options.artifact or Path(folder) / "model.pt2"

        def measure(way: str) -> dict[str, float]:
            columns: dict[str, float] = {}
            if way == "artifact":
                if options.artifact is None:
                    model = model_of(options)
                    export = partial(ottfx.export, model, path, scheme=quantization_of(options).config())
                    columns["export_s"] = host_seconds(export, options.device)
                columns["file_mib"] = path.stat().st_size / 2**20
            more = ("--artifact", str(path))
            return in_new_process("benchmarks.artifact", way, labels["layers"], options, folder, *more) | columns

        cases = [
            Case(labels={**labels, "configuration": way}, measure=partial(measure, way), quick=True) for way in WAYS
        ]
        note = f"Batch {BATCH_SIZE}, prompt {PROMPT}; step: median of {STEPS}, one synchronization each."
        return run_cases(cases, options, [*model_notes(options), note])


if __name__ == "__main__":
    sys.exit(main())
