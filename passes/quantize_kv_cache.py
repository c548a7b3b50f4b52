"""Replace cache and attention of each bound site by the two ops of its scheme."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from ottfx.attention_site import AttentionSite, Binding
from ottfx.passes.graph_utils import graph_outputs, node_value, same_size, shape_of, static_int
from ottfx.passes.spellings import EXPAND, METADATA_CHECK, SIZE, is_guard_call, is_no_op, is_size_query
from ottfx.schemes.base import ROLES, Role, TensorSpec


class GraphInputs(Protocol):
    """How a door adds inputs to a graph. Every node that it returns is a placeholder, or stands right behind them."""

    def state(self, site: AttentionSite, role: Role, name: str, spec: TensorSpec) -> Node:
        """One state tensor of one half."""

    def lengths(self) -> Node:
        """The lengths int64 [num_sites, 3] of this call; the same node each time."""

    def past_length(self, site: AttentionSite) -> Node | int:
        """Tokens stored before this call, for a site of kind `continue`."""


@dataclass
class CacheRewrite:
    """What `quantize_kv_cache` did to a graph."""

    cache_outputs: dict[int, tuple[AttentionSite, Role]] = field(default_factory=dict)
    """Index among the outputs before the rewrite -> the cache that was returned there. Those outputs are gone."""
    orphans: list[Node] = field(default_factory=list)
    """Nodes that may have lost their last reader."""


def quantize_kv_cache(gm: GraphModule, bindings: Sequence[Binding], inputs: GraphInputs) -> CacheRewrite:
    """Put `append_op` and `attend_op` where each site was, and stop returning its dense cache.

    A site of kind `continue`: `attend_op`, then `append_op`, in place of the attention. Kind `prompt`: the attention
    stays, reads the new keys and values directly, and `append_op` follows. Sizes of the stored tokens that the graph
    asks for come from `inputs` afterwards. If the graph had a pytree signature it has a flat one now.

    Args:
        gm: a graph that the caller owns.
        bindings: the sites to rewrite, matched in this graph.
        inputs: the door's adapter.
    """
    rewrite = CacheRewrite()
    if not bindings:
        return rewrite
    for binding in bindings:
        before = binding.site.attention
        after = _rewrite_site(binding, inputs, rewrite)
        for other in bindings:
            _follow(other.site, before, after)
    _drop_cache_outputs(gm, bindings, rewrite)
    for node in gm.graph.nodes:
        if is_guard_call(node):
            gm.graph.erase_node(node)
    gm.graph.set_codegen(CodeGen())
    gm.graph.lint()
    gm.recompile()
    return rewrite


def _follow(site: AttentionSite, before: Node, after: Node) -> None:
    """Let a site read the node that replaced another site's attention."""
    for name in ("query", "key", "value", "full_key", "full_value", "mask"):
        if getattr(site, name) is before:
            setattr(site, name, after)


def _rewrite_site(binding: Binding, inputs: GraphInputs, rewrite: CacheRewrite) -> Node:
    """Rewrite one site; return the node that gives its attention's result now."""
    site, scheme, config = binding.site, binding.scheme, binding.config
    graph, attention = site.attention.graph, site.attention
    state = [
        inputs.state(site, role, name, spec)
        for role in ROLES
        for name, spec in scheme.state_spec(config, role, binding.shape).items()
    ]
    constants = scheme.constants(config)
    past_length = 0 if site.past_key is None else inputs.past_length(site)
    common = (inputs.lengths(), binding.row)
    rewrite.orphans += [*attention.all_input_nodes, *site.key_path, *site.value_path, site.full_key, site.full_value]
    rewrite.orphans += [past for past in (site.past_key, site.past_value) if past is not None]

    with graph.inserting_before(attention):
        mask = _four_axes(_before_expansion(site.mask))
    if site.kind == "continue":
        with graph.inserting_before(attention):
            attend = graph.call_function(
                scheme.attend_op,
                (site.query, site.key, site.value, mask, *common, past_length, site.softmax_scale, *state, *constants),
            )
        attend.meta = dict(attention.meta)
        attention.replace_all_uses_with(attend)
        graph.erase_node(attention)
        behind = attend
    else:
        for path, full, new in (
            (site.key_path, site.full_key, site.key),
            (site.value_path, site.full_value, site.value),
        ):
            reader = path[-1] if path else attention
            if full is not new:
                reader.replace_input_with(full, new)
        behind = attention
    with graph.inserting_after(behind):
        append = graph.call_function(scheme.append_op, (site.key, site.value, mask, *common, *state, *constants))
    append.meta = {k: v for k, v in behind.meta.items() if k not in ("example_value", "val", "tensor_meta")}

    for role_state, past, full, new, path in (
        (state[0], site.past_key, site.full_key, site.key, site.key_path),
        (state[-1], site.past_value, site.full_value, site.value, site.value_path),
    ):
        if past is not None:
            _answer_queries(past, role_state, past_length, None)
        returned = [user for user in full.users if is_no_op(user) and user not in path]
        for node in (full, *path, *returned) if full is not new else ():
            _answer_queries(node, role_state, past_length, new)
    return behind


def _before_expansion(mask: Node | None) -> Node | None:
    """The mask with axes of size 1 where the model repeats them for each sequence, head or query: the ops do that."""
    while mask is not None and mask in EXPAND:
        source = mask.args[0]
        before, after = shape_of(source) or (), shape_of(mask) or ()
        if not isinstance(source, Node) or len(before) != 4 or not same_size(before[-1], after[-1]):
            break
        mask = source
    return mask


def _four_axes(mask: Node | None) -> Node | None:
    """The mask as [1, 1, q_len, kv_len] if it was [q_len, kv_len]."""
    if mask is None or len(shape_of(mask) or ()) == 4:
        return mask
    exported = "val" in mask.meta and "example_value" not in mask.meta
    unsqueeze = torch.ops.aten.unsqueeze.default if exported else torch.unsqueeze
    for _ in range(2):
        wide = mask.graph.call_function(unsqueeze, (mask, 0))
        value = node_value(mask).unsqueeze(0)
        wide.meta = {**mask.meta, "val" if exported else "example_value": value}
        mask = wide
    return mask


def _answer_queries(tensor: Node, state: Node, past_length: Node | int, new: Node | None) -> None:
    """Replace size queries on a dense cache tensor that is about to vanish.

    Args:
        tensor: past tokens, past and new tokens together, or those with repeated heads.
        state: a state tensor of the same cache; its axis 0 is the batch.
        past_length: tokens stored before this call.
        new: the new tokens if `tensor` holds them too.
    """
    graph = tensor.graph
    for query in list(tensor.users):
        if query in METADATA_CHECK:
            graph.erase_node(query)
        if query in METADATA_CHECK or not is_size_query(query):
            continue
        if not query.users:
            graph.erase_node(query)
            continue
        rank = len(shape_of(tensor) or ())
        dim, known = SIZE.operand(query, "dim") % rank, static_int(query)
        answer: Any
        if known is None and dim not in (0, rank - 2):
            raise AssertionError(f"ottfx: size {dim} of {tensor.name} is not static, although its site was matched")
        with graph.inserting_before(query):
            if known is not None:
                answer = known
            elif dim == 0:
                answer = graph.call_function(torch.ops.aten.sym_size.int, (state, 0))
            else:
                answer = past_length
                if new is not None:
                    length = graph.call_function(torch.ops.aten.sym_size.int, (new, 2))
                    _copy_number(length, new, 2)
                    answer = graph.call_function(operator.add, (past_length, length)) if past_length != 0 else length
        if isinstance(answer, Node) and answer is not past_length and not answer.meta:
            answer.meta = dict(query.meta)
        _replace_everywhere(query, answer)
        graph.erase_node(query)


def _copy_number(node: Node, tensor: Node, dim: int) -> None:
    key = "example_value" if "example_value" in tensor.meta else "val"
    node.meta[key] = node_value(tensor).shape[dim]


def _replace_everywhere(old: Node, new: Any) -> None:
    """Like `replace_all_uses_with`, which takes only nodes."""
    if isinstance(new, Node):
        old.replace_all_uses_with(new)
        return
    for user in list(old.users):
        user.args = torch.fx.node.map_arg(user.args, lambda node: new if node is old else node)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda node: new if node is old else node)


def _drop_cache_outputs(gm: GraphModule, bindings: Sequence[Binding], rewrite: CacheRewrite) -> None:
    """Return everything but the rewritten caches, and note where they were."""
    owner: dict[Node, tuple[AttentionSite, Role]] = {}
    for binding in bindings:
        owner[binding.site.full_key] = (binding.site, "key")
        owner[binding.site.full_value] = (binding.site, "value")
    kept = []
    for index, returned in enumerate(graph_outputs(gm.graph)):
        source = returned
        while isinstance(source, Node) and source not in owner and is_no_op(source):
            source = source.args[0]
        if isinstance(source, Node) and source in owner:
            rewrite.cache_outputs[index] = owner[source]
            rewrite.orphans.append(returned)
        else:
            kept.append(returned)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = (tuple(kept),)
