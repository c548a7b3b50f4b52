"""Every spelling of a growing cache is matched and rewritten; every other one is left alone, and said why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lossless_scheme import LOSSLESS
from rewritten import capture, copy_graph, count, rewrite_and_compare
from torch import Tensor
from torch.fx import Node

from ottfx.passes.graph_utils import format_graph, node_value, shape_of
from ottfx.passes.match_attention import match_attention
from ottfx.passes.spellings import ATTENTION

BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8


def states(q_len: int, kv_heads: int = KV_HEADS, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, heads, q_len, DIM),
        torch.randn(BATCH, kv_heads, q_len, DIM),
        torch.randn(BATCH, kv_heads, q_len, DIM),
    )


def past(length: int = 5, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, kv_heads, length, DIM), torch.randn(BATCH, kv_heads, length, DIM)


# How a kv head is given to several query heads.


def none_index(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)


def short_none_index(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def unsqueeze_clone_view(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    grouped = torch.unsqueeze(x.contiguous(), 2).expand(-1, -1, 2, -1, -1).clone()
    return grouped.view(batch, heads * 2, length, dim).contiguous()


def negative_unsqueeze(x: Tensor) -> Tensor:
    return x.unsqueeze(-3).repeat(1, 1, 2, 1, 1).flatten(1, 2)


def interleave_method(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def interleave_function(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, 2, 1)


def full_slice(x: Tensor) -> Tensor:
    return none_index(x[:, :, :, :].to(torch.float32)[:, :, 0:])


REPEATS = [
    none_index,
    short_none_index,
    unsqueeze_clone_view,
    negative_unsqueeze,
    interleave_method,
    interleave_function,
    full_slice,
]


def decode(repeat=none_index, cat=lambda p, n: torch.cat([p, n], dim=-2), **sdpa):
    def step(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor):
        keys, values = cat(past_key, key * 2), cat(past_value, value)
        return F.scaled_dot_product_attention(query, repeat(keys), repeat(values), **sdpa) + 1, keys, values

    return step


def assert_one_site(captured, kind: str):
    sites, refusals = match_attention(captured.gm)
    assert refusals == []
    (site,) = sites
    assert (site.kind, site.index) == (kind, 0)
    result = rewrite_and_compare(captured)
    assert count(result.gm, LOSSLESS.append_op) == 1
    assert count(result.gm, LOSSLESS.attend_op) == (kind == "continue")
    assert sum(node in ATTENTION for node in result.gm.graph.nodes) == (kind == "prompt")
    assert count(result.gm, torch.cat) == 0
    return site


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("q_len", [1, 3])
def test_repeated_heads(repeat, q_len):
    captured = capture(decode(repeat), *states(q_len), *past())
    before = sum(node.op.startswith("call") for node in captured.gm.graph.nodes)
    site = assert_one_site(captured, "continue")
    assert site.softmax_scale == pytest.approx(DIM**-0.5)
    after = sum(node.op.startswith("call") for node in rewrite_and_compare(captured).gm.graph.nodes)
    assert after < before
    assert after == 4  # key * 2, attend, append, + 1


@pytest.mark.parametrize(
    "cat",
    [
        lambda p, n: torch.cat((p, n), 2),
        lambda p, n: torch.concat([p, n], dim=2),
        lambda p, n: torch.cat(tensors=[p, n], dim=-2),
        lambda p, n: torch.cat([p, n.contiguous()], dim=2),
    ],
    ids=["tuple", "concat", "keywords", "contiguous"],
)
def test_cat(cat):
    assert_one_site(capture(decode(cat=cat), *states(1), *past()), "continue")


@pytest.mark.parametrize(
    "attention",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.5, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5, enable_gqa=True),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, scale=0.5, enable_gqa=True),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True),
    ],
    ids=["function", "positional", "keywords", "aten", "packet"],
)
def test_attention(attention):
    def step(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return attention(query, keys, values), keys, values

    site = assert_one_site(capture(step, *states(2), *past()), "continue")
    assert site.softmax_scale == 0.5


def test_one_kv_head_broadcasts():
    for repeat in (lambda x: x, lambda x: x.expand(-1, HEADS, -1, -1)):
        captured = capture(decode(repeat), *states(1, kv_heads=1), *past(kv_heads=1))
        assert_one_site(captured, "continue")


def test_equal_heads():
    captured = capture(decode(lambda x: x), *states(1, kv_heads=HEADS), *past(kv_heads=HEADS))
    assert_one_site(captured, "continue")


@pytest.mark.parametrize("shape", [(BATCH, 1, 3, 8), (1, HEADS, 3, 8), (BATCH, 1, 1, 8), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask(shape, dtype):
    def step(query, key, value, past_key, past_value, mask):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask.logical_not().logical_not(), enable_gqa=True
        )
        return attended, keys, values

    def float_step(query, key, value, past_key, past_value, mask):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return F.scaled_dot_product_attention(query, keys, values, mask + 0, enable_gqa=True), keys, values

    mask = torch.rand(shape) < 0.7 if dtype == torch.bool else torch.randn(shape)
    captured = capture(step if dtype == torch.bool else float_step, *states(3), *past(), mask)
    site = assert_one_site(captured, "continue")
    assert site.mask is not None


def test_mask_reaches_both_ops_as_four_axes():
    def step(query, key, value, past_key, past_value, mask):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True), keys, values

    captured = capture(step, *states(3), *past(), torch.rand(3, 8) < 0.7)
    result = rewrite_and_compare(captured)
    masks = {
        node.args[3 if node.target is LOSSLESS.attend_op else 2]
        for node in result.gm.graph.nodes
        if node.target in (LOSSLESS.attend_op, LOSSLESS.append_op)
    }
    (mask,) = masks
    assert len(mask.meta["example_value"].shape) == 4


@pytest.mark.parametrize("repeat", [none_index, interleave_method])
def test_prompt_with_empty_tensor(repeat):
    def prompt(query, key, value):
        keys = torch.cat([torch.tensor([], dtype=key.dtype), key + 1], dim=-2)
        values = torch.cat([torch.tensor([], dtype=key.dtype), value], dim=-2)
        attended = F.scaled_dot_product_attention(query, repeat(keys), repeat(values), is_causal=True)
        return attended, keys, values

    site = assert_one_site(capture(prompt, *states(6)), "prompt")
    assert site.is_causal


def test_prompt_with_empty_placeholder():
    captured = capture(decode(is_causal=True), *states(6), *past(0))
    assert_one_site(captured, "prompt")


def test_prompt_without_cat():
    def prompt(query, key, value):
        key, value = key + 1, value * 3
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attended, key, value

    site = assert_one_site(capture(prompt, *states(6)), "prompt")
    assert site.full_key is site.key


def test_cache_returned_twice_and_as_full_slice():
    def step(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        attended = F.scaled_dot_product_attention(query, none_index(keys), none_index(values))
        return keys[:, :, :, :], attended, keys, values.contiguous(), values[..., :]

    captured = capture(step, *states(1), *past())
    result = rewrite_and_compare(captured)
    assert len(captured.outputs) - len(result.cache_outputs) == 1


def ask_size(tensor: Node, dim: int) -> Node:
    """A size query behind a node, in either spelling."""
    placeholders = tensor.graph.find_nodes(op="placeholder")
    with tensor.graph.inserting_after(placeholders[-1] if tensor in placeholders else tensor):
        if dim < 0:
            query = tensor.graph.call_method("size", (tensor, dim))
        else:
            query = tensor.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    query.meta["example_value"] = node_value(tensor).shape[dim]
    return query


@pytest.mark.parametrize("kind", ["continue", "prompt"])
def test_sizes_of_dense_tensors_are_answered_without_them(kind):
    step = decode(short_none_index, is_causal=kind == "prompt")
    captured = capture(step, *states(3), *past(5 if kind == "continue" else 0))
    (site,), _ = match_attention(captured.gm)
    tensors = [site.past_key, site.past_value] if kind == "continue" else []
    tensors += [site.full_key, site.full_value, *site.key_path, *site.value_path]
    queries = [ask_size(x, d) for x in tensors for rank in [len(shape_of(x))] for d in range(-rank, rank)]
    idle = ask_size(site.full_key, 2)
    output = captured.gm.graph.output_node()
    output.args = ((*output.args[0], *queries),)
    captured.gm.recompile()
    with torch.no_grad():
        captured.outputs = list(captured.gm(*captured.inputs))
    assert captured.outputs[-1] == DIM and len(queries) >= 50
    result = assert_one_site(captured, kind)
    assert result.full_key is site.full_key
    assert idle.name not in {node.name for node in rewrite_and_compare(captured).gm.graph.nodes}


def test_name_from_modules():
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return decode()(*tensors)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, *tensors):
            query, *rest = tensors
            first, *cache = self.layers[0](query, *rest[:4])
            second, *more = self.layers[1](first, *rest[4:])
            return second, *cache, *more

    query, key, value = states(1)
    captured = capture(Model(), query, key, value, *past(), *states(1)[1:], *past(7))
    sites, _ = match_attention(captured.gm)
    assert [(site.index, site.name) for site in sites] == [(0, "layers.0"), (1, "layers.1")]
    assert len(rewrite_and_compare(captured).cache_outputs) == 4


def test_attention_feeds_attention_directly():
    def two(query, key, value, past_key, past_value, more_key, more_value, old_key, old_value):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        first = F.scaled_dot_product_attention(query, keys, values)
        next_keys, next_values = torch.cat([old_key, first], 2), torch.cat([old_value, more_value], 2)
        return F.scaled_dot_product_attention(first, next_keys, next_values), keys, values, next_keys, next_values

    tensors = [states(1, HEADS), past(5, HEADS), states(1, HEADS)[1:], past(5, HEADS)]
    captured = capture(two, *(x for group in tensors for x in group))
    result = rewrite_and_compare(captured)
    assert len(result.bindings) == 2 and len(result.cache_outputs) == 4


# Graphs that must not change.


def encoder(query, key, value, past_key, past_value):
    return F.scaled_dot_product_attention(query, none_index(key), none_index(value)) + past_key.sum() + past_value.sum()


def cached_cross_attention(query, key, value, past_key, past_value):
    return F.scaled_dot_product_attention(query, none_index(past_key), none_index(past_value)), key, value


@pytest.mark.parametrize("call", [encoder, cached_cross_attention])
def test_no_cache_is_no_candidate(call):
    captured = capture(call, *states(2), *past())
    assert match_attention(captured.gm) == ([], [])
    rewrite_and_compare(captured)


def manual_attention(query, key, value, past_key, past_value):
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return torch.softmax(query @ none_index(keys).mT, -1) @ none_index(values), keys, values


def step_of(cat_key=None, cat_value=None, read=none_index, after=None, **sdpa):
    """A decode step with one thing out of the ordinary."""
    cat_key = cat_key or (lambda past_key, key: torch.cat([past_key, key], 2))
    cat_value = cat_value or (lambda past_value, value: torch.cat([past_value, value], 2))

    def step(query, key, value, past_key, past_value):
        keys, values = cat_key(past_key, key), cat_value(past_value, value)
        attended = F.scaled_dot_product_attention(query, read(keys), read(values), **sdpa)
        return after(attended, keys, values, past_key, past_value) if after else (attended, keys, values)

    return step


def tile(x):
    return x.repeat(1, 2, 1, 1)


def tile_by_wrong_axis(x):
    return x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2)


def static_write(buffer, new):
    return buffer.index_copy_(2, torch.arange(new.shape[2]), new)


def slice_assign(buffer, new):
    buffer[:, :, : new.shape[2]] = new
    return buffer


def cat_then_write(stored, new):
    cat = torch.cat([stored, new], 2)
    new.add_(1)
    return cat


REFUSED = {
    "dropout": (step_of(dropout_p=0.5), "dropout_p is 0.5"),
    "sliding": (step_of(after=lambda a, k, v, *_: (a, k[:, :, -4:], v[:, :, -4:])), "sliding window layer stays"),
    "sliding-read": (
        step_of(read=lambda x: none_index(x[:, :, -4:]), after=lambda a, k, v, *_: (a, k[:, :, -4:], v[:, :, -4:])),
        "sliding window layer stays",
    ),
    "part-read": (step_of(read=lambda x: none_index(x[:, :, :4])), "only a slice of the cache"),
    "used-elsewhere": (step_of(after=lambda a, k, v, *_: (a + k.sum(), k, v)), "the cache is also read by 'sum'"),
    "past-used": (step_of(after=lambda a, k, v, pk, pv: (a + pv.sum(), k, v)), "stored tokens are also read by 'sum'"),
    "past-returned": (step_of(after=lambda a, k, v, pk, pv: (a, k, v, pk[:, :, 1:])), "stored tokens are also read by"),
    "three-parts": (step_of(cat_key=lambda p, n: torch.cat([p, n, n[:, :, :0]], 2)), "cat of 3 parts"),
    "new-first": (step_of(cat_key=lambda p, n: torch.cat([n * 2, p], 2)), "stored tokens are not an input"),
    "past-computed": (step_of(cat_value=lambda p, n: torch.cat([p * 2, n], 2)), "they come from 'mul'"),
    "keys-only": (step_of(after=lambda a, k, v, *_: (a, k)), "only one of keys and values is a cache"),
    "causal": (step_of(is_causal=True), "is_causal with stored tokens"),
    "tiled": (step_of(read=tile), "it reads 'repeat' computed from it"),
    "tiled-axis": (step_of(read=tile_by_wrong_axis), "it reads 'flatten' computed from it"),
    "stacked": (
        step_of(read=lambda x: torch.stack([x, x * 2], 2).flatten(1, 2)),
        "it reads 'flatten' computed from it",
    ),
    "computed": (step_of(read=lambda x: none_index(torch.sin(x))), "it reads 'sin' computed from it"),
    "static": (step_of(cat_key=static_write, cat_value=static_write), "static cache"),
    "new-written": (
        step_of(cat_key=cat_then_write),
        "new tokens are written in place",
    ),
    "static-slice": (step_of(cat_key=slice_assign, cat_value=slice_assign), "static cache"),
    "no-sdpa": (manual_attention, "attn_implementation='sdpa'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(name):
    call, reason = REFUSED[name]
    captured = capture(call, *states(1), *past(1 if name == "static" else 5))
    before = format_graph(copy_graph(captured.gm).graph)
    result = rewrite_and_compare(captured)
    assert result.bindings == [] and result.cache_outputs == {}
    assert result.refusals and all(reason in refusal.reason for refusal in result.refusals), result.refusals
    assert format_graph(result.gm.graph) == before


def test_cat_along_another_axis():
    def layout_step(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
        read_keys, read_values = keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(query, none_index(read_keys), none_index(read_values)), keys, values

    query, key, value = states(1)
    old_key, old_value = past()
    captured = capture(layout_step, query, *(x.transpose(1, 2).contiguous() for x in (key, value, old_key, old_value)))
    result = rewrite_and_compare(captured)
    (refusal,) = result.refusals
    assert "grows along axis 1" in refusal.reason


def test_different_kinds():
    def mixed(query, key, value, past_key):
        keys, values = torch.cat([past_key, key], 2), torch.cat([torch.tensor([]), value.repeat(1, 1, 6, 1)], 2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values

    captured = capture(mixed, *states(1), past(5)[0])
    (refusal,) = rewrite_and_compare(captured).refusals
    assert "different kinds" in refusal.reason


def test_value_width():
    query, key, _ = states(1)
    value = torch.randn(BATCH, KV_HEADS, 1, DIM // 2)
    captured = capture(decode(), query, key, value, past()[0], torch.randn(BATCH, KV_HEADS, 5, DIM // 2))
    (refusal,) = rewrite_and_compare(captured).refusals
    assert refusal.reason == f"head_dim of keys is {DIM} and of values {DIM // 2}"


def test_three_axes_of_mask():
    def step(query, key, value, past_key, past_value, mask):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True), keys, values

    captured = capture(step, *states(3), *past(), torch.rand(HEADS, 3, 8) < 0.7)
    (refusal,) = rewrite_and_compare(captured).refusals
    assert "the mask is 3-D" in refusal.reason


def test_cross_attention_prompt():
    def step(query, key, value):
        keys, values = torch.cat([torch.tensor([]), key], 2), torch.cat([torch.tensor([]), value], 2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values

    captured = capture(step, states(2)[0], *states(9)[1:])
    (refusal,) = rewrite_and_compare(captured).refusals
    assert "cross attention" in refusal.reason


def test_parameter_is_no_cache():
    class Prefix(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.value = (torch.nn.Parameter(x) for x in past())

        def forward(self, *tensors):
            return decode()(*tensors, self.key, self.value)

    (refusal,) = rewrite_and_compare(capture(Prefix(), *states(2))).refusals
    assert "parameter of the model" in refusal.reason


def test_shared_by_two_attentions():
    def step(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        first = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return F.scaled_dot_product_attention(first, keys, values, enable_gqa=True), keys, values

    result = rewrite_and_compare(capture(step, *states(1), *past()))
    assert [refusal.index for refusal in result.refusals] == [0, 1]
    assert all("not only by this attention" in refusal.reason for refusal in result.refusals)


def test_scale_from_a_node():
    captured = capture(decode(scale=0.25), *states(1), *past())
    gm = copy_graph(captured.gm)
    (attention,) = (node for node in gm.graph.nodes if node in ATTENTION)
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        scale = gm.graph.placeholder("scale")
    scale.meta["example_value"] = 0.125
    attention.kwargs = {**attention.kwargs, "scale": scale}
    (site,), _ = match_attention(gm)
    assert site.softmax_scale == 0.125
    scale.meta["example_value"] = torch.empty((), device="meta")
    _, (refusal,) = match_attention(gm)
    assert "specialize_float" in refusal.reason
