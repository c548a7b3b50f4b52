"""Exported ATen programs: the same passes, with `val` metadata and a cache that is rebuilt from flat inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lossless_scheme import LOSSLESS
from plain_decoder import plain_decoder
from rewritten import Captured, Door, count, rewrite_and_compare
from tiny_models import random_tokens, tiny_model
from torch.utils._pytree import tree_flatten
from transformers import DynamicCache
from transformers.integrations.executorch import register_dynamic_cache_export_support

from ottfx.passes.canonicalize_attention import canonicalize_attention
from ottfx.passes.graph_utils import format_graph
from ottfx.passes.spellings import ATTENTION, CAT
from ottfx.pipeline import rewrite_graph

DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.fixture(scope="module")
def cache_is_a_pytree() -> None:
    register_dynamic_cache_export_support()


def captured_program(program: torch.export.ExportedProgram, args: tuple, kwargs: dict[str, Any]) -> Captured:
    module = program.module()
    with torch.no_grad():
        outputs = tree_flatten(module(*args, **kwargs))[0]
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    return Captured(torch.fx.GraphModule(module, module.graph), tree_flatten((args, kwargs))[0], outputs)


def exported_llama(q_len: int, past: int, padded: bool) -> Captured:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    tokens = random_tokens(3, past + q_len)
    kwargs: dict[str, Any] = {}
    if past:
        with torch.no_grad():
            model(input_ids=tokens[:, :past], past_key_values=cache)
    dynamic: dict[str, Any] = {"input_ids": {0: DYNAMIC, 1: DYNAMIC if q_len > 1 else None}}
    kwargs["input_ids"] = tokens[:, past:]
    if padded:
        kwargs["attention_mask"] = torch.ones(3, past + q_len, dtype=torch.long)
        kwargs["attention_mask"][0, :2] = 0
        dynamic["attention_mask"] = {0: DYNAMIC, 1: DYNAMIC}
    if past:
        kwargs["past_key_values"] = cache
        dynamic["past_key_values"] = [[{0: DYNAMIC, 2: DYNAMIC}] * 2, [{0: DYNAMIC, 2: DYNAMIC}] * 2]
    kwargs["use_cache"] = True
    dynamic["use_cache"] = None
    program = torch.export.export(model, (), kwargs, dynamic_shapes=dynamic, strict=False)
    return captured_program(program, (), kwargs)


@pytest.mark.parametrize(("q_len", "past", "padded"), [(1, 7, True), (1, 7, False), (3, 7, True), (7, 0, True)])
def test_llama(cache_is_a_pytree, q_len, past, padded):
    captured = exported_llama(q_len, past, padded)
    result = rewrite_and_compare(captured)
    assert result.refusals == []
    assert [binding.site.name for binding in result.bindings] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert count(result.gm, LOSSLESS.append_op) == 2
    assert count(result.gm, LOSSLESS.attend_op) == (2 if past else 0)
    assert sum(node in ATTENTION for node in result.gm.graph.nodes) == (0 if past else 2)
    cats = [node for node in result.gm.graph.nodes if node in CAT and CAT.operand(node, "dim") != -1]
    assert cats == []


def test_same_program_for_other_sizes(cache_is_a_pytree):
    captured = exported_llama(1, 7, padded=True)
    model, tokens = tiny_model("llama"), random_tokens(5, 12)
    cache, mask = DynamicCache(config=model.config), torch.ones(5, 12, dtype=torch.long)
    mask[2, :4] = 0
    with torch.no_grad():
        model(input_ids=tokens[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
        kwargs = {"input_ids": tokens[:, 11:], "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        captured.inputs = tree_flatten(kwargs)[0]
        captured.outputs = list(captured.gm(*captured.inputs))
    assert captured.outputs[1].shape[:3] == (5, 2, 12)
    assert len(rewrite_and_compare(captured).bindings) == 2


def test_canonical_form_keeps_every_value(cache_is_a_pytree):
    captured = exported_llama(1, 7, padded=True)
    before = captured.gm(*captured.inputs)
    cats = sum(node in CAT for node in captured.gm.graph.nodes)
    assert canonicalize_attention(captured.gm) >= 8  # for each of 4 halves the inner cat and the empty constant's copy
    assert sum(node in CAT for node in captured.gm.graph.nodes) == cats - 4
    after = captured.gm(*captured.inputs)
    assert all(torch.equal(got, want) for got, want in zip(after, before, strict=True))
    assert canonicalize_attention(captured.gm) == 0


@pytest.mark.parametrize("past", [0, 6])
def test_plain_decoder(past):
    model = plain_decoder()
    tokens = random_tokens(2, past + (1 if past else 5))
    cache, dynamic = None, None
    if past:
        with torch.no_grad():
            cache = model(tokens[:, :past])[1]
        dynamic = (({0: DYNAMIC, 2: DYNAMIC},) * 2,) * 2
    args = (tokens[:, past:], cache)
    token_sizes = {0: DYNAMIC, 1: None if past else DYNAMIC}
    program = torch.export.export(model, args, dynamic_shapes=(token_sizes, dynamic), strict=False)
    captured = captured_program(program, args, {})
    result = rewrite_and_compare(captured)
    assert result.refusals == []
    kind = "continue" if past else "prompt"
    assert [(b.site.name, b.site.kind) for b in result.bindings] == [(f"attention.{i}", kind) for i in range(2)]


def test_encoder_program_does_not_change():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    args = (torch.randn(2, 5, 16),)
    captured = captured_program(torch.export.export(layer, args), args, {})
    before = format_graph(captured.gm.graph)
    assert any(node in ATTENTION for node in captured.gm.graph.nodes)
    door = Door(captured)
    result = rewrite_graph(door.gm, door.bind, door)
    assert result.bindings == [] and result.refusals == []
    assert format_graph(door.gm.graph) == before
