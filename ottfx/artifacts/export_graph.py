"""Capture one call of a model with `torch.export` and rewrite it into a program whose packed state is flat inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ottfx.artifacts.program_cache import CacheSite
from ottfx.attention_site import AttentionSite, Binding, Refusal
from ottfx.bind_site import bind_site
from ottfx.errors import MatchError
from ottfx.passes.graph_utils import graph_outputs, node_value
from ottfx.pipeline import RewriteResult, rewrite_graph
from ottfx.schemes.base import ROLES, Role, SchemeConfig, TensorSpec

Layers = Sequence[tuple[Tensor, Tensor]]
ModelCall = Callable[[nn.Module, Tensor, Tensor, Layers], tuple[Tensor, Layers]]
"""`call(model, input_ids, attention_mask, past) -> (logits, layers)`: how a program calls the model.

`input_ids` int64 [batch, q_len]; `attention_mask` int64 [batch, past + q_len], 1 where a token is real; `past` the keys
and values of each layer, [batch, num_kv_heads, past, head_dim], or empty for a fresh prompt; `layers` the same with the
new tokens behind; `logits` [batch, q_len or 1, vocabulary].
"""

LEADING_INPUTS = ("input_ids", "attention_mask", "past", "lengths")
"""What every program takes before its state. `past` uint8 [past_length, 0] only has a size."""

# Sizes of the example. A tracer takes an equation that holds for it for a law, so neither a size nor its number of
# groups or pages may be 0, 1 or another's: programs run with such sizes all the same (tests/artifacts/test_export.py).
_BATCH, _PAST, _PAGES = 3, 300, 5


@dataclass(frozen=True, kw_only=True)
class ProgramKind:
    """One of the calls that a generation consists of."""

    name: str
    q_len: int
    """New tokens in the example; any number of at least 2 afterwards, unless it is 1."""
    has_past: bool


KINDS = (
    ProgramKind(name="prefill", q_len=389, has_past=False),
    ProgramKind(name="extend", q_len=389, has_past=True),
    ProgramKind(name="decode", q_len=1, has_past=True),
)
"""A fresh prompt of two tokens or more, such a chunk behind stored tokens, and one token behind any number of them."""


@dataclass(frozen=True, kw_only=True)
class FlatProgram:
    """A rewritten program: `(*LEADING_INPUTS, *state) -> (logits [batch, 1, vocabulary],)`, which mutates its state."""

    kind: ProgramKind
    gm: GraphModule
    example: tuple[Tensor, ...]
    """Fake tensors, one for each input; their sizes are symbols where they may vary."""
    sites: tuple[CacheSite, ...]
    """One for each layer, in the order of its rows in `lengths` and of its tensors among the inputs."""

    @property
    def logits(self) -> Tensor:
        """A fake tensor like the program's result."""
        result: Tensor = node_value(graph_outputs(self.gm.graph)[0])
        return result


class _Entry(nn.Module):
    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Layers) -> list[Tensor]:
        logits, layers = self._call(self.model, input_ids, attention_mask, past)
        return [logits[:, -1:], *(tensor for layer in layers for tensor in layer)]


def flat_program(model: nn.Module, call: ModelCall, kind: ProgramKind, config: SchemeConfig) -> FlatProgram:
    """Capture one kind of call and rewrite it.

    Args:
        model: in eval mode, on one device.
        call: how it is called.
        kind: which call.
        config: the scheme's options.

    Raises:
        MatchError: an attention with a cache could not be rewritten, or a returned tensor belongs to none.
    """
    with torch.no_grad():
        door = _ExportDoor(_capture(model, call, kind).module(check_guards=False), kind, config)
        num_outputs = len(graph_outputs(door.gm.graph))
        result = rewrite_graph(door.gm, door.bind, door)
        _check(result, kind, num_outputs)
        return FlatProgram(
            kind=kind,
            example=door.finish(),
            gm=GraphModule(door.gm, door.gm.graph),
            sites=tuple(_cache_site(binding) for binding in result.bindings),
        )


def _capture(model: nn.Module, call: ModelCall, kind: ProgramKind) -> ExportedProgram:
    device = next(model.parameters()).device

    def tokens(length: int) -> Tensor:
        return torch.ones(_BATCH, length, dtype=torch.int64, device=device)

    past: list[tuple[Tensor, Tensor]] = []
    if kind.has_past:
        _, layers = call(model, tokens(2), tokens(2), [])
        past = [(_lengthen(key), _lengthen(value)) for key, value in layers]
    varies = Dim.DYNAMIC
    sizes = (
        {0: varies} if kind.q_len == 1 else {0: varies, 1: varies},
        {0: varies, 1: varies},
        [({0: varies, 2: varies},) * 2 for _ in past],
    )
    example = (tokens(kind.q_len), tokens(kind.q_len + (_PAST if past else 0)), past)
    return torch.export.export(_Entry(model, call), example, dynamic_shapes=sizes, strict=False)


def _lengthen(stored: Tensor) -> Tensor:
    return stored.new_zeros(stored.shape[0], stored.shape[1], _PAST, stored.shape[3])


def _check(result: RewriteResult, kind: ProgramKind, num_outputs: int) -> None:
    if result.refusals:
        lines = "\n".join(f"  {refusal.name}: {refusal.reason}" for refusal in result.refusals)
        raise MatchError(
            f"ottfx.export: every attention's cache must be stored by a scheme. In the {kind.name} program "
            f"{len(result.refusals)} of {len(result.refusals) + len(result.bindings)} were left alone:\n{lines}"
        )
    order = [(binding.site.index, role) for binding in result.bindings for role in ROLES]
    returned = [(site.index, role) for _, (site, role) in sorted(result.cache_outputs.items())]
    if not order or returned != order or len(order) != num_outputs - 1:
        raise MatchError(
            f"ottfx.export: the {kind.name} program must return keys and values of each of its layers, in order, and "
            f"each must belong to one attention. Got {num_outputs - 1} returned tensors, {len(returned)} of them "
            f"caches of {len(result.bindings)} attentions. Check `call`."
        )


def _cache_site(binding: Binding) -> CacheSite:
    shape = binding.shape
    return CacheSite(
        name=binding.site.name,
        config=binding.config,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )


class _ExportDoor:
    """Adapter between the passes and one exported program: adds inputs as fake tensors of the program's own symbols."""

    def __init__(self, gm: GraphModule, kind: ProgramKind, config: SchemeConfig) -> None:
        self.gm = gm
        self._kind = kind
        self._config = config
        ids, mask, *self._past = gm.graph.find_nodes(op="placeholder")
        self._inputs = {"input_ids": ids, "attention_mask": mask}
        self._last = self._past[-1] if self._past else mask
        example = ids.meta["val"]
        self._device, self._fake_mode = example.device, example.fake_mode
        shape_env = self._fake_mode.shape_env
        source = ConstantSource("pages")
        symbol = shape_env.create_symbol(_PAGES, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        self._pages = shape_env.create_symintnode(symbol, hint=_PAGES, source=source)
        self._rows = 0
        self._past_length: Node | None = None

    def bind(self, site: AttentionSite) -> Binding | Refusal:
        """Give each site the scheme of its layer."""
        bound = bind_site(site, self._config.at_layer(site.index), row=self._rows, pages=self._pages)
        self._rows += isinstance(bound, Binding)
        return bound

    def state(self, site: AttentionSite, role: Role, name: str, spec: TensorSpec) -> Node:
        """Add an input for one state tensor."""
        return self._add(f"{role}_{site.index}_{name}", spec.shape, spec.dtype)

    def lengths(self) -> Node:
        """The input with (past_length, key_packed, value_packed) of every site."""
        return self._inputs.get("lengths") or self._add("lengths", (self._rows, 3), torch.int64)

    def past_length(self, site: AttentionSite) -> Node:
        """The size of the input `past`."""
        if self._past_length is None:
            size = node_value(site.past_key).shape[2]
            past = self._add("past", (size, 0), torch.uint8)
            with self.gm.graph.inserting_after(past):
                self._past_length = self.gm.graph.call_function(torch.ops.aten.sym_size.int, (past, 0))
            self._past_length.meta["val"] = size
            self._last = self._past_length
        return self._past_length

    def finish(self) -> tuple[Tensor, ...]:
        """Bring the inputs into their order, drop the dense past, and return an example of each input."""
        graph = self.gm.graph
        for node in self._past:
            graph.erase_node(node)
        if "past" not in self._inputs:
            self._add("past", (0, 0), torch.uint8)
        names = [*LEADING_INPUTS, *(name for name in self._inputs if name not in LEADING_INPUTS)]
        first_call = next(node for node in graph.nodes if node.op != "placeholder")
        for name in names:
            first_call.prepend(self._inputs[name])
        graph.lint()
        self.gm.recompile()
        return tuple(self._inputs[name].meta["val"] for name in names)

    def _add(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> Node:
        with self.gm.graph.inserting_after(self._last):
            node = self.gm.graph.placeholder(name)
        with self._fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self._device)
        self._last = self._inputs[name] = node
        return node
