"""The command line that all benchmarks share: named cases, filters, a time limit, and a results file after each row."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import FOLDER, as_text, conditions, write_results


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One row of a benchmark."""

    labels: Mapping[str, Any]
    """What is measured: the row's first columns."""
    measure: Callable[[], Mapping[str, Any]]
    """Returns the row's other columns. What it raises becomes the row's `error`."""
    quick: bool = False
    """Whether `--quick` measures it."""
    default: bool = True
    """Whether it is measured without a filter; otherwise only `--only` finds it."""

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return "/".join(str(value) for value in self.labels.values())


def command_line(description: str | None, results_name: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    Args:
        description: the module's docstring.
        results_name: file name of the results, without suffix.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a pattern of case names, such as '*/8x32k/*'; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few cases that show the most")
    parser.add_argument("--list", action="store_true", help="print the names of the chosen cases and stop")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; no case is begun after them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the benchmark itself")
    parser.add_argument("--out", type=Path, default=FOLDER / results_name, help="results files, without suffix")
    return parser


def select(cases: Iterable[Case], options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for."""
    if options.only:
        return [case for case in cases if any(fnmatch(case.name, pattern) for pattern in options.only)]
    return [case for case in cases if case.default and (case.quick or not options.quick)]


def run_cases(cases: Iterable[Case], options: argparse.Namespace, notes: Iterable[str] = ()) -> int:
    """Measure the chosen cases, and write the results files after each.

    Args:
        cases: all of the benchmark.
        options: what the parser of `command_line` read.
        notes: sentences below the table of the Markdown file.

    Returns:
        The exit status: 0 if a row was measured, or if the names were only listed.
    """
    chosen = select(cases, options)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"No case matches {options.only}. `--list --only '*'` shows all names.")
        return 1
    began = time.perf_counter()
    shared = conditions(options.device)
    rows: list[dict[str, Any]] = []
    notes = list(notes)
    for number, case in enumerate(chosen):
        seconds = time.perf_counter() - began
        if seconds > options.time_limit:
            left = len(chosen) - number
            notes.append(f"Time limit: {left} of {len(chosen)} cases were not measured, from {case.name} on.")
            print(notes[-1])
            break
        print(f"[{number + 1} of {len(chosen)}, {seconds:.0f} s] {case.name}", flush=True)
        row = dict(case.labels)
        try:
            row |= case.measure()
        except Exception as error:  # a peer that refuses a shape, or no memory: the other rows still count
            row["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        free_memory()
        rows.append(row)
        measured = {name: value for name, value in row.items() if name not in case.labels and value is not None}
        print("  " + ", ".join(f"{name} {as_text(value)}" for name, value in measured.items()), flush=True)
        write_results(options.out, rows, shared, notes)
    write_results(options.out, rows, shared, notes)
    print(f"wrote {options.out}.csv and {options.out}.md")
    return 0 if any("error" not in row for row in rows) else 1


def free_memory() -> None:
    """Give what no tensor uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
