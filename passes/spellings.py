"""Every spelling of the calls that the passes look for, in one place: torch functions, methods and ATen overloads."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ottfx.passes.graph_utils import dtype_of, node_value, same_shape, same_size, shape_of, static_int

aten = torch.ops.aten


@dataclass(frozen=True)
class Spelling:
    """The ways to write one operation."""

    functions: frozenset[Any]
    methods: frozenset[str] = frozenset()
    parameters: tuple[str, ...] = ()
    """Names of the operands in positional order, as keyword calls give them."""

    def __contains__(self, node: object) -> bool:
        if not isinstance(node, Node):
            return False
        if node.op == "call_function":
            return node.target in self.functions
        return node.op == "call_method" and node.target in self.methods

    def operand(self, node: Node, name: str, default: Any = None) -> Any:
        """One operand of a call, however it was passed."""
        index = self.parameters.index(name)
        if index < len(node.args):
            return node.args[index]
        return node.kwargs.get(name, default)


def _functions(packets: Iterable[Any], *others: Any) -> frozenset[Any]:
    """Overload packets with all of their overloads, and other callables."""
    found: set[Any] = set(others)
    for packet in packets:
        found.add(packet)
        found.update(getattr(packet, name) for name in packet.overloads())
    return frozenset(found)


ATTENTION = Spelling(
    _functions(
        [aten.scaled_dot_product_attention],
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
    ),
    parameters=("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
)
CAT = Spelling(
    _functions([aten.cat, aten.concat, aten.concatenate], torch.cat, torch.concat, torch.concatenate),
    parameters=("tensors", "dim"),
)
SAME_VALUE = Spelling(
    _functions(
        [aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh, aten.lift_fresh_copy],
        torch.clone,
        torch.detach,
    ),
    frozenset({"contiguous", "clone", "detach"}),
)
"""The result equals the first operand, whatever the other operands are."""
CONVERT = Spelling(
    _functions([aten.to, aten._to_copy]), frozenset({"to", "type_as", "float", "half", "bfloat16"}), ("input",)
)
UNSQUEEZE = Spelling(_functions([aten.unsqueeze], torch.unsqueeze), frozenset({"unsqueeze"}), ("input", "dim"))
EXPAND = Spelling(
    _functions([aten.expand, aten.broadcast_to], torch.broadcast_to), frozenset({"expand", "broadcast_to", "expand_as"})
)
REPEAT = Spelling(_functions([aten.repeat]), frozenset({"repeat"}))
RESHAPE = Spelling(
    _functions([aten.reshape, aten.view, aten._unsafe_view, aten.flatten], torch.reshape, torch.flatten),
    frozenset({"reshape", "view", "flatten"}),
)
REPEAT_INTERLEAVE = Spelling(
    _functions([aten.repeat_interleave], torch.repeat_interleave),
    frozenset({"repeat_interleave"}),
    ("input", "repeats", "dim"),
)
SLICE = Spelling(_functions([aten.slice]), parameters=("input", "dim", "start", "end", "step"))
NARROW = Spelling(_functions([aten.narrow], torch.narrow), frozenset({"narrow"}))
GETITEM = Spelling(frozenset({operator.getitem}), parameters=("input", "index"))
SIZE = Spelling(_functions([aten.sym_size]), frozenset({"size"}), ("input", "dim"))
METADATA_CHECK = Spelling(_functions([aten._assert_tensor_metadata]))
IN_PLACE_DETACH = Spelling(_functions([aten.detach_]), frozenset({"detach_"}))
STATIC_WRITE = Spelling(
    _functions(
        [aten.index_copy, aten.index_copy_, aten.index_put, aten.index_put_, aten.copy_, aten.slice_scatter,
         aten.scatter, aten.scatter_, aten.select_scatter],
        operator.setitem, torch.index_copy, torch.index_put, torch.slice_scatter, torch.scatter, torch.select_scatter,
    ),
    frozenset({"index_copy", "index_copy_", "index_put", "index_put_", "copy_", "scatter", "scatter_"}),
)  # fmt: skip
"""Writes into a buffer of fixed size: a cache that does not grow."""

_NAMES_OF_QUERIES = frozenset({"size", "numel", "dim", "stride", "is_contiguous", "ndimension", "nelement"})
_PURE_NAMES_WITH_UNDERSCORE = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
_WRITING_FUNCTIONS = frozenset(
    getattr(operator, name)
    for name in (
        "setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior",
        "ipow", "irshift", "isub", "itruediv", "ixor",
    )
)  # fmt: skip


def is_size_query(node: Node) -> bool:
    """Whether a call asks for one size of a tensor along an axis given as an int."""
    return node in SIZE and isinstance(SIZE.operand(node, "dim"), int)


def is_idle_query(node: Node) -> bool:
    """Whether a call only asks for sizes and nobody reads the answer."""
    return not node.users and (node in SIZE or (node.op == "call_method" and node.target in _NAMES_OF_QUERIES))


def is_guard_call(node: Node) -> bool:
    """Whether this is the call that checks shapes at the start of an exported module."""
    return node.op == "call_module" and str(node.target).split(".")[-1] == "_guards_fn"


def is_no_op(node: Node) -> bool:
    """Whether a call returns the value of its first operand for every input: copies, full slices, same-type casts."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    source = node.args[0]
    if node in SAME_VALUE:
        return True
    if node in CONVERT:
        value, before = node_value(node), node_value(source)
        return dtype_of(node) is not None and dtype_of(node) == dtype_of(source) and value.device == before.device
    if node in RESHAPE or node in EXPAND:
        return same_shape(shape_of(node), shape_of(source))
    if node in SLICE:
        dim = SLICE.operand(node, "dim", 0)
        bounds = slice(*(SLICE.operand(node, name) for name in ("start", "end", "step")))
        return _is_full_slice(bounds, dim, source)
    if node in GETITEM:
        return _is_full_index(GETITEM.operand(node, "index"), source)
    return False


def is_length_slice(node: Node) -> bool:
    """Whether a call takes a part of a [batch, heads, length, head_dim] tensor along its length."""
    if is_no_op(node):
        return False
    if node in NARROW:
        return True
    if node in SLICE:
        return SLICE.operand(node, "dim", 0) in (2, -2)
    index = GETITEM.operand(node, "index") if node in GETITEM else None
    return isinstance(index, tuple) and any(isinstance(item, slice) and item != slice(None) for item in index)


def new_axis_of_index(node: Node) -> int | None:
    """Axis that `x[:, :, None]` adds, or None for any other indexing."""
    index = GETITEM.operand(node, "index")
    if not isinstance(index, tuple) or sum(item is None for item in index) != 1:
        return None
    position = index.index(None)
    rest = [item for item in index if item is not None and item is not Ellipsis]
    if Ellipsis in index[:position] or any(item != slice(None) for item in rest):
        return None
    return position


def is_mutating(node: Node) -> bool:
    """Whether a call may write to its operands. FX itself does not know this for methods."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return node.op == "call_module"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if target in _PURE_NAMES_WITH_UNDERSCORE:
        return False
    name = getattr(target, "__name__", "")
    ends_in_place = name.endswith("_") and not name.endswith("__")
    return ends_in_place or target in _WRITING_FUNCTIONS or node.kwargs.get("out") is not None or node.is_impure()


def is_written(node: Node) -> bool:
    """Whether a call in the graph may write to this very tensor."""
    return any(_writes_to(user, node) for user in node.users if is_mutating(user) and not is_guard_call(user))


def _writes_to(call: Node, tensor: Node) -> bool:
    if isinstance(call.target, torch._ops.OpOverload):
        for position, argument in enumerate(call.target._schema.arguments):
            operand = call.args[position] if position < len(call.args) else call.kwargs.get(argument.name)
            if operand is tensor and argument.alias_info is not None and argument.alias_info.is_write:
                return True
        return False
    return call.op == "call_module" or call.args[:1] == (tensor,) or call.kwargs.get("out") is tensor


def _is_full_index(index: Any, source: Node) -> bool:
    if index is Ellipsis:
        return True
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis in items and items[-1] is not Ellipsis:
        return all(item is Ellipsis or item == slice(None) for item in items)
    return all(
        item is Ellipsis or (isinstance(item, slice) and _is_full_slice(item, dim, source))
        for dim, item in enumerate(items)
    )


def _is_full_slice(bounds: slice, dim: int, source: Node) -> bool:
    shape = shape_of(source)
    if bounds.step not in (None, 1) or static_int(0 if bounds.start is None else bounds.start) != 0:
        return False
    end = node_value(bounds.stop)
    if end is None or (isinstance(end, int) and end == sys.maxsize):
        return True
    return shape is not None and same_size(end, shape[dim])
