"""What may touch a cache length in a graph that is called as if its cache were full (see `fix_shapes`).

A tensor whose size follows the length is *widened*: entries up to the true size are the same as before, those behind
it are arbitrary. A call is accepted only if that holds for its result, whatever those entries are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from ottfx.attention_site import Binding
from ottfx.passes.graph_utils import dtype_of, node_value, same_size, shape_of, short_target, static_int
from ottfx.passes.spellings import EXPAND, GETITEM, RESHAPE, Spelling
from ottfx.schemes.base import ANY_LENGTH

_MASK_OF_ATTEND, _PAST_OF_ATTEND, _MASK_OF_APPEND = 3, 6, 2


def _everywhere(*names: str) -> Spelling:
    functions = {getattr(module, name) for module in (operator, torch) for name in names if hasattr(module, name)}
    return Spelling(frozenset(functions), frozenset({*names, *(f"__{name.strip('_')}__" for name in names)}))


# Element by element; a number among the operands may as well be a 0-d tensor.
_ARITHMETIC = _everywhere("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "where", "masked_fill")
# Element by element, or a reordering of axes; no operand is a size.
_SAME_AXES = _everywhere(
    "and_", "or_", "invert", "neg", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "logical_not",
    "to", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "clone", "contiguous", "detach",
    "ones_like", "zeros_like", "unsqueeze", "transpose",
)  # fmt: skip
_NEW = _everywhere("ones", "zeros", "full", "new_ones", "new_zeros", "new_full")
_FILL = _everywhere("full", "new_full")
_ARANGE = _everywhere("arange")
_ADD = _everywhere("add")
_SAME_INTEGERS = _everywhere("to", "long", "clone", "contiguous", "detach", "unsqueeze")


class CannotFix(Exception):
    """Why a graph needs a cache length as it is."""


@dataclass(frozen=True)
class Length:
    """Stands for a 0-d int64 tensor: a linear expression of cache lengths."""

    expression: sympy.Expr


@dataclass(frozen=True)
class Positions:
    """Stands for `arange(count)`, made as `model` is."""

    count: int
    model: Node


class LengthRules:
    """Reads a graph, and decides for every node that touches a length what becomes of it. Changes nothing."""

    def __init__(self, graph: Graph, bindings: Sequence[Binding]) -> None:
        self.widened: dict[Node, int] = {}
        """Node -> its axis that follows a length."""
        self.edits: dict[Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        """Node -> target and operands from now on, with what stands for nodes that do not exist yet."""
        self.refusals: dict[Node, CannotFix] = {}
        """Nodes for which there is no rule: the graph cannot be fixed if one of them is needed."""
        self.rows: dict[sympy.Symbol, int] = {}
        """Symbol of a cache length -> a row of `lengths` that has it."""
        self.q_len = static_int(node_value(bindings[0].site.key).shape[2]) or 0
        self._counting: set[Node] = set()
        """Widened integers whose entry `i` along the axis is `i`."""
        self._attend = {binding.scheme.attend_op for binding in bindings}
        self._append = {binding.scheme.append_op for binding in bindings}
        shapes = [binding.shape for binding in bindings]
        self._constant = {x for shape in shapes for size in (shape.batch_size, shape.pages) for x in _symbols(size)}
        for binding in bindings:
            for past in (binding.site.past_key, binding.site.past_value):
                size = (shape_of(past) or (None,) * 3)[2]
                if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                    raise CannotFix(f"the cache length of {binding.site.name} is not a symbol but {size}")
                if size.node.expr in self._constant:
                    raise CannotFix(f"the cache of {binding.site.name} was as long as the batch is large when captured")
                self.rows.setdefault(size.node.expr, binding.row)
        inputs = [size for node in graph.find_nodes(op="placeholder") for size in shape_of(node) or ()]
        free = {size.node.expr for size in inputs if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol}
        self.sizes = (free - self._constant - self.rows.keys()) | {symbol + self.q_len for symbol in self.rows}
        """Expressions of sizes that become the capacity: past and new tokens, and free sizes of inputs."""
        for node in graph.nodes:
            if self.touches(node):
                try:
                    self._read(node)
                except CannotFix as refusal:
                    self.refusals[node] = refusal

    def varies(self, value: Any) -> bool:
        """Whether a size of a tensor, or a number, follows from more than batch size and capacity."""
        return bool(_symbols(node_value(value)) - self._constant)

    def touches(self, node: Node) -> bool:
        """Whether a node, or something that it reads, varies."""
        return self.varies(node) or any(self.varies(source) for source in node.all_input_nodes)

    def _read(self, node: Node) -> None:
        if node.op == "call_function" and node.target in self._attend | self._append:
            return self._read_op(node)
        value = node_value(node)
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return  # Who reads the number decides.
        axes = [axis for axis, size in enumerate(value.shape) if self.varies(size)] if isinstance(value, Tensor) else []
        if len(axes) > 1 or not all(self._is_size(value.shape[axis]) for axis in axes):
            raise cannot_fix(node, f"has sizes that do not follow the cache length one to one: {[*value.shape]}")
        if axes:
            self.widened[node] = axes[0]
        if node.op == "placeholder":
            return
        if node in _ARANGE:
            self._read_arange(node)
        elif node in _NEW:
            first = 1 if node.op == "call_method" else 0
            self._allow(node, sizes=node.args[first : first + 1 if node in _FILL else None])
        elif not axes and any(source in self.widened for source in node.all_input_nodes):
            raise cannot_fix(node, "reads a whole tensor that grows with the cache")
        elif node in _ARITHMETIC:
            self._allow(node, sizes=node.args)
            self.edits[node] = (node.target, tuple(self._as_value(node, arg) for arg in node.args), node.kwargs)
            if node in _ADD and static_int(node.args[1]) == 0:
                self._count_like(node.args[0], node)
        elif node in _SAME_AXES:
            self._allow(node)
            if node in _SAME_INTEGERS and dtype_of(node) == torch.int64:
                self._count_like(node.args[0], node)
        elif node in RESHAPE or (node in EXPAND and node.target != "expand_as"):
            self._allow(node, sizes=node.args[1:])
            if node in RESHAPE and not _only_ones_differ(shape_of(node.args[0]), shape_of(node)):
                raise cannot_fix(node, "joins or splits an axis that grows with the cache")
        elif node in GETITEM:
            self._read_getitem(node)
        else:
            raise cannot_fix(node, "depends on the cache length, and no rule says that it may")

    def _read_op(self, node: Node) -> None:
        args: list[Any] = list(node.args)
        is_attend = node.target in self._attend
        if is_attend:
            args[_PAST_OF_ATTEND] = ANY_LENGTH
        mask = args[_MASK_OF_ATTEND if is_attend else _MASK_OF_APPEND]
        if any(isinstance(arg, Node) and arg is not mask and self.varies(arg) for arg in args):
            raise cannot_fix(node, "has another operand than a mask that changes with the cache length")
        if self.widened.get(mask, 3) != 3:
            raise cannot_fix(node, "has a mask whose queries change with the cache length")
        self.edits[node] = (node.target, tuple(args), node.kwargs)

    def _read_arange(self, node: Node) -> None:
        bounds = [node_value(arg) for arg in node.args]
        start, step = 0 if len(bounds) == 1 else bounds[0], bounds[2] if len(bounds) == 3 else 1
        if static_int(step) != 1 or not bounds or {"start", "end", "step"} & node.kwargs.keys():
            raise cannot_fix(node, "counts with a step, or has bounds by name")
        if node not in self.widened:
            positions = Positions(static_int(node_value(node).shape[0]) or 0, node)
            self.edits[node] = (operator.add, (positions, self._length(node, start)), {})
        elif static_int(start) != 0:
            raise cannot_fix(node, "counts up to the cache length, and not from 0")
        elif dtype_of(node) == torch.int64:
            self._counting.add(node)

    def _read_getitem(self, node: Node) -> None:
        source: Any = node.args[0]
        index = node.args[1]
        items = list(index) if isinstance(index, tuple) else [index]
        tensors = [isinstance(node_value(item), Tensor) for item in items]
        if all(tensors):
            positions = {place: item for place, item in enumerate(items) if item in self.widened}
            # Behind the true size a widened index is in range only if it counts, and what it reads is as wide.
            if [*positions] != [self.widened.get(source)] or not self._counting.issuperset(positions.values()):
                raise cannot_fix(node, "looks up positions that change with the cache length")
            return
        if any(tensors) or source not in self.widened:
            raise cannot_fix(node, "takes a part that changes with the cache length")
        if Ellipsis in items:
            place = items.index(Ellipsis)
            named = sum(item is not None for item in items) - 1
            items[place : place + 1] = [slice(None)] * (node_value(source).dim() - named)
        kept = [item for item in items if item is not None]
        for axis, item in enumerate(kept):
            part = item if isinstance(item, slice) else slice(item, item)
            from_start = static_int(part.start or 0) == 0 and part.step in (None, 1)
            to_end = part.stop is None or (
                isinstance(part.stop, Node) and node_value(part.stop).node.expr in self.sizes
            )
            if axis == self.widened[source] and not (isinstance(item, slice) and from_start and to_end):
                raise cannot_fix(node, "takes a part of an axis that grows with the cache")
            if axis != self.widened[source] and any(self.varies(x) for x in (part.start, part.stop, part.step)):
                raise cannot_fix(node, "takes a part that changes with the cache length")
        self._count_like(source, node)

    def _is_size(self, size: Any) -> bool:
        number = node_value(size)
        return isinstance(number, torch.SymInt) and number.node.expr in self.sizes

    def _count_like(self, source: Any, node: Node) -> None:
        if source in self._counting:
            self._counting.add(node)

    def _allow(self, node: Node, sizes: Any = ()) -> None:
        """Accept a call if every number in its operands that varies is among `sizes`."""
        allowed = [leaf for leaf in leaves(sizes) if isinstance(leaf, Node)]
        for leaf in leaves((node.args, node.kwargs)):
            if self.varies(leaf) and not isinstance(node_value(leaf), Tensor) and leaf not in allowed:
                raise cannot_fix(node, "has an operand that changes with the cache length")

    def _as_value(self, node: Node, arg: Any) -> Any:
        number = node_value(arg)
        return arg if isinstance(number, Tensor) or not self.varies(number) else self._length(node, number)

    def _length(self, node: Node, number: Any) -> Length:
        parts = number.node.expr.as_coefficients_dict() if isinstance(number, torch.SymInt) else {None: 1}
        if any(part != 1 and part not in self.rows for part in parts) or any(f != int(f) for f in parts.values()):
            raise cannot_fix(node, f"depends on {number}, which is not linear in the lengths of caches")
        return Length(number.node.expr)


def cannot_fix(node: Node, what: str) -> CannotFix:
    """Name a node and what it does."""
    return CannotFix(f"{short_target(node)} ({node.name}) {what}")


def leaves(value: Any) -> Iterable[Any]:
    """Everything in nested operands that is no container."""
    found: list[Any] = []
    map_aggregate(value, found.append)
    return found


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, Tensor):
        return set().union(*(_symbols(size) for size in value.shape))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(value.node.expr.free_symbols)
    return set()


def _only_ones_differ(before: Any, after: Any) -> bool:
    left, right = ([size for size in shape or () if static_int(size) != 1] for shape in (before, after))
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))
