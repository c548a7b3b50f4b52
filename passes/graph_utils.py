"""Small questions about FX nodes, with the same answers for Dynamo graphs and for exported ATen graphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

_MODULE_PREFIX = re.compile(r"^L\['\w+'\]\.?")
_MODULE_ITEM = re.compile(r"(?:\._modules|\._buffers)?\[['\"]?([^\]'\"]+)['\"]?\]")


def node_value(node: Any) -> Any:
    """What the tracer knows about a node's result: a (fake) tensor, a symbolic or plain number, or None."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Sizes of a node's tensor, each an int or a SymInt, or None if it is no tensor or nothing is known."""
    value = node_value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """Element type of a node's tensor, or None."""
    value = node_value(node)
    return value.dtype if isinstance(value, Tensor) else None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every input. Adds no guard; unknown counts as different."""
    left, right = node_value(left), node_value(right)
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if not isinstance(left, (int, torch.SymInt)) or not isinstance(right, (int, torch.SymInt)):
        return False
    return statically_known_true(left == right)


def same_shape(left: Sequence[Any] | None, right: Sequence[Any] | None) -> bool:
    """Whether two shapes are known and equal for every input."""
    if left is None or right is None or len(left) != len(right):
        return False
    return all(same_size(a, b) for a, b in zip(left, right, strict=True))


def static_int(size: Any) -> int | None:
    """The size as a plain int if it is the same for every input, otherwise None. Adds no guard."""
    size = node_value(size)
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return None


def is_empty(node: Any) -> bool:
    """Whether a tensor holds no token for any input: shape [0], or size 0 on the length axis of four."""
    shape = shape_of(node)
    if shape is None:
        return False
    if len(shape) == 1:
        return static_int(shape[0]) == 0
    return len(shape) == 4 and static_int(shape[2]) == 0


def graph_outputs(graph: Graph) -> tuple[Any, ...]:
    """The flat outputs of a graph: one entry for each value that it returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    returned = output.args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def module_name(node: Node) -> str | None:
    """Path of the module whose forward made this node, such as `model.layers.0.self_attn`, if the graph knows it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    path = _MODULE_ITEM.sub(r".\1", _MODULE_PREFIX.sub("", path))
    return path.strip(".") or None


def short_target(node: Node) -> str:
    """Name of what a node calls, for reports: `transpose`, `aten.mul.Tensor`, `cat`."""
    if node.op in ("placeholder", "output", "get_attr", "call_method", "call_module"):
        return str(node.target)
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def format_graph(graph: Graph) -> str:
    """One line for each node: `name: float32[2, s3, 64] = target(operands)`."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        operands = [str(arg) for arg in node.args] + [f"{name}={arg}" for name, arg in node.kwargs.items()]
        call = node.op if node.op in ("placeholder", "get_attr") else short_target(node)
        lines.append(f"{node.name}: {_describe(node)} = {call}({', '.join(operands)})")
    return "\n".join(lines)


def _describe(node: Node) -> str:
    value = node_value(node)
    if isinstance(value, Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return "?" if value is None else f"{type(value).__name__} {value}"
