"""Seconds until the first prompt and the first decode steps, in a new process with empty and with filled disk caches.

`python -m benchmarks.compile_time --shape llama-3-8b` on a GPU. Case names: SHAPE/LAYERS/CONFIGURATION.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import (
    CONFIGURATIONS,
    FORWARD_ONLY,
    add_model_options,
    configured,
    model_notes,
    model_of,
    new_cache,
    quantization_of,
)
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.timing import host_seconds

LAYERS = (1, 2, 4)
PROMPT = 512
CACHE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def first_calls(options: argparse.Namespace) -> dict[str, float]:
    """Time the first calls of a model in this process: a prompt, and three decode steps.

    The model, and what CUDA loads when it is first used, are ready before. With CUDA graphs the first step compiles
    and the second records.
    """
    model = model_of(options)
    way = CONFIGURATIONS[options.child]
    ids = torch.randint(1, model.config.vocab_size, (2, PROMPT), device=options.device)
    past = new_cache(model, way, PROMPT + 8)
    with torch.no_grad():
        # Uncompiled calls load the libraries.
        warm = new_cache(model, CONFIGURATIONS["dynamic-eager"], PROMPT + 8)
        for part in (ids, ids[:, :1]):
            model(part, past_key_values=warm, logits_to_keep=1)
        with configured(model, way, quantization_of(options)):

            def call(part: torch.Tensor) -> float:
                return host_seconds(lambda: model(part, past_key_values=past, logits_to_keep=1), options.device)

            return {
                "first_prompt_s": call(ids),
                "first_step_s": call(ids[:, :1]),
                "second_step_s": call(ids[:, :1]),
                "third_step_s": call(ids[:, :1]),
            }


def measure(name: str, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run two processes with the same disk caches, empty at first; the second one's columns begin with `warm_`."""
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_child(name, layers, options, folder) for _ in range(2))
    return {**cold, **{f"warm_{column}": value for column, value in warm.items()}}


def _child(name: str, layers: int, options: argparse.Namespace, folder: str) -> dict[str, float]:
    return in_new_process("benchmarks.compile_time", name, layers, options, folder)


def in_new_process(
    module: str, name: str, layers: int, options: argparse.Namespace, folder: str, *more: str
) -> dict[str, float]:
    """Run a benchmark with `--child name` in a process whose disk caches are in `folder`; return what it prints."""
    command = [sys.executable, "-m", module, "--child", name, "--layers", str(layers), *more]
    command += ["--shape", options.shape, "--scheme", options.scheme, "--bits", str(options.bits)]
    command += [word for name, value in options.option for word in ("--option", f"{name}={value!r}")]
    command += ["--lower", options.lower, "--device", options.device]
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_FORCE_DISABLE_CACHES"}
    environment |= {variable: os.path.join(folder, variable) for variable in CACHE_FOLDERS}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "compile_time")
    add_model_options(parser)
    parser.add_argument("--child", choices=FORWARD_ONLY, help="measure this configuration in this process, print JSON")
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(first_calls(options)))
        return 0
    if options.tiny:
        options.shape, options.layers = "tiny", 1
    counts = LAYERS if options.layers is None else (options.layers,)
    cases = [
        Case(
            labels={"shape": options.shape, "layers": layers, "configuration": name},
            measure=partial(measure, name, layers, options),
            quick=layers == counts[0],
            default=name != "dynamic-eager",
        )
        for layers in counts
        for name in FORWARD_ONLY
    ]
    return run_cases(cases, options, model_notes(options))


if __name__ == "__main__":
    sys.exit(main())
