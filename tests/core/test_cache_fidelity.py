"""SQNR of a cache against the dense one: what is compared, what counts as kept, and what the files say of it."""

import dataclasses
import json
import math

import pytest
import torch
from sample_results import result_of
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache

import ottfx
from ottfx.cache_fidelity import PARTS, Fidelity, attention_output, attention_weights, measure_fidelity, sqnr_db
from ottfx.dense_run import QUERIES, run_dense
from ottfx.earlier_results import read_results
from ottfx.errors import MatchError
from ottfx.evaluation import evaluate
from ottfx.results import Variant, json_text, markdown_table, write_results

TOKENS = 160
OPTIONS = dict(bits=2, group_size=32, residual_length=8, exempt_layers=(1,), lower="eager")


@pytest.fixture(scope="module")
def fidelity() -> Fidelity:
    variant = Variant(label="a", options=OPTIONS)
    (result,) = evaluate(
        tiny_model("llama"), random_tokens(1, TOKENS), [variant], num_tokens=TOKENS, start=64, sqnr=True
    )
    return result.fidelity


def prompt_cache(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_sqnr_is_that_of_the_definition():
    x = torch.tensor([[[3.0, 4.0]], [[1.0, 2.0]]])
    assert sqnr_db(x, x * torch.tensor([0.9, 1.0]).view(2, 1, 1)).tolist() == pytest.approx([20.0, math.inf])
    # 25 of signal, 1 of noise.
    assert sqnr_db(x[:1], torch.tensor([[[3.0, 3.0]]])).item() == pytest.approx(10 * math.log10(25))


@pytest.mark.parametrize(("family", "projection"), [("llama", "o_proj"), ("falcon", "dense"), ("qwen2", "o_proj")])
def test_dense_run_gives_what_the_attentions_read(family, projection):
    model, ids = tiny_model(family), random_tokens(1, 100)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(projection):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    dense = run_dense(model, ids)
    assert len(dense) == len(seen) == 2
    for asked, expected in zip(dense, seen, strict=True):
        output = attention_output(asked, asked.key, asked.value).flatten(0, 1).transpose(0, 1).flatten(1)
        torch.testing.assert_close(output, expected[-QUERIES:], rtol=1e-4, atol=1e-5)


def test_another_attention_is_refused():
    with pytest.raises(MatchError, match="Got 0 calls. Load the model with attn_implementation='sdpa'"):
        model = tiny_model("llama")
        model.set_attn_implementation("eager")
        run_dense(model, random_tokens(1, 20))


def test_known_noise_is_found_where_it_was_put():
    model, ids = tiny_model("llama"), random_tokens(1, 100)
    caches = [prompt_cache(model, ids) for _ in range(2)]
    caches[0].layers[0].keys[:, 1] *= 1.1
    caches[1].layers[1].values[:, 0] *= 0.9
    found = measure_fidelity(run_dense(model, ids), *caches, 100)
    quiet = 100  # dB: only the rounding of another order of sums
    assert found.stored.shape == found.decoded.shape == (3, 2, 2)
    key, value, output = found.stored
    assert key[0, 1].item() == pytest.approx(20, abs=0.01) and value.min() > quiet
    assert 0 < output[0, 1] < 40 and output[0, 0] > quiet and output[1].min() > quiet
    # An output is linear in the values.
    assert found.decoded[1:, 1, 0].tolist() == pytest.approx([20, 20], abs=0.01) and found.decoded[0].min() > quiet


def test_decoding_adds_what_earlier_layers_lost(fidelity):
    # The first layer gets the same input either way, the second one that of a quantized first.
    torch.testing.assert_close(fidelity.decoded[:, 0], fidelity.stored[:, 0], atol=0.05, rtol=0.01)
    assert (fidelity.decoded[:2, 1] < fidelity.stored[:2, 1] - 1).all()
    assert 5 < fidelity.mean("key") < 15
    assert fidelity.mean("key") == pytest.approx(sum(fidelity.layer_means("key")) / 2, abs=1e-4)


def test_kept_tokens_are_those_with_a_seat(fidelity):
    model = ottfx.compile(tiny_model("llama"), **OPTIONS)
    cache = prompt_cache(model, random_tokens(1, TOKENS))
    rows = cache.layers[0].keys.payload.half.tensors["seat_row"][0].flatten(1)
    for head in range(2):
        kept = fidelity.kept_exact[0, head].nonzero().flatten().tolist()
        # One of each group of 32: four of the first page, none of the second, of which nothing is packed.
        assert kept == sorted(rows[head, :4].tolist())
    assert not fidelity.kept_exact[1].any()


def test_attention_paid_to_kept_tokens_is_that_of_the_dense_run(fidelity):
    dense = run_dense(tiny_model("llama"), random_tokens(1, TOKENS))[0]
    weights = attention_weights(dense, dense.key)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    expected = (weights * fidelity.kept_exact[0, :, None, None]).sum(-1).mean((1, 2))
    torch.testing.assert_close(fidelity.kept_attention[0], expected)
    assert (expected > 0).all() and fidelity.kept_attention[1].tolist() == [0, 0]


def test_ranges_narrow_where_tokens_are_kept_aside(fidelity):
    everything, rest = fidelity.ranges
    assert (rest[0] <= everything[0]).all() and (rest[0] < everything[0]).any()
    assert torch.equal(rest[1], everything[1])
    assert fidelity.key_norms.float().median(-1).values.tolist() == [pytest.approx([1, 1], abs=0.01)] * 2


def test_layers_that_slide_fill_their_end_only():
    model = ottfx.compile(tiny_model("gemma3"), **OPTIONS)
    ids = random_tokens(1, 100)
    cache = prompt_cache(model, ids)
    found = measure_fidelity(run_dense(model, ids), cache, cache, 100)
    held = cache.layers[0].keys.shape[2]
    assert found.key_norms[0, 0].isnan().sum() == 100 - held and not found.key_norms[1].isnan().any()
    assert found.ranges[:, 0].isnan().all() and not found.ranges[:, 1].isnan().any()
    assert found.stored[0, 1, 0] < 20 < 100 < found.stored[:, 0].min()


def test_files_keep_the_fidelity(fidelity, tmp_path):
    with_it = dataclasses.replace(result_of("a", [0.1, 0.2]), fidelity=fidelity)
    results = [with_it, result_of("b", [0.3, 0.6])]
    write_results(results, tmp_path / "q")
    first, second = read_results(tmp_path / "q")
    assert second.fidelity is None
    for field in dataclasses.fields(Fidelity):
        torch.testing.assert_close(
            getattr(first.fidelity, field.name), getattr(fidelity, field.name), rtol=0, atol=0, equal_nan=True
        )
    row, without = json.loads(json_text(results))
    assert row["sqnr"]["stored"]["value"] == fidelity.layer_means("value") and "sqnr" not in without
    assert list(row["sqnr"]["decoded"]) == list(PARTS)
    page = (tmp_path / "q.md").read_text()
    assert page.startswith(markdown_table(results)) and page.count("\n| 1 | ") == 2
    assert f"{fidelity.mean('key'):.1f} / {fidelity.mean('value'):.1f} / " in page
    assert "SQNR" not in markdown_table([result_of("b", [0.3])])


def test_a_lossless_cache_is_exact():
    exact = torch.full((3, 2, 2), torch.inf)
    nothing = torch.zeros(0)
    lossless = Fidelity(
        stored=exact, decoded=exact, kept_exact=nothing, kept_attention=nothing, ranges=nothing, key_norms=nothing
    )
    result = dataclasses.replace(result_of("none", [0.0]), fidelity=lossless)
    assert "exact / exact / exact" in markdown_table([result])
    (row,) = json.loads(json_text([result]), parse_constant=pytest.fail)
    assert row["sqnr"]["stored"]["key"] == [None, None]
