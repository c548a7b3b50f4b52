"""Compile one Dynamo graph: rewrite its attention sites, lower what is left, put a `CacheCall` around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node

from ottfx.attention_site import AttentionSite, Binding, Refusal
from ottfx.bind_site import bind_site
from ottfx.cache_call import LENGTHS_WIDTH, CacheCall, SiteCall, StateInput
from ottfx.errors import CacheError
from ottfx.inductor_options import REWRITTEN_GRAPH, workarounds
from ottfx.kernel_writes import kernel_writes_remembered
from ottfx.kv_tensor import KVTensor
from ottfx.ops import outlined, token_validity
from ottfx.passes.graph_utils import graph_outputs
from ottfx.passes.share_validity import share_validity
from ottfx.pipeline import RewriteResult, rewrite_graph
from ottfx.record_step import recorded_step
from ottfx.schemes.affine import AffineScheme
from ottfx.schemes.base import Role, TensorSpec
from ottfx.settings import Settings
from ottfx.size_reader import SizeReader
from ottfx.source_hash import source_hash

log = logging.getLogger("ottfx")


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """Return a callable with `gm`'s arguments and results whose caches are `KVTensor`s.

    A graph in which nothing was rewritten, or that must keep gradients, is lowered as it is.

    Raises:
        CacheError: gradients are needed through a graph that reads a quantized cache.
    """
    if _needs_grad(example_inputs):
        if any(isinstance(x, KVTensor) for x in example_inputs):
            raise CacheError(
                "ottfx: a quantized cache has no gradient, and this forward pass needs one. "
                "Run it under torch.no_grad(), or start it without past_key_values."
            )
        log.debug("graph needs gradients: lowered without a quantized cache")
        return _lower(gm, example_inputs, settings)
    if not gm.graph.find_nodes(op="placeholder"):
        return _lower(gm, example_inputs, settings)
    # Dynamo reads its own graph again after the backend returns: never edit that one.
    door = _DynamoDoor(_copy(gm), example_inputs, settings)
    result = rewrite_graph(door.gm, door.bind, door)
    if settings.on_graph is not None:
        settings.on_graph(result)
    _tell_refusals(result, settings)
    if not result.bindings:
        return _lower(gm, example_inputs, settings)
    return door.finish(result)


def _tell_refusals(result: RewriteResult, settings: Settings) -> None:
    """Log each reason for leaving attentions alone, with their number and names, once for each compiled model."""
    by_reason: dict[str, list[str]] = {}
    for refusal in result.refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.name)
    sites = len(result.bindings) + len(result.refusals)
    for reason, names in by_reason.items():
        if not settings.is_news(reason):
            continue
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        log.warning(
            "ottfx: %d of %d attentions keep their full-precision cache (%s): %s. ottfx.explain lists them all.",
            len(names), sites, shown, reason,
        )  # fmt: skip


def _needs_grad(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)


def _copy(gm: GraphModule) -> GraphModule:
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    # Without Dynamo's metadata AOTAutograd accepts inputs that Dynamo does not know.
    return GraphModule(gm, graph)


def _lower(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, **inductor_options: Any
) -> Callable[..., Any]:
    if settings.lower == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    options = inductor_options | workarounds(example_inputs) | settings.inductor_options
    with kernel_writes_remembered():
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=options or None)
    return compiled


class _DynamoDoor:
    """Adapter between the passes and one graph of Dynamo's: adds inputs, remembers them, builds the call."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], settings: Settings) -> None:
        self.gm = gm
        self._settings = settings
        self._placeholders = gm.graph.find_nodes(op="placeholder")
        # Dynamo hands over real sizes for some inputs; its graph has the symbolic ones.
        self._examples = {
            node: node.meta.get("example_value", x) for node, x in zip(self._placeholders, example_inputs, strict=True)
        }
        self._sizes = SizeReader(list(self._examples.values()))
        self._num_outputs = len(graph_outputs(gm.graph))
        self._last_placeholder = self._placeholders[-1]
        self._added: list[tuple[Node, StateInput, Any]] = []
        self._lengths_node: Node | None = None
        self._rows: dict[int, int] = {}
        self._pages: Any = None
        self._device: torch.device | None = None
        context = TracingContext.try_get()
        self._fake_mode = context.fake_mode if context is not None else None

    # -- what the passes ask for -----------------------------------------------------------------------------------

    def bind(self, site: AttentionSite) -> Binding | Refusal:
        """Choose scheme and config for a site: those of the cache that it continues, otherwise the door's own."""
        config = self._settings.config.at_layer(site.index)
        if site.past_key is not None:
            stored = [getattr(self._examples.get(past), "config", None) for past in (site.past_key, site.past_value)]
            if stored[0] != stored[1]:
                return Refusal(
                    index=site.index, name=site.name, reason=f"keys and values are stored differently: {stored}"
                )
            config = stored[0] or config
        bound = bind_site(site, config, row=len(self._rows), pages=self._symbolic_pages())
        if isinstance(bound, Refusal):
            return bound
        shape = bound.shape
        reason = self._refuse_device(shape.device)
        if reason is not None:
            return Refusal(index=site.index, name=site.name, reason=reason)
        if not self._rows and isinstance(shape.pages, torch.SymInt):
            # Inductor wants to see the symbol by itself; the state tensors have sizes that are multiples of it.
            self._add("cache_pages", StateInput(kind="pages"), shape.pages)
        self._rows[site.index] = bound.row
        return bound

    def state(self, site: AttentionSite, role: Role, name: str, spec: TensorSpec) -> Node:
        """Add an input for one state tensor."""
        row = self._rows[site.index]
        with self._fake_mode or nullcontext():
            example = torch.empty(spec.shape, dtype=spec.dtype, device=_value(site.key).device)
        return self._add(f"{name}_{row}", StateInput(kind="state", row=row, role=role, name=name), example)

    def lengths(self) -> Node:
        """What an input holds: (past_length, key_packed, value_packed) of every site."""
        if self._lengths_node is None:
            with self._fake_mode or nullcontext():
                # One row for each site; sites are bound before any of them is rewritten.
                example = torch.empty((len(self._rows), LENGTHS_WIDTH), dtype=torch.int64, device=self._device)
                lengths = example.narrow(1, 0, 3)
            stored = self._add("cache_lengths", StateInput(kind="lengths"), example)
            with self.gm.graph.inserting_after(stored):
                self._lengths_node = self.gm.graph.call_function(torch.narrow, (stored, 1, 0, 3))
            self._lengths_node.meta["example_value"] = lengths
        return self._lengths_node

    def past_length(self, site: AttentionSite) -> Node | int:
        """Tokens stored before this call: a constant, an input that Dynamo made, or an added one."""
        assert site.past_key is not None
        size = self._examples[site.past_key].shape[2]
        if not isinstance(size, torch.SymInt):
            return int(size)
        for node, example in self._examples.items():
            if isinstance(example, torch.SymInt) and example.node.expr == size.node.expr:
                return node
        row = self._rows[site.index]
        return self._add(f"past_length_{row}", StateInput(kind="past_length", row=row), size)

    # -- the call ----------------------------------------------------------------------------------------------------

    def finish(self, result: RewriteResult) -> CacheCall:
        """Drop inputs that nothing reads any more, lower the graph, and wrap it."""
        index = {node: i for i, node in enumerate(self._placeholders)}
        added = [(node, source) for node, source, _ in self._added]
        step = recorded_step(result, added, self._settings)
        affine = [binding for binding in result.bindings if isinstance(binding.scheme, AffineScheme)]
        share_validity(self.gm, affine, token_validity)
        kept = [node for node in self._placeholders if node.users]
        for node in self._placeholders:
            if not node.users:
                self.gm.graph.erase_node(node)
        _name_after_sources(result)
        if not self._settings.inline_cpu_ops:
            _outline_ops(result, "cpu")
        if self._settings.records_steps:
            _outline_ops(result, "cuda")
        self.gm.graph.lint()
        self.gm.recompile()
        examples = [self._examples[node] if step is None else step.example(node) for node in kept]
        examples += [example for _, _, example in self._added]
        inner = _lower(self.gm, examples, self._settings, **REWRITTEN_GRAPH)
        if step is not None:
            inner = step.wrap(inner, kept, added, result.bindings[0].shape.device)
        return CacheCall(
            inner,
            [self._site_call(binding, index) for binding in result.bindings],
            [index[node] for node in kept],
            [source for _, source in added],
            self._num_outputs,
            {i: (self._rows[site.index], role) for i, (site, role) in result.cache_outputs.items()},
            self._settings.launch_ahead,
        )

    def _site_call(self, binding: Binding, index: dict[Node, int]) -> SiteCall:
        site, shape = binding.site, binding.shape
        past = None
        if site.past_key is not None and site.past_value is not None:
            past = (index[site.past_key], index[site.past_value])
        return SiteCall(
            name=site.name,
            scheme=binding.scheme,
            config=binding.config,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
            past=past,
            batch_size=self._sizes.reader(shape.batch_size),
            q_len=self._sizes.reader(_value(site.key).shape[2]),
        )

    def _add(self, name: str, source: StateInput, example: Any) -> Node:
        with self.gm.graph.inserting_after(self._last_placeholder):
            node = self.gm.graph.placeholder(name)
        node.meta["example_value"] = example
        self._last_placeholder = node
        self._added.append((node, source, example))
        return node

    def _refuse_device(self, device: torch.device) -> str | None:
        """Say why a cache on `device` cannot be rewritten here: the lengths of a call live on one device."""
        self._device = self._device or device
        if device != self._device:
            return f"it is on {device}, and the first attention of this graph on {self._device}: one device a graph"
        return None

    def _symbolic_pages(self) -> Any:
        """The one capacity of a call, a size that no guard can be made on: growth must not recompile."""
        if self._pages is None:
            shape_env = self._fake_mode.shape_env if self._fake_mode is not None else None
            if shape_env is None:
                return 2
            with shape_env.ignore_fresh_unbacked_symbols():
                self._pages = shape_env.create_unbacked_symint()
            torch._check(self._pages >= 2)
        return self._pages


def _scheme_nodes(result: RewriteResult, device_type: str | None = None) -> list[Node]:
    """The append and attend calls of a rewritten graph, in order; of one device only, if it is named."""
    bindings = [b for b in result.bindings if device_type in (None, b.shape.device.type)]
    ops = {op for binding in bindings for op in (binding.scheme.append_op, binding.scheme.attend_op)}
    return [node for node in result.gm.graph.nodes if node.op == "call_function" and node.target in ops]


def _name_after_sources(result: RewriteResult) -> None:
    """Put the hash of our sources into the graph: caches of compiled graphs see the name of an op, not its body."""
    first = _scheme_nodes(result)[0]
    first._rename(f"{first.name}_{source_hash()}")


def _outline_ops(result: RewriteResult, device_type: str) -> None:
    for node in _scheme_nodes(result, device_type):
        node.target = outlined(node.target)


def _value(node: Node) -> Any:
    return node.meta["example_value"]
