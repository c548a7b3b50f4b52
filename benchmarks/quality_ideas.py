"""Ideas that are not part of `ott+`, each measured as if it were, beside the plain scheme.

`python -m benchmarks.quality_ideas` from the repository root, also with `--model gemma3-270m --out
benchmarks/results/quality-ideas-gemma3`; a row takes minutes on a CPU. The plain-torch definition is patched while a
row is measured, and nothing else is: schedule, pool, window and read path are those of the real cache. One exception:
where keys have factors, attention reads what such a cache would give back, since codes have no place for factors.

Bits count what an idea stores more or less. Bytes held (`bits_held`) are those of the process, without that.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.results import FOLDER
from benchmarks.scheme_patches import (
    BF16,
    E4M3,
    E4M3_SCALE,
    dual_scales,
    factors_of_keys,
    narrow_constants,
    seats_at_the_beginning,
    token_norms,
)
from ottfx import effective_bits, evaluation
from ottfx.eval_command import default_variants, run_evaluation
from ottfx.metrics import bootstrap_interval
from ottfx.results import Result, Variant, write_results
from ottfx.schemes.base import PAGE, CacheShape, Role, Scheme, SchemeConfig

PLAIN = "ott+ 2-bit"
ExtraBits = Callable[[Role, int], float]
"""(half, head_dim) -> bits of a packed element that an idea stores and the state tensors do not show."""


@dataclass(frozen=True, kw_only=True)
class Idea:
    """One row: options of `ott+`, what is patched, and what it stores that the state tensors do not show."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    patches: Callable[[], AbstractContextManager[None]] = nullcontext
    extra_bits: ExtraBits = lambda role, head_dim: 0.0

    def variant(self) -> Variant:
        """Return what `ottfx.evaluate` measures."""
        return Variant(label=f"{PLAIN}, {self.name}", options={"scheme": "ott+", "bits": 2, **self.options})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Patch the definition, and the count of bits."""
        count = effective_bits.formula_bits

        def formula_bits(scheme: Scheme, config: SchemeConfig, role: Role, shape: CacheShape, length: int) -> float:
            phases = range(length, length + PAGE)
            window = sum(at - scheme.packed_length(config, role, at, 0) for at in phases) / PAGE
            packed = 1 - min(window / length, 1.0)
            return count(scheme, config, role, shape, length) + packed * self.extra_bits(role, shape.head_dim)

        with self.patches(), patch.object(effective_bits, "formula_bits", formula_bits):
            yield


def constant_bits(of_key_group: int, of_value: int) -> ExtraBits:
    """Return bits of an element for so many bits of each key channel's group of 128 tokens and of each value."""
    return lambda role, head_dim: of_key_group / 128 if role == "key" else of_value / head_dim


def factor_bits(role: Role, head_dim: int) -> float:
    """Return bits of an element for an fp16 factor of each key."""
    return 16 / head_dim if role == "key" else 0.0


def beginning(name: str, count: int, of_first_tokens: bool) -> Idea:
    """Return the idea that only the first group of a text has `count` seats more; those of others take no room."""
    return Idea(
        name=name,
        options={"group_seats": 1 + count},
        patches=lambda: seats_at_the_beginning(count, of_first_tokens),
        # A code, scale and row of each seat, in each page of one group.
        extra_bits=lambda role, head_dim: -count * (head_dim * 8 + 16 + 8) / (PAGE * head_dim),
    )


IDEAS = (
    beginning("sinks 1", 1, of_first_tokens=True),
    beginning("sinks 4", 4, of_first_tokens=True),
    beginning("4 seats in the first group", 3, of_first_tokens=False),
    Idea(
        name="e4m3 scales",
        patches=lambda: narrow_constants(E4M3_SCALE),
        extra_bits=constant_bits(-8, -8),
    ),
    Idea(
        name="e4m3 scales and zero points",
        patches=lambda: narrow_constants(E4M3_SCALE, E4M3),
        extra_bits=constant_bits(-16, -8),
    ),
    Idea(name="token norms of keys", patches=lambda: factors_of_keys(token_norms), extra_bits=factor_bits),
    Idea(name="dual scales of keys", patches=lambda: factors_of_keys(dual_scales), extra_bits=factor_bits),
    Idea(name="bf16 scales and zero points", patches=lambda: narrow_constants(BF16, BF16, BF16)),
)
OPTIONS = {
    "smollm2": (
        "layer_bits={0:3,1:3,28:3,29:3}",
        "layer_bits={0:4,29:4}",
        "symmetric_values=False",
    ),
    "gemma3-270m": ("layer_bits={5:3,17:3}", "value_bits=3"),
    "random-qwen2": (),
}
"""Rows that are options of the scheme: wider first and last layers among those stored, and about as many bits spent in
all layers."""


def add_changes(results: Sequence[Result], file: Path) -> None:
    """Add to a CSV file of `results` how the KL of each differs from that of the first, position by position."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row, result in zip(rows, results, strict=True):
        change = result.metrics.kl - results[0].metrics.kl
        low, high = bootstrap_interval(change)
        row |= {"kl_change": str(change.mean().item()), "kl_change_low": str(low), "kl_change_high": str(high)}
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the plain scheme and the ideas, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(idea.name for idea in IDEAS), *OPTIONS["smollm2"], *OPTIONS["gemma3-270m"]]
    parser.add_argument("--only", action="append", choices=names, help="a row; repeat for more; default: all")
    parser.add_argument("--keep", action="store_true", help="add to the rows of the file, do not replace them")
    parser.add_argument("--model", default="smollm2", choices=list(OPTIONS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--start", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / FOLDER / "quality-ideas")
    options = parser.parse_args(arguments)
    ideas = {idea.variant().label: idea for idea in IDEAS}
    every = [*default_variants(["ott+"], ["2"], OPTIONS[options.model]), *(idea.variant() for idea in IDEAS)]
    chosen = [PLAIN, *(f"{PLAIN}{mark}{name}" for name in options.only or names for mark in (" ", ", "))]
    variants = [variant for variant in every if variant.label in chosen]
    measure = evaluation._measure

    def measured(model: torch.nn.Module, ids: Tensor, variant: Variant, *rest: Any) -> Result:
        with ideas[variant.label].applied() if variant.label in ideas else nullcontext():
            return measure(model, ids, variant, *rest)

    with patch.object(evaluation, "_measure", measured):
        results = run_evaluation(
            variants,
            options.model,
            "cpu",
            "float32",
            "",
            options.tokens,
            options.start,
            str(options.out),
            fresh=not options.keep,
        )
    # In the order of a single run, in however many they were measured.
    labels = [variant.label for variant in every]
    results.sort(key=lambda result: labels.index(result.label))
    write_results(results, options.out)
    add_changes(results, options.out.with_suffix(".csv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
