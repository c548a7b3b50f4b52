"""What surrounds the passes: order, records, traces, the report, and clean-up that must not remove too much."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from lossless_scheme import LOSSLESS, LosslessConfig
from rewritten import Captured, Door, capture, copy_graph, count, prompt_and_step, rewrite_and_compare
from tiny_models import random_tokens, tiny_model
from torch import Tensor
from transformers import StaticCache

from ottfx.attention_site import Refusal
from ottfx.passes.graph_utils import format_graph
from ottfx.passes.remove_dead_nodes import remove_dead_nodes
from ottfx.passes.spellings import ATTENTION, is_mutating
from ottfx.pipeline import PASSES, rewrite_graph
from ottfx.registry import get_scheme
from ottfx.report import LENGTHS, Report

SHAPE = (2, 2, 5, 8)


def step(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor):
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(step, torch.randn(2, 4, 1, 8), *(torch.randn(2, 2, n, 8) for n in (1, 1, 5, 5)))


def test_records(captured):
    result = rewrite_and_compare(captured)
    assert [record.name for record in result.passes] == [run.__name__.strip("_") for run in PASSES]
    assert [record.calls_before for record in result.passes] == [3, 3, 3, 4]
    assert [record.calls_after for record in result.passes] == [3, 3, 4, 2]
    assert all(record.milliseconds > 0 for record in result.passes)
    assert "continue, lossless" in result.passes[1].summary


def test_the_attend_op_comes_first_and_carries_the_meta(captured):
    result = rewrite_and_compare(captured)
    attend, append = (node for node in result.gm.graph.nodes if node.op == "call_function")
    assert (attend.target, append.target) == (LOSSLESS.attend_op, LOSSLESS.append_op)
    (attention,) = (node for node in captured.gm.graph.nodes if node in ATTENTION)
    assert attend.meta["example_value"] is attention.meta["example_value"]
    assert "example_value" not in append.meta


def test_a_door_may_refuse(captured):
    door = Door(captured)
    result = rewrite_graph(door.gm, lambda site: Refusal(index=site.index, name=site.name, reason="no"), door)
    assert [refusal.reason for refusal in result.refusals] == ["no"]
    assert result.bindings == [] and door.added == {}
    assert format_graph(door.gm.graph) == format_graph(copy_graph(captured.gm).graph)


def test_placeholders_stay_unless_asked(captured):
    for erase in (False, True):
        door = Door(captured)
        result = rewrite_graph(door.gm, door.bind, door, erase_placeholders=erase)
        left = {node.name for node in door.gm.graph.find_nodes(op="placeholder")}
        unread = {node.name for node in result.unread_placeholders}
        assert len(unread) >= 2 and (unread & left == set() if erase else unread <= left)


def test_trace_files(captured, tmp_path, monkeypatch):
    monkeypatch.setenv("OTTFX_TRACE", str(tmp_path / "trace"))
    rewrite_and_compare(captured)
    files = sorted((tmp_path / "trace").iterdir())
    names = [file.name.split("_", 1)[1] for file in files]
    assert names == [f"{i:02d}_{name}.txt" for i, name in enumerate(["captured", *(r.__name__[1:] for r in PASSES)])]
    assert "scaled_dot_product_attention" in files[0].read_text()
    last = files[-1].read_text()
    assert "lossless_attend" in last and "scaled_dot_product_attention" not in last
    assert "float32[" in last


def test_trace_log(captured, caplog):
    rewrite_and_compare(captured)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="ottfx.graphs"):
        rewrite_and_compare(captured)
    assert len(caplog.records) == 1 + len(PASSES)


def test_report(captured):
    report = Report()
    report.add_graph(rewrite_and_compare(captured))
    report.add_graph(rewrite_and_compare(captured))
    (site,) = report.sites
    dense = 2 * 2 * 8 * 4
    assert (site.kinds, site.dense_bytes_per_token) == (("continue",), dense)
    state = {length: dense + 2 / length for length in LENGTHS}
    assert report.bytes_per_token == pytest.approx(state)
    assert site.bits == pytest.approx(32.0, abs=1e-2)
    assert report.ops == {
        "ottfx_test_passes.lossless_append.default": 2,
        "ottfx_test_passes.lossless_attend.default": 2,
    }
    text = str(report)
    assert "1 attentions rewritten, 0 left alone, in 2 graphs" in text
    assert LosslessConfig().describe() in text and "B/token at 32k" in text


def test_report_of_refusals():
    def sliding(*tensors):
        attended, keys, values = step(*tensors)
        return attended, keys[:, :, -3:], values[:, :, -3:]

    captured = capture(sliding, torch.randn(2, 4, 1, 8), *(torch.randn(2, 2, n, 8) for n in (1, 1, 5, 5)))
    report = Report()
    for _ in range(2):
        report.add_graph(rewrite_and_compare(captured))
    assert len(report.refusals) == 1
    assert "left alone: 0" in str(report) and "sliding window" in str(report)
    assert "ops:" not in str(report)


# What must survive the clean-up.


def test_other_layers_keep_their_in_place_writes():
    def mixed(query, key, value, past_key, past_value, buffer):
        attended, keys, values = step(query, key, value, past_key, past_value)
        buffer.index_copy_(2, torch.arange(1), key)
        more = F.scaled_dot_product_attention(attended, buffer, buffer, enable_gqa=True)
        return more, keys, values

    sizes = [torch.randn(2, 2, n, 8) for n in (1, 1, 5, 5, 3)]
    captured = capture(mixed, torch.randn(2, 4, 1, 8), *sizes)
    assert count(captured.gm, "index_copy_") == 1
    result = rewrite_and_compare(captured)
    assert count(result.gm, "index_copy_") == 1
    assert [refusal.index for refusal in result.refusals] == [1]
    assert "static cache" in result.refusals[0].reason
    assert [binding.site.index for binding in result.bindings] == [0]


def test_only_orphans_are_removed():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    unused_before = graph.call_function(torch.sin, (x,))
    shared = graph.call_function(torch.cos, (x,))
    orphan = graph.call_function(torch.neg, (shared,))
    written = graph.call_method("add_", (x, 1))
    drawn = graph.call_function(torch.nn.functional.dropout, (x, 0.5))
    graph.call_method("numel", (x,))
    graph.output((shared,))
    removed, unread = remove_dead_nodes(torch.fx.GraphModule({}, graph), [orphan, written, shared])
    left = set(graph.nodes)
    assert orphan not in left and {unused_before, shared, written, drawn} <= left
    assert (removed, unread) == (2, [])


@pytest.mark.parametrize(
    ("name", "args", "mutates"),
    [
        ("index_copy_", (0,), True),
        ("add_", (1,), True),
        ("__and__", (1,), False),
        ("transpose", (0, 1), False),
    ],
)
def test_mutating_methods(name, args, mutates):
    graph = torch.fx.Graph()
    assert is_mutating(graph.call_method(name, (graph.placeholder("x"), *args))) is mutates


def test_mutating_functions():
    import operator

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    calls = {
        operator.and_: False,
        operator.iadd: True,
        operator.ior: True,
        operator.setitem: True,
        operator.getitem: False,
        torch.neg: False,
        torch.relu_: True,
        torch.ops.aten.add_.Tensor: True,
        torch.ops.aten.__and__.Tensor: False,
        LOSSLESS.append_op: True,
        LOSSLESS.attend_op: False,
    }
    for target, mutates in calls.items():
        assert is_mutating(graph.call_function(target, (x, x))) is mutates, target


def test_static_cache_of_a_model_does_not_change():
    model = tiny_model("llama", num_hidden_layers=1)

    def call(tokens, cache):
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=random_tokens(2, 5), past_key_values=cache)
    captured = capture(call, random_tokens(2, 1), cache)
    assert count(captured.gm, "index_copy_") == 2
    before = format_graph(copy_graph(captured.gm).graph)
    door = Door(captured)
    result = rewrite_graph(door.gm, door.bind, door)
    (refusal,) = result.refusals
    assert "static cache" in refusal.reason
    assert result.bindings == [] and format_graph(door.gm.graph) == before


def test_the_none_scheme_on_a_model():
    none = get_scheme("none")
    for captured in prompt_and_step(tiny_model("qwen2", num_hidden_layers=1), padded=True):
        result = rewrite_and_compare(captured, scheme=none, config=none.config_class())
        assert len(result.bindings) == 1
        assert count(result.gm, none.append_op) == 1
