"""Say once for all layers which of the new tokens are real, where each append would read it from the same mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ottfx.attention_site import Binding
from ottfx.passes.graph_utils import node_value, shape_of


def share_validity(gm: GraphModule, bindings: Sequence[Binding], token_validity: Any) -> int:
    """Let appends that have the same mask behind equally many tokens get what the mask says of the new ones.

    Each layer would otherwise select the same row of the mask by lengths of its own: a launch more, and, as the row
    of the lengths is a constant of it, a kernel more to compile.

    Args:
        gm: a graph after `quantize_kv_cache`.
        bindings: those of its sites whose append takes bool [batch, q_len] in place of the mask.
        token_validity: operator (mask, lengths, row, key) -> bool [batch, q_len].

    Returns:
        The number of calls of `token_validity` that were added.
    """
    rows = {(binding.scheme.append_op, binding.row): binding for binding in bindings}
    known: dict[tuple[Any, ...], Node] = {}
    for node in list(gm.graph.nodes):
        binding = rows.get((node.target, node.args[4])) if node.op == "call_function" and len(node.args) > 4 else None
        if binding is None or not isinstance(node.args[2], Node):
            continue
        key, value, mask, lengths, row, *rest = node.args
        past = binding.site.past_key
        stored = 0 if past is None else _comparable((shape_of(past) or (None,) * 4)[2])
        batch_size, _, q_len, _ = shape_of(key) or (None,) * 4
        group = (mask, stored, _comparable(batch_size), _comparable(q_len))
        if group not in known:
            with gm.graph.inserting_before(node):
                known[group] = gm.graph.call_function(token_validity, (mask, lengths, row, key))
            known[group].meta["example_value"] = node_value(mask).new_empty((batch_size, q_len), dtype=torch.bool)
        node.args = (key, value, known[group], lengths, row, *rest)
    return len(known)


def _comparable(size: Any) -> Any:
    # A symbol stands for equal sizes; comparing the sizes themselves would add guards.
    return size.node.expr if isinstance(size, torch.SymInt) else size
