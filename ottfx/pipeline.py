"""The ordered list of passes, and the loop that runs, counts, times and, on request, dumps each of them.

To see graphs: `logging.getLogger("ottfx.graphs").setLevel(logging.DEBUG)`, or the environment variable
`OTTFX_TRACE=folder`, which writes one readable file for each graph and pass.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import GraphModule, Node

from ottfx.attention_site import AttentionSite, Binding, Refusal
from ottfx.passes.canonicalize_attention import canonicalize_attention
from ottfx.passes.graph_utils import format_graph
from ottfx.passes.match_attention import match_attention
from ottfx.passes.quantize_kv_cache import GraphInputs, quantize_kv_cache
from ottfx.passes.remove_dead_nodes import remove_dead_nodes
from ottfx.schemes.base import Role

__all__ = ["PASSES", "Binding", "GraphInputs", "PassRecord", "RewriteResult", "rewrite_graph"]

graphs_log = logging.getLogger("ottfx.graphs")

_graph_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One pass over one graph."""

    name: str
    milliseconds: float
    calls_before: int
    """Nodes of the graph that call something."""
    calls_after: int
    summary: str


@dataclass(kw_only=True)
class RewriteResult:
    """What the passes did to one graph."""

    gm: GraphModule
    """The graph that was handed in, changed in place if `bindings` is not empty."""
    bindings: list[Binding] = field(default_factory=list)
    """The sites that were rewritten, in graph order."""
    refusals: list[Refusal] = field(default_factory=list)
    """The sites that were left as they were, in graph order."""
    cache_outputs: dict[int, tuple[AttentionSite, Role]] = field(default_factory=dict)
    """Index among the outputs before the rewrite -> the cache that was returned there. It is gone."""
    unread_placeholders: list[Node] = field(default_factory=list)
    """Graph inputs that lost their last reader; they are still in the graph unless they were to be erased."""
    passes: list[PassRecord] = field(default_factory=list)


@dataclass(kw_only=True)
class _Work:
    """What one pass hands to the next."""

    gm: GraphModule
    bind: Callable[[AttentionSite], Binding | Refusal]
    inputs: GraphInputs
    erase_placeholders: bool
    result: RewriteResult
    orphans: list[Node] = field(default_factory=list)


def rewrite_graph(
    gm: GraphModule,
    bind: Callable[[AttentionSite], Binding | Refusal],
    inputs: GraphInputs,
    *,
    erase_placeholders: bool = False,
) -> RewriteResult:
    """Run all passes over one graph, in place.

    Args:
        gm: a Dynamo graph or an exported ATen graph, a private copy of the caller's.
        bind: chooses scheme and options for a site, or refuses it. Called once for each site, in graph order,
            before any site is rewritten.
        inputs: adds graph inputs; asked only for sites that were bound.
        erase_placeholders: remove graph inputs that lost their last reader.
    """
    work = _Work(gm=gm, bind=bind, inputs=inputs, erase_placeholders=erase_placeholders, result=RewriteResult(gm=gm))
    trace = _Trace(gm)
    for run in PASSES:
        name = run.__name__.strip("_")
        before, start = _calls(gm), time.perf_counter()
        summary = run(work)
        record = PassRecord(
            name=name,
            milliseconds=1e3 * (time.perf_counter() - start),
            calls_before=before,
            calls_after=_calls(gm),
            summary=summary,
        )
        work.result.passes.append(record)
        trace.write(record)
    return work.result


def _canonicalize_attention(work: _Work) -> str:
    return f"{canonicalize_attention(work.gm)} nodes folded"


def _match_attention(work: _Work) -> str:
    sites, refusals = match_attention(work.gm)
    lines = []
    for site in sites:
        bound = work.bind(site)
        if isinstance(bound, Refusal):
            refusals.append(bound)
        else:
            work.result.bindings.append(bound)
            lines.append(f"site {site.index} {site.name}: {site.kind}, {bound.config.describe()}")
    work.result.refusals = sorted(refusals, key=lambda refusal: refusal.index)
    lines += [f"refused {refusal.index} {refusal.name}: {refusal.reason}" for refusal in work.result.refusals]
    return "\n".join(lines) or "no attention with a cache"


def _quantize_kv_cache(work: _Work) -> str:
    rewrite = quantize_kv_cache(work.gm, work.result.bindings, work.inputs)
    work.result.cache_outputs, work.orphans = rewrite.cache_outputs, rewrite.orphans
    return f"{len(work.result.bindings)} sites rewritten, {len(rewrite.cache_outputs)} outputs removed"


def _remove_dead_nodes(work: _Work) -> str:
    if not work.result.bindings:
        return "nothing was rewritten"
    removed, unread = remove_dead_nodes(work.gm, work.orphans, erase_placeholders=work.erase_placeholders)
    work.result.unread_placeholders = unread
    return f"{removed} nodes removed, {len(unread)} graph inputs unread"


PASSES: tuple[Callable[[_Work], str], ...] = (
    _canonicalize_attention,
    _match_attention,
    _quantize_kv_cache,
    _remove_dead_nodes,
)
"""The passes, in order. Each changes `work` in place and says in words what it did."""


def _calls(gm: GraphModule) -> int:
    return sum(node.op.startswith("call_") for node in gm.graph.nodes)


class _Trace:
    """Writes the graph after each pass to the logger `ottfx.graphs` and to the folder `OTTFX_TRACE`."""

    def __init__(self, gm: GraphModule) -> None:
        folder = os.environ.get("OTTFX_TRACE")
        self._gm = gm
        self._folder = Path(folder) if folder else None
        self._number = next(_graph_numbers)
        self._step = 0
        if self._wanted():
            self._emit("captured", "graph as it was captured")

    def write(self, record: PassRecord) -> None:
        """Dump the graph as it is after one pass."""
        if self._wanted():
            head = f"{record.name}: {record.calls_before} -> {record.calls_after} calls, {record.milliseconds:.1f} ms"
            self._emit(record.name, f"{head}\n{record.summary}")

    def _wanted(self) -> bool:
        return self._folder is not None or graphs_log.isEnabledFor(logging.DEBUG)

    def _emit(self, name: str, head: str) -> None:
        text = f"{head}\n\n{format_graph(self._gm.graph)}\n"
        graphs_log.debug("graph %d, %s", self._number, text)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"graph{self._number:03d}_{self._step:02d}_{name}.txt"
            path.write_text(text, encoding="utf-8")
        self._step += 1
