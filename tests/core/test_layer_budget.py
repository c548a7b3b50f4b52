"""The comparison of layer budgets: gains of layers, which layers are chosen by them, and the files."""

import csv

import pytest
import torch
from sample_results import result_of
from tiny_models import tiny_model

from benchmarks import layer_budget
from benchmarks.layer_budget import budgets, kl_in_chunks, layer_gains
from ottfx import evaluation
from ottfx.results import Variant, write_results
from ottfx.teacher_forcing import reference_log_probs

TOKENS, START = 420, 300


@pytest.fixture
def world():
    model = tiny_model("llama")
    ids = torch.arange(TOKENS).unsqueeze(0) * 7 % 100 + 1
    return model, ids, reference_log_probs(model, ids, START)


def test_kl_in_chunks_is_about_that_of_one_token_at_a_time(world):
    model, ids, reference = world
    kl = kl_in_chunks(model, ids, reference, {1: 4})
    variant = Variant(label="", options={"scheme": "ott+", "bits": 2, "layer_bits": {1: 4}, "lower": "eager"})
    (result,) = evaluation.evaluate(model, ids, [variant], num_tokens=TOKENS, start=START)
    assert kl.shape == (TOKENS - START,)
    assert kl.mean().item() == pytest.approx(result.mean_kl, rel=0.3)


def test_gains_are_how_far_kl_falls(world):
    model, ids, reference = world
    rows = layer_gains(model, ids, START, 2)
    plain, wide = (kl_in_chunks(model, ids, reference, bits).mean().item() for bits in ({}, {1: 4}))
    assert [row["layer"] for row in rows] == [0, 1]
    assert rows[1]["gain"] == pytest.approx(plain - wide, rel=1e-3) and plain > wide
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in rows)


def test_layers_of_greatest_gain_are_chosen_at_equal_bits():
    found = budgets([0.3, -0.2, 0.1, 0.0, 0.5, 0.2, 0.0])
    assert list(found.values()) == [{0: 3, 1: 3, 5: 3, 6: 3}, {0: 3, 2: 3, 4: 3, 5: 3}, {0: 4, 4: 4}]
    assert all(sum(bits - 2 for bits in layer_bits.values()) == 4 for layer_bits in found.values())
    assert list(found)[2] == "2 of greatest gain: layers 0, 4 at 4 bits"


def test_a_run_writes_gains_and_rows(tmp_path, monkeypatch):
    def measured(variants, *conditions, fresh):
        assert fresh and [variant.options.get("layer_bits", {}) for variant in variants] == [
            {},
            *budgets(gains).values(),
        ]
        results = [result_of(variant.label, [0.1, 0.2]) for variant in variants]
        write_results(results, conditions[-1])
        return results

    gains = [0.1, 0.4, 0.2, 0.3]
    rows = [{"layer": layer, "gain": gain} for layer, gain in enumerate(gains)]
    asked = []
    monkeypatch.setattr(layer_budget, "layer_gains", lambda model, *others: asked.append(others) or rows)
    monkeypatch.setattr(layer_budget, "run_evaluation", measured)
    out = tmp_path / "budget"
    arguments = ["--model", "random-qwen2", "--tokens", "50", "--gain-tokens", "30", "--start", "20", "--out", str(out)]
    assert layer_budget.main(arguments) == 0
    ((ids, *others),) = asked
    assert ids.shape == (1, 30) and others == [20, 4]
    with out.with_suffix(".csv").open(newline="") as lines:
        assert [row["kl_change"] for row in csv.DictReader(lines)] == ["0.0"] * 4
    with (tmp_path / "budget-gains.csv").open(newline="") as lines:
        assert [float(row["gain"]) for row in csv.DictReader(lines)] == gains
