"""`Report`: what the passes did to a model, and what its cache weighs before and after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from ottfx.attention_site import Binding, Refusal
from ottfx.passes.graph_utils import short_target
from ottfx.pipeline import PassRecord, RewriteResult
from ottfx.schemes.base import Role

LENGTHS = (1024, 8192, 32768)
"""Tokens of one sequence at which memory is stated."""

_ROLES: tuple[Role, Role] = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One rewritten attention, over all graphs that hold it."""

    index: int
    name: str
    kinds: tuple[str, ...]
    """`prompt`, `continue`, or both: in which kinds of graph it was rewritten."""
    scheme: str
    """Description of its scheme's config."""
    bits: float
    """Storage bits of one cached number at the longest of `LENGTHS`, everything counted."""
    dense_bytes_per_token: float
    """Bytes of one token's keys and values in the model's own dtype."""
    bytes_per_token: dict[int, float]
    """Length in tokens -> bytes of the allocated state, divided by the length, for one sequence."""


@dataclass(kw_only=True)
class Report:
    """What happened to the graphs of one model.

    Memory is what one sequence allocates with exactly the pages that it needs. A door may allocate ahead.
    """

    sites: list[SiteReport] = field(default_factory=list)
    """Rewritten attentions by layer; one that several graphs hold counts once."""
    refusals: list[Refusal] = field(default_factory=list)
    """Attentions that were left alone, each with every different reason once."""
    ops: dict[str, int] = field(default_factory=dict)
    """Name of an op that the passes put in -> its count over all graphs."""
    graphs: int = 0
    passes: list[PassRecord] = field(default_factory=list)

    def add_graph(self, result: RewriteResult) -> None:
        """Add what happened to one more graph (prompt, continue, another specialization) of the same model."""
        known = {site.name: site for site in self.sites}
        for binding in result.bindings:
            new = _report_site(binding)
            old = known.get(new.name)
            known[new.name] = replace(new, kinds=tuple(dict.fromkeys(old.kinds + new.kinds))) if old else new
        reasons = {(refusal.name, refusal.reason): refusal for refusal in [*result.refusals, *self.refusals]}
        self.sites = sorted(known.values(), key=lambda site: site.index)
        self.refusals = sorted(reasons.values(), key=lambda refusal: refusal.index)
        self.ops = dict(sorted((Counter(self.ops) + _scheme_ops(result.gm, result.bindings)).items()))
        self.graphs += 1
        self.passes += result.passes

    @property
    def dense_bytes_per_token(self) -> float:
        """Bytes of one token in all rewritten layers, as the model itself would store it."""
        return sum(site.dense_bytes_per_token for site in self.sites)

    @property
    def bytes_per_token(self) -> dict[int, float]:
        """Length in tokens -> bytes per token in all rewritten layers."""
        return {length: sum(site.bytes_per_token[length] for site in self.sites) for length in LENGTHS}

    def __str__(self) -> str:
        graphs = f"{self.graphs} graph{'' if self.graphs == 1 else 's'}"
        lines = [f"ottfx: {len(self.sites)} attentions rewritten, {len(self.refusals)} left alone, in {graphs}"]
        if self.sites:
            head = ["layer", "name", "graphs", "scheme", "bits", "dense B/token"]
            rows = [head + [f"B/token at {length // 1024}k" for length in LENGTHS]]
            rows += [_row(site) for site in self.sites]
            total = [f"{self.bytes_per_token[length]:.1f}" for length in LENGTHS]
            rows.append(["sum", "", "", "", "", f"{self.dense_bytes_per_token:.0f}", *total])
            lines += _table(rows)
        lines += [f"left alone: {r.index} {r.name}: {r.reason}" for r in self.refusals]
        if self.ops:
            lines.append("ops: " + ", ".join(f"{name} x {count}" for name, count in self.ops.items()))
        return "\n".join(lines)


def _report_site(binding: Binding) -> SiteReport:
    shape = binding.shape
    numbers = 2 * shape.num_kv_heads * shape.head_dim
    bytes_per_token = {length: _state_bytes(binding, length) / length for length in LENGTHS}
    return SiteReport(
        index=binding.site.index,
        name=binding.site.name,
        kinds=(binding.site.kind,),
        scheme=binding.config.describe(),
        bits=8 * bytes_per_token[LENGTHS[-1]] / numbers,
        dense_bytes_per_token=numbers * shape.dtype.itemsize,
        bytes_per_token=bytes_per_token,
    )


def _state_bytes(binding: Binding, length: int) -> int:
    """Bytes of both halves of one layer for one sequence of `length` tokens."""
    pages = binding.scheme.pages_needed(binding.config, length)
    shape = replace(binding.shape, batch_size=1, pages=pages)
    specs = [spec for role in _ROLES for spec in binding.scheme.state_spec(binding.config, role, shape).values()]
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def _scheme_ops(gm: GraphModule, bindings: Sequence[Binding]) -> Counter[str]:
    targets = {op for binding in bindings for op in (binding.scheme.append_op, binding.scheme.attend_op)}
    return Counter(
        short_target(node) for node in gm.graph.nodes if node.op == "call_function" and node.target in targets
    )


def _row(site: SiteReport) -> list[str]:
    memory = [f"{site.bytes_per_token[length]:.1f}" for length in LENGTHS]
    kinds = "+".join(site.kinds)
    return [
        str(site.index),
        site.name,
        kinds,
        site.scheme,
        f"{site.bits:.2f}",
        f"{site.dense_bytes_per_token:.0f}",
        *memory,
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
