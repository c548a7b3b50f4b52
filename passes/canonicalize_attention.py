"""Fold what `torch.export` puts around an unflattened cache; every value stays what it was."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ottfx.passes.graph_utils import dtype_of, is_empty, node_value, shape_of
from ottfx.passes.spellings import CAT, IN_PLACE_DETACH, SAME_VALUE, is_mutating, is_written


def canonicalize_attention(gm: GraphModule) -> int:
    """Fold `cat([empty, past], 2)` that only feeds another `cat` on that axis, and copies of empty constants.

    A program that builds a `DynamicCache` from its inputs has `cat([cat([empty, past]), new])` for each half of it.

    Returns:
        The number of nodes removed.
    """
    removed = 0
    for node in list(gm.graph.nodes):
        if not node.args or not node.users:
            continue
        if node in CAT:
            past = _only_part(node)
            if past is not None and _feeds_only_cats(node):
                removed += _replace(node, past)
        elif (node in IN_PLACE_DETACH or node in SAME_VALUE) and is_empty(node) and isinstance(node.args[0], Node):
            source = node.args[0]
            if is_empty(source) and not any(is_mutating(user) for user in node.users if user is not node):
                removed += _replace(node, source)
    for node in reversed(gm.graph.nodes):
        # Nothing reads an empty constant any more, and it cannot have been written to.
        is_copy = node in IN_PLACE_DETACH or node in SAME_VALUE or node.op == "get_attr"
        if removed and not node.users and is_empty(node) and is_copy:
            gm.graph.erase_node(node)
            removed += 1
    if removed:
        gm.recompile()
    return removed


def _only_part(cat: Node) -> Node | None:
    """The operand with tokens, if it is a graph input and everything else in this `cat` is empty."""
    dim, parts = CAT.operand(cat, "dim", 0), CAT.operand(cat, "tensors")
    if dim not in (2, -2) or not all(isinstance(part, Node) for part in parts):
        return None
    with_tokens = [part for part in parts if not is_empty(part)]
    if len(with_tokens) != 1 or len(parts) == 1:
        return None
    (past,) = with_tokens
    if past.op != "placeholder" or len(shape_of(past) or ()) != 4 or dtype_of(past) != dtype_of(cat):
        return None
    return None if is_written(past) or node_value(past).device != node_value(cat).device else past


def _feeds_only_cats(cat: Node) -> bool:
    return all(user in CAT and CAT.operand(user, "dim", 0) in (2, -2) for user in cat.users)


def _replace(node: Node, source: Node) -> int:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return 1
