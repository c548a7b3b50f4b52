"""The same graph for all cache lengths: whole models step by step, and what may and may not touch the length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_recorder import recording_on_cpu
from plain_decoder import plain_decoder
from tiny_models import random_tokens, tiny_model
from torch import Tensor

import ottfx
from ottfx import record_step
from ottfx.backend import ott
from ottfx.passes.graph_utils import format_graph
from ottfx.step_graph import counters

EXACT = dict(rtol=0, atol=1e-6)
"""Attention over the whole capacity adds zeros, in sums of another order."""


def decode(
    model: torch.nn.Module, options: dict[str, Any], padded: bool, steps: int, positions: bool = False
) -> list[Tensor]:
    """Logits of a prompt of 250 tokens and of steps behind it, so that a third page is needed."""
    tokens = random_tokens(2, 250 + steps)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    ottfx.compile(model, lower="eager", **options)
    logits, cache = [], None
    for stop in (250, *range(251, 250 + steps)):
        start = 0 if cache is None else stop - 1
        kwargs = {"attention_mask": mask[:, :stop]} if padded else {}
        if positions:
            kwargs["position_ids"] = torch.arange(start, stop)[None].expand(2, -1)
        with torch.no_grad():
            if hasattr(model, "config"):
                out = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True, **kwargs)
                result, cache = out.logits, out.past_key_values
            else:
                result, cache = model(tokens[:, start:stop], cache)
        logits.append(result)
    return logits


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(
    "family, scheme",
    [("llama", "ott"), ("llama", "none"), ("gpt2", "kivi"), ("opt", "ott"), ("gemma3", "ott"), ("falcon", "none"),
     ("plain", "ott")],
)  # fmt: skip
def test_models_give_the_same_logits(family, scheme, padded):
    if family == "plain":
        if padded:
            pytest.skip("the plain decoder takes no padding")
        model = plain_decoder()
    else:
        # A sliding layer keeps a dense cache, whose size changes.
        model = tiny_model(family, **({"layer_types": ["full_attention"] * 2} if family == "gemma3" else {}))
    steps = 12
    # OPT counts the tokens of its mask where positions are not given, as `generate` gives them.
    positions = family == "opt"
    want = decode(copy.deepcopy(model), {"scheme": scheme}, padded, steps, positions)
    with recording_on_cpu():
        torch._dynamo.reset()
        got = decode(copy.deepcopy(model), {"scheme": scheme, "mode": "reduce-overhead"}, padded, steps, positions)
        assert counters["refusals"] == 0 and counters["recordings"] == 2
        assert counters["warmups"] + counters["replays"] == steps - 1
    scale = want[0].abs().max()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **EXACT)


# One attention; each function makes its mask, and what is added to its queries, from the past length and from a mask
# int64 [batch, past + 1].


def attend(extra: Callable[..., Any]) -> Callable[..., Any]:
    def step(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *more: Tensor) -> Any:
        past = past_key.shape[2]
        full_key, full_value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        mask, shift = extra(past, *more)
        if shift is not None:
            query = query + shift
        attended = F.scaled_dot_product_attention(query, full_key, full_value, attn_mask=mask, enable_gqa=True)
        return attended, full_key, full_value

    return step


TABLE = torch.linspace(-1, 1, 512)
FREE_TABLE = TABLE.clone()
torch._dynamo.mark_static(TABLE)


def given(past: int, mask: Tensor) -> Any:
    return mask[:, None, None, :].bool(), None


def given_wider(past: int, mask: Tensor) -> Any:
    return mask.bool()[:, None, None][..., : past + 1], None


def two_dimensional(past: int, mask: Tensor) -> Any:
    return mask[:1].bool(), None


def additive(past: int, mask: Tensor) -> Any:
    hidden = torch.zeros(mask.shape[0], 1, 1, past + 1).masked_fill(mask[:, None, None] == 0, -torch.inf)
    return torch.where(mask[:, None, None] > 0, hidden, -torch.inf), None


def window(past: int, mask: Tensor) -> Any:
    position = torch.arange(past + 1)
    near = (position > past - 100) & (position <= past)
    return near.view(1, 1, 1, -1).expand(mask.shape[0], 1, 1, past + 1) & mask[:, None, None].bool(), None


def alibi(past: int, mask: Tensor) -> Any:
    distance = torch.arange(past + 1) - past
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1)
    return (slopes * distance).unsqueeze(0).to(torch.float32), None


def lookup(past: int, mask: Tensor) -> Any:
    rows, columns = torch.arange(mask.shape[0]), torch.arange(past + 1) + 0
    seen = mask.bool()[rows[:, None, None, None], columns[None, None, None, :]]
    return seen & seen.new_ones((), dtype=torch.bool), None


def position(past: int, mask: Tensor) -> Any:
    return None, torch.sin(torch.arange(past, past + 1) * 0.1 + 2 * past)


def free_table(past: int, mask: Tensor) -> Any:
    return FREE_TABLE[torch.arange(past + 1)][None, None, None], None


FINE = [given, given_wider, two_dimensional, additive, window, alibi, lookup, position, free_table]


def table_slice(past: int, mask: Tensor) -> Any:
    return None, TABLE[past : past + 1]


def table_lookup(past: int, mask: Tensor) -> Any:
    return TABLE[torch.arange(past + 1)][None, None, None], None


def shifted_lookup(past: int, mask: Tensor) -> Any:
    return (mask[:, torch.arange(past + 1) - 1]).bool()[:, None, None], None


def count_of_tokens(past: int, mask: Tensor) -> Any:
    return None, mask.sum() * 0.01


def running_count(past: int, mask: Tensor) -> Any:
    return (mask.cumsum(-1) > 3)[:, None, None], None


def power(past: int, mask: Tensor) -> Any:
    return None, torch.ones(1) * (past * past)


def filled(past: int, mask: Tensor) -> Any:
    return None, torch.full((1,), past)


def last_column(past: int, mask: Tensor) -> Any:
    return None, mask[:, -1].view(-1, 1, 1, 1) * 0.5


def from_one(past: int, mask: Tensor) -> Any:
    return (torch.arange(1, past + 2) > 3)[None, None, None], None


def twice_as_wide(past: int, mask: Tensor) -> Any:
    return torch.ones(2 * past + 2, dtype=torch.bool).view(2, -1)[0][None, None, None], None


def written(past: int, mask: Tensor) -> Any:
    hidden = torch.zeros(1, 1, 1, past + 1)
    hidden.masked_fill_(mask[:1, None, None] == 0, -torch.inf)
    return hidden, None


REFUSED = [table_slice, table_lookup, shifted_lookup, count_of_tokens, running_count, power, filled, last_column,
           from_one, twice_as_wide, written]  # fmt: skip


def run(function: Callable[..., Any], steps: int, **options: Any) -> list[Tensor]:
    """Attend `steps` times, from a dense past of 253 tokens on."""
    generator = torch.Generator().manual_seed(0)
    past = [torch.randn(3, 2, 253, 16, generator=generator) for _ in range(2)]
    call = torch.compile(attend(function), backend=ott, dynamic=True, options={"lower": "eager", **options})
    outputs = []
    for step in range(steps):
        query = torch.randn(3, 4, 1, 16, generator=generator)
        key, value = (torch.randn(3, 2, 1, 16, generator=generator) for _ in range(2))
        mask = torch.ones(3, 254 + step, dtype=torch.int64)
        mask[0, :7] = 0
        for tensor in (query, key, value, *past):
            torch._dynamo.mark_static(tensor, [1, 3])
        with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
            output, *past = call(query, key, value, *past, mask)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("function", FINE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("scheme", ["none", "ott"])
def test_rules(function, scheme):
    want = run(function, 6, scheme=scheme)
    torch._dynamo.reset()
    with recording_on_cpu():
        got = run(function, 6, scheme=scheme, mode="reduce-overhead")
        # The first step reads dense tensors and is a graph of its own.
        assert counters["refusals"] == 0 and counters["replays"] > 0
        assert counters["warmups"] + counters["replays"] == 6
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_needs_the_length_is_refused(function, monkeypatch, caplog):
    want = run(function, 3, scheme="none")
    torch._dynamo.reset()
    seen = []

    def fix_shapes(gm, bindings, lengths):
        before = format_graph(gm.graph)
        answer = FIX_SHAPES(gm, bindings, lengths)
        seen.append((answer, before == format_graph(gm.graph)))
        return answer

    monkeypatch.setattr(record_step, "fix_shapes", fix_shapes)
    with recording_on_cpu():
        got = run(function, 3, scheme="none", mode="reduce-overhead")
        assert counters["refusals"] == len(seen) > 0
        assert counters["replays"] == counters["warmups"] == 0
    assert all(isinstance(answer, str) and unchanged for answer, unchanged in seen)
    told = [record.getMessage() for record in caplog.records if record.name == "ottfx"]
    assert told and all("is not recorded" in message for message in told)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


FIX_SHAPES = record_step.fix_shapes


def test_a_result_that_grows_is_refused(caplog):
    def step(query, key, value, past_key, past_value):
        full_key, full_value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        attended = F.scaled_dot_product_attention(query, full_key, full_value, enable_gqa=True)
        return attended, torch.arange(full_key.shape[2]), full_key, full_value

    query, key, *pasts = (torch.randn(2, *sizes, 16) for sizes in ((4, 1), (2, 1), (2, 9), (2, 9)))
    for tensor in (query, key, *pasts):
        torch._dynamo.mark_static(tensor, [1, 3])
    options = {"lower": "eager", "mode": "reduce-overhead"}
    with recording_on_cpu(), torch.no_grad():
        _, positions, *_ = torch.compile(step, backend=ott, dynamic=True, options=options)(
            query, key, key.clone(), *pasts
        )
        assert counters["refusals"] == 1
    assert positions.tolist() == list(range(10))
    assert any("output (output)" in record.getMessage() for record in caplog.records)


def test_a_layer_with_a_dense_cache_is_refused(caplog):
    with recording_on_cpu():
        decode(tiny_model("gemma3"), {"mode": "reduce-overhead"}, True, 4)
        assert counters["refusals"] > 0 and counters["recordings"] == 0
    assert any("is not recorded" in record.getMessage() for record in caplog.records)
