"""Decide whether a rewritten graph is a decode step that can be recorded, and prepare it for that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ottfx.cache_call import StateInput
from ottfx.passes.fix_shapes import FixedShapes, fix_shapes
from ottfx.passes.graph_utils import node_value, static_int
from ottfx.pipeline import RewriteResult
from ottfx.recorders import RECORDERS
from ottfx.schemes.base import PAGE
from ottfx.settings import Settings
from ottfx.step_graph import InputKind, StepGraph, StepInput, counters

log = logging.getLogger("ottfx")

_KINDS: dict[str, InputKind] = {
    "state": "state",
    "lengths": "copied",
    "pages": "number",
    "past_length": "number",
}


class RecordedStep:
    """A decode step that one set of arguments serves for all cache lengths, before it is lowered.

    Args:
        shapes: how to call it.
        capacity: tokens that its state has room for, symbolic.
        settings: of the model.
    """

    def __init__(self, shapes: FixedShapes, capacity: Any, settings: Settings) -> None:
        self._shapes = shapes
        self._capacity = capacity
        self._settings = settings

    def example(self, node: Node) -> Any:
        """What the graph is lowered with for a captured input: what it will be called with, not what was captured."""
        value = node_value(node)
        if node in self._shapes.below_capacity:
            return self._capacity - self._shapes.below_capacity[node]
        if self._kind(node) != "copied":
            return value
        sizes = list(value.shape)
        if node in self._shapes.widened:
            sizes[self._shapes.widened[node]] = self._capacity
        # Buffers are contiguous.
        return value.new_empty(sizes)

    def wrap(
        self,
        inner: Callable[..., Any],
        captured: Sequence[Node],
        added: Sequence[tuple[Node, StateInput]],
        device: torch.device,
    ) -> StepGraph:
        """Let the lowered graph be recorded.

        Args:
            inner: the graph.
            captured: its first inputs.
            added: the others.
            device: of all tensors.
        """
        kinds = [(node, self._kind(node)) for node in captured] + [
            (node, _KINDS[source.kind]) for node, source in added
        ]
        inputs = [
            StepInput(
                kind=kind,
                widened=self._shapes.widened.get(node),
                below_capacity=self._shapes.below_capacity.get(node),
            )
            for node, kind in kinds
        ]
        pages = len(captured) + [source.kind for _, source in added].index("pages")
        return StepGraph(inner, inputs, pages, device, self._settings.recording_pool)

    def _kind(self, node: Node) -> InputKind:
        value = node_value(node)
        if not isinstance(value, Tensor):
            return "number"
        # Dynamo marks parameters and buffers of modules.
        is_marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        is_weight = is_marked or isinstance(value, torch.nn.Parameter)
        return "weight" if is_weight and node not in self._shapes.widened else "copied"


def recorded_step(
    result: RewriteResult, added: Sequence[tuple[Node, StateInput]], settings: Settings
) -> RecordedStep | None:
    """Fix the shapes of a decode step, if it is one and shall be recorded; None if it runs as it is.

    Args:
        result: a rewritten Dynamo graph, changed in place.
        added: the inputs that the rewrite added.
        settings: of the model; each reason for a refusal is told once.
    """
    sites = [binding.site for binding in result.bindings]
    is_step = all(site.kind == "continue" and static_int(node_value(site.key).shape[2]) == 1 for site in sites)
    inputs = {source.kind: node for node, source in added}
    on_recorder = result.bindings[0].shape.device.type in RECORDERS
    if not (settings.records_steps and is_step and on_recorder and "pages" in inputs):
        return None
    shapes = fix_shapes(result.gm, result.bindings, inputs["lengths"])
    if isinstance(shapes, FixedShapes):
        return RecordedStep(shapes, node_value(inputs["pages"]) * PAGE, settings)
    counters["refusals"] += 1
    if settings.is_news(shapes):
        log.warning("ottfx: a decode step is not recorded, it runs as without a mode: %s.", shapes)
    return None
