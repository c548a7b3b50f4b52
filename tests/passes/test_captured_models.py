"""Graphs that Dynamo captures from unmodified transformers models: every full-attention layer is rewritten."""

from __future__ import annotations

import pytest
from lossless_scheme import LOSSLESS
from rewritten import count, prompt_and_step, rewrite_and_compare
from tiny_models import FAMILIES, tiny_model

from ottfx.passes.cache_read import SLIDING
from ottfx.passes.spellings import ATTENTION, EXPAND
from ottfx.report import Report

SLIDING_LAYERS = {"mistral-sliding": [0], "gemma3": [0]}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_full_attention_layer(family, padded):
    layers = 2 if family == "gemma3" else 1
    model = tiny_model(family, num_hidden_layers=layers)
    report = Report()
    for kind, captured in zip(("prompt", "continue"), prompt_and_step(model, padded), strict=True):
        result = rewrite_and_compare(captured)
        sliding = SLIDING_LAYERS.get(family, [])
        assert [refusal.index for refusal in result.refusals] == sliding
        assert all(refusal.reason == SLIDING for refusal in result.refusals)
        full = [index for index in range(layers) if index not in sliding]
        assert [binding.site.index for binding in result.bindings] == full
        assert all(binding.site.kind == kind for binding in result.bindings)
        assert all(str(binding.site.index) in binding.site.name.split(".") for binding in result.bindings)
        assert count(result.gm, LOSSLESS.append_op) == len(full)
        assert count(result.gm, LOSSLESS.attend_op) == (len(full) if kind == "continue" else 0)
        ops = result.gm.graph.find_nodes(op="call_function", target=LOSSLESS.append_op, sort=False)
        # Read before it is repeated for each head and query.
        assert not any(append.args[2] in EXPAND for append in ops)
        dense = sum(node in ATTENTION for node in result.gm.graph.nodes)
        assert dense == len(sliding) + (len(full) if kind == "prompt" else 0)
        assert len(result.cache_outputs) == 2 * len(full)
        report.add_graph(result)
    assert [site.kinds for site in report.sites] == [("prompt", "continue")] * len(full)


def test_all_layers_are_named_and_numbered_alike_in_both_graphs():
    model = tiny_model("qwen3", num_hidden_layers=2)
    names = []
    for captured in prompt_and_step(model, padded=False):
        result = rewrite_and_compare(captured)
        names.append([(binding.site.index, binding.site.name) for binding in result.bindings])
    assert names[0] == names[1] == [(i, f"model.layers.{i}.self_attn") for i in range(2)]


def test_attention_that_is_no_sdpa_is_refused():
    model = tiny_model("llama", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    for captured in prompt_and_step(model, padded=False):
        (refusal,) = rewrite_and_compare(captured).refusals
        assert refusal.name == "model.layers.0.self_attn"
        assert "attn_implementation='sdpa'" in refusal.reason
