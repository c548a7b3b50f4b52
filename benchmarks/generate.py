"""Whole calls of `generate` with random weights: where a decode step's time goes, memory, seconds of compiling.

`python -m benchmarks.generate --shape llama-3-8b --batch-size 8 --prompt 8192 --new-tokens 256` on a GPU.
`--synthetic 32768` starts from a cache that holds so many random tokens, without running a prompt. Sizes may be lists,
such as `--batch-size 1,32,96`; `--search-batch` and `--search-length` look for the largest that fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

from benchmarks.configurations import (
    CONFIGURATIONS,
    add_model_options,
    model_labels,
    model_notes,
    model_of,
    quantization_of,
    whole_numbers,
)
from benchmarks.generation import Generation, Workload
from benchmarks.plots import add_plots_option, draw_if_asked, require_matplotlib
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.timing import read_ceiling

QUICK = ("ottfx", "ottfx-graphs", "dynamic-compiled")
LONGEST_TRIED = 1 << 23
LARGEST_TRIED = 1 << 14


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Return what the options ask for; with a search, the sizes at which it begins."""
    synthetic = options.synthetic is not None
    starts = options.synthetic if synthetic else options.prompt
    return [
        Workload(batch_size=batch_size, start=start, synthetic=synthetic, new_tokens=options.new_tokens)
        for start, batch_size in product(starts, options.batch_size)
    ]


def labels(workload: Workload, searched: str | None) -> dict[str, Any]:
    """Return the columns that name a workload; `largest` stands for a size that is searched."""
    sizes = {"batch_size": workload.batch_size, "start": workload.start}
    if searched:
        sizes[searched] = "largest"
    kind = "synthetic" if workload.synthetic else "prompt"
    return {
        "batch_size": sizes["batch_size"],
        "start": f"{kind} {sizes['start']}",
        "new_tokens": workload.new_tokens,
    }


def plan(options: argparse.Namespace, generation: Callable[[], Generation]) -> Iterator[Case]:
    """Yield all cases."""
    searched = "batch_size" if options.search_batch else "start" if options.search_length else None
    limit = options.search_limit or (LARGEST_TRIED if searched == "batch_size" else LONGEST_TRIED)

    def measure(name: str, workload: Workload) -> dict[str, Any]:
        way = CONFIGURATIONS[name]
        if searched is None:
            return generation().measure(way, workload)
        measured, row = generation().measure_largest(
            way,
            lambda size: replace(workload, **{searched: size}),
            start=getattr(workload, searched),
            most=limit,
        )
        return {**labels(measured, None), **row, "largest": searched}

    for workload, (name, way) in product(workloads(options), CONFIGURATIONS.items()):
        yield Case(
            labels={**model_labels(options), **labels(workload, searched), "configuration": name},
            measure=partial(measure, name, workload),
            quick=name in QUICK,
            default=way.available,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "generate")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=whole_numbers, default=[8], help="sequences: one number, or several")
    parser.add_argument("--prompt", type=whole_numbers, default=[8192], help="tokens of the prompt")
    parser.add_argument("--synthetic", type=whole_numbers, help="tokens of a cache of random content, without a prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens that are timed")
    parser.add_argument(
        "--profile-tokens", type=int, default=16, help="tokens behind them whose kernels are timed (0: none); on CUDA"
    )
    search = parser.add_mutually_exclusive_group()
    search.add_argument("--search-batch", action="store_true", help="the largest batch that fits, from --batch-size on")
    search.add_argument(
        "--search-length", action="store_true", help="the longest synthetic cache that fits, from --synthetic on"
    )
    parser.add_argument("--search-limit", type=int, help="the largest size that a search tries")
    add_plots_option(parser)
    options = parser.parse_args(arguments)
    require_matplotlib(parser, options.plots)
    if options.search_length and options.synthetic is None:
        parser.error("--search-length needs --synthetic LENGTH, the length to begin with")
    if options.tiny:
        options.shape, options.new_tokens, options.prompt = "tiny", 6, [150]
        options.batch_size = [2, 3][: len(options.batch_size)]
        options.synthetic = options.synthetic and [150]
        options.search_limit = 4 if options.search_batch else 300

    @cache
    def generation() -> Generation:
        return Generation(
            model_of(options),
            quantization_of(options),
            profiled=options.profile_tokens if options.device == "cuda" else 0,
            read_ceiling=read_ceiling(options.device, 1 << 20 if options.tiny else 2 << 30),
        )

    status = run_cases(plan(options, generation), options, model_notes(options))
    draw_if_asked(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
