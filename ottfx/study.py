"""The study that a real implementation must reproduce: its variants, and what it measured by exact simulation.

SmolLM2-135M-Instruct (4-bit GGUF weights run in fp32), the first 2048 tokens of Persuasion, positions from 256 on. The
study simulated storage in plain PyTorch, each query seeing exactly what would be stored at that moment. Rows with a
residual of 32 flush the oldest group of keys and values together once `residual + group` tokens wait, which is OTT's
schedule: here they are `ott` without a pool. Rows with a residual of 128 flush keys as KIVI does, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ottfx.metrics import bootstrap_interval
from ottfx.results import Result, Variant

TOLERANCE = 0.2
"""Largest difference of mean KL from the study, relative, that counts as the same recipe."""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What the study measured for one variant."""

    bits: float
    mean_kl: float
    top1: float
    perplexity_ratio: float


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A variant of the study; without an anchor it is shown beside the others."""

    variant: Variant
    anchor: Anchor | None = None


def _row(label: str, anchor: tuple[float, float, float, float] | None = None, **options: Any) -> StudyRow:
    names = ("bits", "mean_kl", "top1", "perplexity_ratio")
    known = None if anchor is None else Anchor(**dict(zip(names, anchor, strict=True)))
    return StudyRow(variant=Variant(label=label, options=options), anchor=known)


_NO_POOL = {"scheme": "ott", "outlier_capacity": 0, "spill_capacity": 0, "exempt_layers": ()}
STUDY = (
    _row("none", scheme="none"),
    _row("kivi g32 r128", (3.66, 0.1684, 0.752, 1.166), scheme="kivi", bits=2, group_size=32, residual_length=128),
    _row("kivi g32 r32", (3.30, 0.1725, 0.736, 1.172), bits=2, group_size=32, residual_length=32, **_NO_POOL),
    _row("kivi g128 r128", (3.22, 0.4049, 0.607, 1.501), scheme="kivi", bits=2, group_size=128, residual_length=128),
    _row("kivi g128 r32", (3.01, 0.3830, 0.626, 1.430), bits=2, group_size=128, residual_length=32, **_NO_POOL),
    _row(
        "ott g128 r32 c3 e3",
        (3.06, 0.2473, 0.689, 1.250),
        scheme="ott",
        bits=2,
        group_size=128,
        residual_length=32,
        outlier_capacity=3,
        spill_capacity=3,
        exempt_layers=(),
    ),
    _row("ott (paper's defaults)", scheme="ott", bits=2),
)
"""In the order of the report. Options are those of `ottfx.compile`."""

EQUAL_BITS = ("ott g128 r32 c3 e3", "kivi g128 r32")
"""Two rows of (nearly) equal bits: the first must be better."""


def study_variants(labels: Sequence[str] | None = None) -> list[Variant]:
    """Return the study's variants, all or those whose label is in `labels`, in the study's order."""
    return [row.variant for row in STUDY if labels is None or row.variant.label in labels]


def study_table(results: Sequence[Result]) -> str:
    """Return a Markdown table of measured against simulated values, and what follows from them.

    The study's conditions are the caller's business: other tokens, positions or models make the comparison void.
    """
    anchors = {row.variant.label: row.anchor for row in STUDY}
    lines = [
        "| variant | bits | KL | KL, study | difference | top-1 | study | perplexity ratio | study |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        a = anchors.get(r.label)
        kl, top1, ratio, difference = ("", "", "", "")
        if a is not None:
            change = r.mean_kl / a.mean_kl - 1
            verdict = "within" if abs(change) <= TOLERANCE else "OUTSIDE"
            kl, top1, ratio = f"{a.mean_kl:.4f}", f"{a.top1:.3f}", f"{a.perplexity_ratio:.3f}"
            difference = f"{change:+.1%}, {verdict} {TOLERANCE:.0%}"
        lines.append(
            f"| {r.label} | {r.bits_formula:.2f} | {r.mean_kl:.4f} | {kl} | {difference} | {r.top1:.3f} | {top1} "
            f"| {r.perplexity_ratio:.3f} | {ratio} |"
        )
    comparison = compare_at_equal_bits(results)
    return "\n".join(lines) + "\n" + (f"\n{comparison}\n" if comparison else "")


def compare_at_equal_bits(results: Sequence[Result]) -> str:
    """Say whether OTT beats KIVI's grid at equal bits on the same positions; empty if one of them was not measured."""
    by_label = {r.label: r for r in results}
    if not all(label in by_label for label in EQUAL_BITS):
        return ""
    ott, kivi = (by_label[label] for label in EQUAL_BITS)
    low, high = bootstrap_interval(ott.metrics.kl - kivi.metrics.kl)
    word = "better" if high < 0 else "worse" if low > 0 else "not distinguishable"
    return (
        f"{ott.label} ({ott.bits_formula:.2f} bits) against {kivi.label} ({kivi.bits_formula:.2f} bits): KL "
        f"{ott.mean_kl - kivi.mean_kl:+.4f} nat, 95 % interval {low:+.4f} to {high:+.4f} (paired): {word}."
    )
