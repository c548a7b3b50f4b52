"""Continuing a run that was broken off: what is kept, what is measured again, what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sample_results import result_of
from tiny_models import random_tokens, tiny_model
from typer.testing import CliRunner

import ottfx.models
from ottfx.cli import app
from ottfx.earlier_results import check_same_conditions, find_finished, read_results
from ottfx.errors import ArtifactError, ConfigError
from ottfx.evaluation import evaluate
from ottfx.results import Variant, write_results
from ottfx.retrieval import Score


def variants(*labels):
    return [Variant(label=label, options={"bits": 2, "exempt_layers": (0, 1)}) for label in labels]


def measure(wanted, **arguments):
    return evaluate(tiny_model("llama"), random_tokens(1, 64), wanted, num_tokens=48, start=32, **arguments)


def test_results_come_back_as_they_were(tmp_path):
    written = [result_of("a b/c", [0.1, 0.2, 0.4, 0.1]), result_of("d", [0.3] * 4)]
    written[1] = dataclasses.replace(written[1], tasks={"copy": Score(right=3, asked=8)}, options={"bits": 3})
    write_results(written, tmp_path / "q")
    read = read_results(tmp_path / "q")
    assert read == read_results(tmp_path / "q.json") == written
    assert "3/8" in (tmp_path / "q.csv").read_text()
    for before, after in zip(written, read, strict=True):
        assert torch.equal(before.metrics.kl, after.metrics.kl) and after.metrics.agrees.dtype == torch.bool


def test_no_file_is_no_result(tmp_path):
    assert read_results(tmp_path / "none") == []


def test_results_without_their_arrays_are_not_kept(tmp_path):
    results = [result_of("a", [0.1, 0.2]), result_of("b", [0.3, 0.6])]
    write_results(results, tmp_path / "q")
    # As a run leaves it that was broken off between the two files: the arrays of b are newer than its numbers.
    arrays = dict(np.load(tmp_path / "q.npz"))
    np.savez_compressed(tmp_path / "q.npz", **arrays | {"b/kl": arrays["b/kl"] + 1})
    assert [r.label for r in read_results(tmp_path / "q")] == ["a"]
    (tmp_path / "q.npz").write_bytes(b"half of an archive")
    with pytest.raises(ArtifactError, match="cannot be continued .*KeyError: 'a/kl'"):
        read_results(tmp_path / "q")


@pytest.mark.parametrize("text", ["{", '[{"label": "a"}]', "3"])
def test_something_else_in_the_file_is_refused(tmp_path, text):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be continued .*--fresh"):
        read_results(tmp_path / "q")


def test_a_broken_run_continues_and_measures_only_the_rest(dense_compile, tmp_path):
    first = measure(variants("a"))
    write_results(first, tmp_path / "q")
    dense_compile.clear()
    new = []
    results = measure(variants("a", "b"), earlier=read_results(tmp_path / "q"), on_result=new.append)
    assert len(dense_compile) == 1
    assert [r.label for r in results] == ["a", "b"] and [r.label for r in new] == ["b"]
    assert results[0] == first[0]


def test_other_conditions_are_refused(dense_compile):
    earlier = measure(variants("a"))
    for name, other in (("tokens", 40), ("tokens_sha256", "00"), ("dtype", "bfloat16"), ("sources", "other code")):
        conditions = dataclasses.replace(earlier[0].conditions, **{name: other})
        changed = [dataclasses.replace(earlier[0], conditions=conditions)]
        with pytest.raises(ConfigError, match=f"Got {name}: {other!r} then"):
            measure(variants("a"), earlier=changed)
    check_same_conditions(earlier, dataclasses.replace(earlier[0].conditions, date="tomorrow"))


def test_a_result_that_lacks_something_is_measured_again():
    asked = dataclasses.replace(result_of("a", [0.1]), tasks={"copy": Score(right=3, asked=8)})
    wanted = Variant(label="a", options={})
    assert find_finished([asked], wanted, {}) is asked
    assert find_finished([asked], wanted, {}, sqnr=True) is None
    assert find_finished([asked], wanted, {"copy": [None] * 8}) is asked
    assert find_finished([asked], wanted, {"copy": [None] * 9}) is None
    assert find_finished([asked], wanted, {"lines": [None] * 8}) is None
    assert find_finished([asked], Variant(label="b", options={}), {}) is None
    with pytest.raises(ConfigError, match="label must stand for the same options"):
        find_finished([asked], Variant(label="a", options={"bits": 3}), {})


def test_labels_must_differ():
    with pytest.raises(ConfigError, match="labels of variants must differ"):
        measure(variants("a", "a"))


def test_command_continues_its_file_or_starts_anew(dense_compile, monkeypatch, tmp_path):
    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=random_tokens(1, 64))

    monkeypatch.setattr(ottfx.models, "load_smollm2", lambda dtype, notify: (tiny_model("llama"), tokenizer))

    def run(*arguments):
        dense_compile.clear()
        command = ["eval", "--tokens", "48", "--start", "32", "--device", "cpu", "--out", str(tmp_path / "q")]
        done = CliRunner().invoke(app, [*command, *arguments])
        measured = [options["scheme"] for options in dense_compile]
        return done, measured, [row["label"] for row in json.loads((tmp_path / "q.json").read_text())]

    assert run("--schemes", "ott")[1:] == (["ott"], ["ott 2-bit"])
    done, *rest = run("--schemes", "ott,kivi")
    assert rest == [["kivi"], ["ott 2-bit", "kivi 2-bit"]] and "kept from" in done.output
    done, *rest = run("--schemes", "none", "--start", "40")
    assert done.exit_code == 1 and "start: 32 then, 40 now" in done.output
    assert rest == [[], ["ott 2-bit", "kivi 2-bit"]]
    done, *rest = run("--schemes", "none", "--out", str(tmp_path / "q.xlsx"))
    assert done.exit_code == 1 and "must end in one of" in done.output and rest[0] == []
    assert run("--schemes", "none", "--start", "40", "--fresh")[1:] == (["none"], ["none"])
