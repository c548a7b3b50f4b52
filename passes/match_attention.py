"""Find every attention whose keys and values are a cache that the graph extends and returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ottfx.attention_site import AttentionSite, Refusal
from ottfx.passes.cache_read import CacheRead, CacheReader
from ottfx.passes.graph_utils import dtype_of, module_name, node_value, same_size, shape_of, static_int
from ottfx.passes.spellings import ATTENTION

NOT_SPELLED_AS_ATTENTION = (
    "the cache does not reach scaled_dot_product_attention: load the model with attn_implementation='sdpa', "
    "or write its attention with torch.nn.functional.scaled_dot_product_attention"
)


def match_attention(gm: GraphModule) -> tuple[list[AttentionSite], list[Refusal]]:
    """Find the attentions whose cache can be replaced; the graph is not changed.

    A candidate is a `scaled_dot_product_attention` whose keys and values the graph extends (`cat([past, new], 2)`,
    or fresh keys) and returns. An attention without a cache, such as an encoder's, is no candidate. A returned cache
    that no attention node reads is a refused candidate.

    Args:
        gm: a Dynamo graph, or an exported ATen graph; its nodes know shapes (`example_value` or `val`).

    Returns:
        The sites and the refusals, each in graph order, numbered together.
    """
    reader = CacheReader(gm.graph)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    found: list[tuple[int, Node, AttentionSite | str]] = []
    for node in gm.graph.nodes:
        if node in ATTENTION:
            result = _match_one(node, reader)
            if result is not None:
                found.append((order[node], node, result))
    unread: dict[str, Node] = {}
    for cat in reader.returned_caches(gm.graph):
        if cat not in reader.explained:
            unread.setdefault(module_name(cat) or cat.name, cat)
    found += [(order[cat], cat, NOT_SPELLED_AS_ATTENTION) for cat in unread.values()]

    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    for index, (_, node, result) in enumerate(sorted(found, key=lambda entry: entry[0])):
        if isinstance(result, str):
            refusals.append(Refusal(index=index, name=module_name(node) or node.name, reason=result))
        else:
            result.index = index
            sites.append(result)
    return sites, refusals


def _match_one(attention: Node, reader: CacheReader) -> AttentionSite | str | None:
    """The site, why it is refused, or None if it has no cache."""
    query, key, value = (ATTENTION.operand(attention, name) for name in ("query", "key", "value"))
    if not all(isinstance(operand, Node) for operand in (query, key, value)):
        return None
    keys, values = reader.read(key, attention), reader.read(value, attention)
    if keys is None and values is None:
        return None
    for half in (keys, values):
        if isinstance(half, str):
            return half
    if not isinstance(keys, CacheRead) or not isinstance(values, CacheRead):
        return "only one of keys and values is a cache"
    if (keys.past is None) != (values.past is None):
        return "key and value caches of different kinds: one continues stored tokens, the other starts fresh"
    softmax_scale = _softmax_scale(attention, query)
    mask = ATTENTION.operand(attention, "attn_mask")
    is_causal = ATTENTION.operand(attention, "is_causal", False)
    reason = (
        _refuse_shapes(attention, query, keys, values)
        or _refuse_arithmetic(attention, is_causal, has_past=keys.past is not None)
        or _refuse_mask(mask, query, key)
        or (softmax_scale if isinstance(softmax_scale, str) else None)
    )
    if reason is not None:
        return reason
    assert isinstance(softmax_scale, float)
    return AttentionSite(
        index=-1,
        name=module_name(attention) or attention.name,
        attention=attention,
        query=query,
        key=keys.new,
        value=values.new,
        past_key=keys.past,
        past_value=values.past,
        full_key=keys.full,
        full_value=values.full,
        mask=mask,
        is_causal=bool(is_causal),
        softmax_scale=softmax_scale,
        key_path=tuple(keys.path),
        value_path=tuple(values.path),
    )


def _refuse_shapes(attention: Node, query: Node, keys: CacheRead, values: CacheRead) -> str | None:
    queries, new_keys, new_values = shape_of(query), shape_of(keys.new), shape_of(values.new)
    if queries is None or new_keys is None or new_values is None:
        return "the graph does not know the shapes of query, key and value"
    if len(queries) != 4:
        return f"the query is {len(queries)}-D, expected 4-D [batch, heads, length, head_dim]"
    heads, kv_heads, value_heads = (static_int(shape[1]) for shape in (queries, new_keys, new_values))
    key_dim, value_dim = static_int(new_keys[3]), static_int(new_values[3])
    if heads is None or kv_heads is None or value_heads is None or key_dim is None or value_dim is None:
        return (
            "the numbers of heads or head_dim vary with the input: torch._dynamo.mark_static(past, [1, 3]) fixes them"
        )
    if kv_heads != value_heads:
        return f"keys have {kv_heads} heads and values {value_heads}"
    if key_dim != value_dim:
        return f"head_dim of keys is {key_dim} and of values {value_dim}"
    if static_int(queries[3]) != key_dim:
        return f"head_dim of the query is {queries[3]} and of keys {key_dim}"
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} kv heads"
    read_heads = static_int((shape_of(ATTENTION.operand(attention, "key")) or new_keys)[1])
    if read_heads != heads and read_heads != 1 and not ATTENTION.operand(attention, "enable_gqa", False):
        return f"attention gets {heads} query heads and {read_heads} kv heads without enable_gqa"
    if not same_size(queries[2], new_keys[2]) or not same_size(queries[2], new_values[2]):
        return f"cross attention: {queries[2]} queries and {new_keys[2]} new keys"
    if dtype_of(query) != dtype_of(keys.new) or dtype_of(keys.new) != dtype_of(values.new):
        return f"query, key and value are {dtype_of(query)}, {dtype_of(keys.new)} and {dtype_of(values.new)}"
    return None


def _refuse_arithmetic(attention: Node, is_causal: Any, *, has_past: bool) -> str | None:
    dropout = ATTENTION.operand(attention, "dropout_p", 0.0)
    if isinstance(dropout, Node) or dropout != 0:
        return f"dropout_p is {dropout}, not 0"
    if isinstance(is_causal, Node):
        return "is_causal is not known when the graph is compiled"
    if is_causal and has_past:
        return "is_causal with stored tokens: the first query would see only the first stored token; pass a mask"
    return None


def _refuse_mask(mask: Any, query: Node, key: Node) -> str | None:
    if mask is None:
        return None
    shape, queries, keys = shape_of(mask), shape_of(query), shape_of(key)
    if shape is None or queries is None or keys is None:
        return "the graph does not know the shape of the mask"
    if len(shape) not in (2, 4):
        return f"the mask is {len(shape)}-D, expected [batch or 1, heads or 1, q_len or 1, kv_len] or [q_len, kv_len]"
    expected = (queries[0], queries[1], queries[2], keys[2])[-len(shape) :]
    for axis, (size, wanted) in enumerate(zip(shape, expected, strict=True)):
        known, target = static_int(size), static_int(wanted)
        broadcasts = known == 1 and axis < len(shape) - 1
        if known is not None and target is not None and known != target and not broadcasts:
            return f"the mask's shape {list(shape)} does not broadcast to {list(expected)}"
        if known == 1 and target is None and axis == len(shape) - 1:
            return f"the mask's shape {list(shape)} has no column for each key"
    if dtype_of(mask) not in (torch.bool, dtype_of(query)):
        return f"the mask is {dtype_of(mask)}, expected torch.bool or {dtype_of(query)}"
    return None


def _softmax_scale(attention: Node, query: Node) -> float | str:
    """The scale as a number, or why it is none."""
    scale = ATTENTION.operand(attention, "scale")
    if scale is None:
        head_dim = static_int((shape_of(query) or (None,))[-1])
        return "head_dim is not known when the graph is compiled" if head_dim is None else 1 / math.sqrt(head_dim)
    scale = node_value(scale)
    if isinstance(scale, (int, float)) or (isinstance(scale, torch.SymFloat) and scale.node.has_hint()):
        # A symbolic number becomes a constant of the graph here, guarded by the tracer.
        return float(scale)
    return "the softmax scale is not a constant: set torch._dynamo.config.specialize_float=True while compiling"
