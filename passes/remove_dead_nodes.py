"""Remove what a rewrite left without a reader, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule, Node

from ottfx.passes.spellings import is_idle_query, is_mutating


def remove_dead_nodes(
    gm: GraphModule, orphans: Iterable[Node], *, erase_placeholders: bool = False
) -> tuple[int, list[Node]]:
    """Remove orphaned nodes that nobody reads, then whatever only they read.

    FX takes Dynamo's in-place methods for pure: a static cache's `index_copy_` has no reader. So a node that may write
    is never removed, and neither is a node that was unused before the rewrite, except for idle size queries.

    Args:
        gm: a rewritten graph.
        orphans: nodes that may have lost their last reader.
        erase_placeholders: remove the graph inputs that lost their last reader too.

    Returns:
        The number of nodes removed, and the graph inputs that lost their last reader.
    """
    graph = gm.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    stack = sorted({node for node in orphans if node in order}, key=order.__getitem__)
    stack += [node for node in graph.nodes if is_idle_query(node)]
    unread: dict[Node, None] = {}
    removed = 0
    while stack:
        node = stack.pop()
        if node.users or node not in order:
            continue
        if node.op == "placeholder":
            unread[node] = None
        elif node.op == "get_attr" or (node.op in ("call_function", "call_method") and not is_mutating(node)):
            stack.extend(node.all_input_nodes)
            graph.erase_node(node)
            del order[node]
            removed += 1
    if erase_placeholders:
        for node in unread:
            graph.erase_node(node)
    gm.recompile()
    return removed, sorted(unread, key=order.__getitem__)
