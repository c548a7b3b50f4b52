"""Capture graphs, rewrite them with a scheme, and run both versions on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lossless_scheme import LOSSLESS, LosslessConfig
from tiny_models import random_tokens
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from transformers import DynamicCache, PreTrainedModel

from ottfx.attention_site import AttentionSite, Binding, Refusal
from ottfx.passes.graph_utils import format_graph, node_value
from ottfx.pipeline import RewriteResult, rewrite_graph
from ottfx.schemes.base import CacheShape, Role, Scheme, SchemeConfig, TensorSpec


@dataclass
class Captured:
    """A graph and the flat inputs of one call of it."""

    gm: GraphModule
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class Recorder:
    """A backend that keeps every graph and what it was called with."""

    def __init__(self) -> None:
        self.graphs: list[Captured] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        captured = Captured(gm)
        self.graphs.append(captured)

        def call(*inputs: Any) -> Any:
            if not captured.inputs:
                captured.inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
                captured.outputs = list(gm(*inputs))
                return captured.outputs
            return gm(*inputs)

        return call


def capture(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    """The one Dynamo graph of one call, traced without gradients; batch and lengths are symbolic, heads are not."""
    for argument in args:
        if isinstance(argument, Tensor) and argument.dim() == 4:
            torch._dynamo.mark_static(argument, [1, 3])
    recorder = Recorder()
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        torch.compile(call, backend=recorder, dynamic=True, fullgraph=True)(*args, **kwargs)
    (captured,) = recorder.graphs
    return captured


def prompt_and_step(model: PreTrainedModel, padded: bool) -> tuple[Captured, Captured]:
    """The graphs of a prompt of 7 tokens and of one more token, batch 3, with what they were called with."""
    recorder = Recorder()
    tokens, cache = random_tokens(3, 8), DynamicCache(config=model.config)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :2] = 0
    masks = ({"attention_mask": mask[:, :7]}, {"attention_mask": mask}) if padded else ({}, {})
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        call = torch.compile(model, backend=recorder, dynamic=True, fullgraph=True)
        call(input_ids=tokens[:, :7], past_key_values=cache, use_cache=True, **masks[0])
        call(input_ids=tokens[:, 7:], past_key_values=cache, use_cache=True, **masks[1])
    prompt, step = recorder.graphs
    return prompt, step


def copy_graph(gm: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


class Door:
    """Adds inputs to a graph, and makes the tensors that belong there from the dense caches of a captured call."""

    def __init__(
        self, captured: Captured, scheme: Scheme = LOSSLESS, config: SchemeConfig | None = None, pages: int = 1
    ) -> None:
        self.gm = copy_graph(captured.gm)
        self.scheme, self.config, self.pages = scheme, config or LosslessConfig(), pages
        self.placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.inputs = dict(zip(self.placeholders, captured.inputs, strict=True))
        self.added: dict[Node, Any] = {}
        self.rows: list[AttentionSite] = []
        self.state_tensors: dict[tuple[int, Role], dict[str, Tensor]] = {}

    def bind(self, site: AttentionSite) -> Binding | Refusal:
        self.rows.append(site)
        key = node_value(site.key)
        shape = CacheShape(
            batch_size=self._batch_size(site),
            num_kv_heads=int(key.shape[1]),
            head_dim=int(key.shape[3]),
            pages=self.pages,
            dtype=key.dtype,
            device=torch.device("cpu"),
        )
        return Binding(site=site, scheme=self.scheme, config=self.config, row=len(self.rows) - 1, shape=shape)

    def state(self, site: AttentionSite, role: Role, name: str, spec: TensorSpec) -> Node:
        tensor = torch.full(spec.shape, spec.fill, dtype=spec.dtype)
        self.state_tensors.setdefault((site.index, role), {})[name] = tensor
        return self._add(f"{name}_{site.index}", tensor)

    def lengths(self) -> Node:
        known = [node for node in self.added if node.name == "lengths"]
        lengths = torch.zeros(len(self.rows), 3, dtype=torch.int64)
        lengths[:, 0] = torch.tensor([self.past(site) for site in self.rows])
        return known[0] if known else self._add("lengths", lengths)

    def past_length(self, site: AttentionSite) -> Node:
        return self._add(f"past_length_{site.index}", self.past(site))

    def past(self, site: AttentionSite) -> int:
        return 0 if site.past_key is None else self.inputs[site.past_key].shape[2]

    def _batch_size(self, site: AttentionSite) -> int:
        if site.past_key is not None:
            return self.inputs[site.past_key].shape[0]
        size = node_value(site.key).shape[0]
        if isinstance(size, int):
            return size
        for node, value in self.inputs.items():
            for symbol, number in zip(getattr(node_value(node), "shape", ()), getattr(value, "shape", ()), strict=True):
                if str(symbol) == str(size):
                    return number
        raise AssertionError(f"batch size {size} is no input size")

    def _add(self, name: str, value: Any) -> Node:
        with self.gm.graph.inserting_after([*self.placeholders, *self.added][-1]):
            node = self.gm.graph.placeholder(name)
        self.added[node] = value
        return node


def rewrite_and_compare(captured: Captured, **door_options: Any) -> RewriteResult:
    """Rewrite a copy of a graph, run it with poisoned dense caches, and check all outputs and the stored tokens."""
    door = Door(captured, **door_options)
    result = rewrite_graph(door.gm, door.bind, door)
    pasts = {past for site in door.rows for past in (site.past_key, site.past_value) if past is not None}
    if not result.bindings:
        assert format_graph(result.gm.graph) == format_graph(copy_graph(captured.gm).graph)
        return result
    assert pasts <= set(result.unread_placeholders)
    for past in pasts:
        for role, node in (("key", "past_key"), ("value", "past_value")):
            for site in door.rows:
                if getattr(site, node) is past:
                    tokens = door.state_tensors[site.index, role]
                    _store(door, site, role, tokens, door.inputs[past])
    poison = {past: torch.full_like(door.inputs[past], torch.nan) for past in pasts}
    arguments = [poison.get(node, value) for node, value in door.inputs.items()] + list(door.added.values())
    with torch.no_grad():
        returned = result.gm(*arguments)
    expected = [out for index, out in enumerate(captured.outputs) if index not in result.cache_outputs]
    assert len(returned) == len(expected)
    for got, want in zip(returned, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    for index, (site, role) in result.cache_outputs.items():
        want = captured.outputs[index]
        got = door.scheme.read(door.config, role, door.state_tensors[site.index, role], 0, want.shape[2])
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert {role for _, role in result.cache_outputs.values()} == {"key", "value"}
    return result


def _store(door: Door, site: AttentionSite, role: str, state: dict[str, Tensor], past: Tensor) -> None:
    """Fill one half's state with tokens, through the dense storage that lossless schemes have."""
    (tokens,) = (tensor for tensor in state.values() if tensor.dim() == 4)
    tokens[:, :, : past.shape[2]] = past


def count(gm: GraphModule, *targets: Any) -> int:
    """Nodes of a graph that call one of the targets."""
    return sum(node.op != "placeholder" and node.target in targets for node in gm.graph.nodes)
