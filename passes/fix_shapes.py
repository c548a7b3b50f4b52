"""Let one set of arguments serve a decode graph for all cache lengths, so that it can be recorded once.

After `quantize_kv_cache` the length is left in what surrounds the ops: masks, and positions that the model computes.
Where it is a size, the graph is from now on called as if the cache were full; only the ops read what is too much, in
masks, where it means nothing. Where it is a value, it becomes a 0-d tensor, read from the lengths of the call.
`length_rules` says which calls allow that; any other leaves the graph as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from ottfx.attention_site import Binding
from ottfx.passes.graph_utils import node_value
from ottfx.passes.length_rules import CannotFix, Length, LengthRules, Positions, cannot_fix, leaves
from ottfx.passes.spellings import is_mutating


@dataclass(frozen=True, kw_only=True)
class FixedShapes:
    """How to call a graph from now on, with `capacity`, the tokens that its state has room for."""

    widened: dict[Node, int] = field(default_factory=dict)
    """Input -> the axis along which it must have `capacity` entries; those that were not there may be anything."""
    below_capacity: dict[Node, int] = field(default_factory=dict)
    """Input that is a number -> what to take from `capacity` to get it."""


def fix_shapes(gm: GraphModule, bindings: Sequence[Binding], lengths: Node) -> FixedShapes | str:
    """Replace the cache length by a tensor where it is a value, and find out where it is a size.

    Args:
        gm: a Dynamo graph after `quantize_kv_cache`, all of its sites of kind `continue` with one constant q_len.
        bindings: its sites.
        lengths: the input int64 [sites, 3].

    Returns:
        How to call the graph; or the reason why that cannot be, and nothing was changed.
    """
    try:
        rules = LengthRules(gm.graph, bindings)
        needed = _needed(gm.graph, rules)
        fixed = _check(gm.graph, rules, needed, bindings[0].shape.device)
    except CannotFix as reason:
        return str(reason)
    maker = _Maker(gm.graph, lengths, rules.rows)
    for node, (target, args, kwargs) in rules.edits.items():
        if node in needed:
            node.target, node.args, node.kwargs = target, maker.make(args, node), kwargs
    for node in reversed(gm.graph.nodes):
        if node.op.startswith("call_") and node not in needed and node not in maker.made:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return fixed


def _needed(graph: Graph, rules: LengthRules) -> set[Node]:
    """What stays: all that does not touch a length, all that may write, the output, and what they will read."""
    needed: set[Node] = set()
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    stack = [*graph.find_nodes(op="output")]
    stack += [node for node in calls if is_mutating(node) or not rules.touches(node)]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        _, *operands = rules.edits.get(node, (None, node.args, node.kwargs))
        stack += [leaf for leaf in leaves(tuple(operands)) if isinstance(leaf, Node)]
    return needed


def _check(graph: Graph, rules: LengthRules, needed: set[Node], device: torch.device) -> FixedShapes:
    """Say how to call the graph, or raise for the first node that forbids it."""
    fixed = FixedShapes()
    for node in graph.nodes:
        value = node_value(node)
        if node not in needed:
            continue
        if node in rules.refusals:
            raise rules.refusals[node]
        if isinstance(value, Tensor) and value.device != device:
            raise cannot_fix(node, f"is on {value.device}, and the cache on {device}")
        if node.op == "placeholder" and node in rules.widened:
            fixed.widened[node] = rules.widened[node]
        elif node.op == "placeholder" and rules.varies(value):
            expression = value.node.expr
            if expression not in rules.rows and expression not in rules.sizes:
                raise cannot_fix(node, "is a number that may change from call to call")
            fixed.below_capacity[node] = rules.q_len if expression in rules.rows else 0
    return fixed


class _Maker:
    """Makes the nodes that operands only stand for."""

    def __init__(self, graph: Graph, lengths: Node, rows: dict[sympy.Symbol, int]) -> None:
        self.made: set[Node] = set()
        self._graph, self._lengths, self._rows = graph, lengths, rows
        self._first = next(node for node in graph.nodes if node.op.startswith("call_"))
        self._known: dict[sympy.Expr, Any] = {}

    def make(self, operands: Any, user: Node) -> Any:
        """Put nodes where something stands for them in the operands of `user`."""

        def replace(leaf: Any) -> Any:
            if isinstance(leaf, Length):
                return self._length(leaf.expression)
            if isinstance(leaf, Positions):
                return self._call(user, torch.arange, (leaf.count,), node_value(leaf.model), leaf.model.kwargs)
            return leaf

        return map_aggregate(operands, replace)

    def _length(self, expression: sympy.Expr) -> Any:
        if expression not in self._known:
            scalar = node_value(self._lengths).new_empty(())
            total: Any = None
            for symbol, factor in expression.as_coefficients_dict().items():
                part: Any = int(factor)
                if symbol != 1:
                    part = self._call(self._first, operator.getitem, (self._lengths, (self._rows[symbol], 0)), scalar)
                    part = part if factor == 1 else self._call(self._first, operator.mul, (part, int(factor)), scalar)
                total = part if total is None else self._call(self._first, operator.add, (total, part), scalar)
            self._known[expression] = total
        return self._known[expression]

    def _call(self, before: Node, target: Any, args: tuple, value: Any, kwargs: dict[str, Any] | None = None) -> Node:
        with self._graph.inserting_before(before):
            node = self._graph.call_function(target, args, dict(kwargs or {}))
        node.meta["example_value"] = value
        self.made.add(node)
        return node
