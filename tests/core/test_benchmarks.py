"""Every benchmark in its tiny form on the CPU: its rows are there, and what can be checked without a GPU is right."""

import csv
import math
from importlib.util import find_spec

import pytest
import torch

from benchmarks import append, artifact, attention, compile_time, decode_plan, generate, memory, prefill
from benchmarks.configurations import CONFIGURATIONS, Quantization, configured, fill_cache, new_cache
from benchmarks.packed_state import bytes_read, random_halves
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.shapes import SHAPES, random_model
from ottfx.kv_tensor import KVTensor
from ottfx.registry import make_config
from ottfx.schemes.base import PAGE

FORWARDS = ["*/dynamic-eager", "*/ottfx", "*/dynamic-compiled"]


def only(*patterns):
    return [word for pattern in patterns for word in ("--only", pattern)]


def run(module, tmp_path, *arguments):
    """The rows of a tiny run, in which nothing may fail."""
    out = tmp_path / "results"
    assert module.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and not any(row.get("error") for row in rows), rows
    assert all(row["torch"] == torch.__version__ and row["card"].startswith("CPU") for row in rows)
    assert len((tmp_path / "results.md").read_text().splitlines()) > len(rows) + 2
    return rows


def test_attention(tmp_path):
    rows = run(attention, tmp_path, *only("*/2x256/q1/*"))
    assert [row["what"] for row in rows[:3]] == ["sdpa-math", "2b-g128-packed", "2b-g128-complete"]
    assert len(rows) == 1 + 3 * 3 * 2 + 2
    peer, packed, complete, plus = rows[:4]
    assert plus["what"] == "2b-g128-plus"
    # Its values have no zero point.
    assert float(plus["bytes_a_token_and_head"]) < float(complete["bytes_a_token_and_head"])
    assert float(peer["bytes_a_token_and_head"]) == 2 * 16 * 4
    # Codes, key constants of 16 channels by 128 tokens, value constants.
    assert float(packed["bytes_a_token_and_head"]) == 2 * 16 * 2 / 8 + 4 * 16 / 128 + 4
    assert float(complete["bytes_a_token_and_head"]) > float(packed["bytes_a_token_and_head"])
    ratio = float(peer["us"]) / float(packed["us"])
    assert math.isclose(float(packed["speedup_over_best_peer"]), ratio, rel_tol=1e-6)


def test_decode_plan(tmp_path):
    rows = run(decode_plan, tmp_path, *only("*/plus/*"))
    assert [row["cut"] for row in rows] == list(decode_plan.CUTS)
    assert float(rows[0]["over_chosen"]) == 1.0 and all(float(row["us"]) > 0 for row in rows)


def test_cuts_change_the_plan_that_the_launcher_uses():
    affine_attend = pytest.importorskip("ottfx.kernels.affine_attend")
    sizes = dict(pairs=8, num_kv_heads=8, rows=4, head_dim=128, bits=(2, 2), group_size=128, ring_rows=160, pages=1024)
    choose = affine_attend.decode_plan
    chosen = choose(**sizes)
    splits, parts = chosen.splits, chosen.window_parts
    want = [(splits, parts), (splits // 2, parts), (splits * 2, parts), (splits, 1), (splits, 2), (splits, 3)]
    for cut, expected in zip(decode_plan.CUTS.values(), want, strict=True):
        with decode_plan.cut_by(cut, "cuda") as plans:
            affine_attend.decode_plan(**sizes)
        assert [(plan.splits, plan.window_parts) for plan in plans] == [expected]
        assert plans[0].most_parts == plans[0].splits + plans[0].window_parts
    assert affine_attend.decode_plan is choose


def test_append(tmp_path):
    rows = run(append, tmp_path, *only("*/ott-2bit-pool3+3", "*/kivi-2bit"))
    assert [(row["kind"], row["scheme"]) for row in rows] == [
        (kind, scheme) for kind in ("encode", "decode") for scheme in ("ott-2bit-pool3+3", "kivi-2bit")
    ]
    for row in rows[2:]:
        step, flush, mean = (float(row[name]) for name in ("step_us", "flush_us", "us"))
        assert row["steps_a_flush"] == "128"
        assert math.isclose(mean, (127 * step + flush) / 128, rel_tol=1e-6)


@pytest.mark.parametrize("start", [[], ["--synthetic", "150"]], ids=["prompt", "synthetic"])
def test_generate(tmp_path, start):
    rows = run(generate, tmp_path, "--lower", "eager", *start, *only(*FORWARDS, "*/static-compiled"))
    assert [row["configuration"] for row in rows] == ["dynamic-eager", "ottfx", "dynamic-compiled", "static-compiled"]
    tokens = 150 + 6 - (0 if start else 1)
    dense, packed = rows[0], rows[1]
    assert int(dense["cache_bytes"]) == 2 * 2 * 2 * 2 * tokens * 16 * 4
    assert 0 < int(packed["cache_bytes"]) != int(dense["cache_bytes"])
    assert all(float(row["step_ms"]) > float(row["forward_ms"]) > 0 for row in rows)
    assert all(float(row["tokens_per_s"]) > 0 and row["graphs_compiled"] == "0" for row in rows)


def test_generate_at_several_and_at_the_largest_sizes(tmp_path):
    plots = ["--plots"] if find_spec("matplotlib") else []
    rows = run(generate, tmp_path, "--batch-size", "1,32", *plots, *only("*/dynamic-eager"))
    assert [row["batch_size"] for row in rows] == ["2", "3"]
    assert [file.name for file in tmp_path.glob("*.svg")] == [
        "results-tiny-2-layers-prompt-150-throughput.svg" for _ in plots
    ]
    (row,) = run(generate, tmp_path, "--search-batch", *only("*/dynamic-eager"))
    assert (row["batch_size"], row["largest"]) == ("4", "batch_size")
    (row,) = run(generate, tmp_path, "--search-length", "--synthetic", "100", *only("*/dynamic-eager"))
    assert (row["start"], row["largest"]) == ("synthetic 300", "start")
    assert int(row["cache_bytes"]) == 2 * 2 * 2 * 2 * (300 + 6) * 16 * 4
    with pytest.raises(SystemExit):
        generate.main(["--search-length"])


@pytest.mark.slow
def test_prefill(tmp_path):
    rows = run(prefill, tmp_path, "--lower", "eager", *only(*FORWARDS, "*/fixed-compiled"))
    names = ["dynamic-eager", "ottfx", "dynamic-compiled", "fixed-compiled"]
    assert [row["configuration"] for row in rows] == names
    assert all(float(row["ms"]) >= float(row["ms_min"]) > 0 for row in rows)


@pytest.mark.slow
def test_artifact(tmp_path):
    rows = run(artifact, tmp_path)
    assert [row["configuration"] for row in rows] == ["compiled", "compiled-warm", "artifact"]
    assert float(rows[2]["first_token_s"]) < float(rows[0]["first_token_s"]) / 10


def test_compile_time(tmp_path):
    (row,) = run(compile_time, tmp_path, "--lower", "eager", *only("*/ottfx"))
    assert float(row["first_step_s"]) > float(row["third_step_s"]) > 0
    assert float(row["warm_first_prompt_s"]) > 0


def test_memory(tmp_path):
    dense, packed = run(memory, tmp_path, "--lower", "eager")
    assert dense["cache_bytes"] == dense["dense_cache_bytes"] == packed["dense_cache_bytes"]
    assert int(packed["cache_bytes"]) < int(dense["cache_bytes"])
    assert dense["length"] == packed["length"] == "300"


def options(tmp_path, *arguments):
    return command_line(None, "x").parse_args(["--device", "cpu", "--out", str(tmp_path / "results"), *arguments])


def test_a_failed_row_tells_its_error_and_the_others_go_on(tmp_path):
    def fails():
        raise RuntimeError("no kernel\nfor this shape")

    cases = [Case(labels={"what": "a"}, measure=fails), Case(labels={"what": "b"}, measure=lambda: {"us": 1.5})]
    assert run_cases(cases, options(tmp_path)) == 0
    table = (tmp_path / "results.md").read_text()
    assert "| a | RuntimeError: no kernel |  |" in table and "| b |  | 1.5 |" in table
    assert run_cases(cases[:1], options(tmp_path)) == 1


def test_filters_and_the_time_limit(tmp_path, capsys):
    measured = []
    cases = [
        Case(labels={"n": n}, measure=lambda n=n: {"m": measured.append(n)}, quick=n == 1, default=n != 2)
        for n in range(4)
    ]
    for arguments, expected in (([], [0, 1, 3]), (["--quick"], [1]), (only("2", "[3-9]"), [2, 3])):
        measured.clear()
        assert run_cases(cases, options(tmp_path, *arguments)) == 0
        assert measured == expected
    measured.clear()
    assert run_cases(cases, options(tmp_path, "--list")) == 0
    assert measured == [] and capsys.readouterr().out.endswith("0\n1\n3\n")
    assert run_cases(cases, options(tmp_path, "--time-limit", "-1")) == 1
    assert measured == [] and "3 of 3 cases were not measured" in (tmp_path / "results.md").read_text()
    assert run_cases(cases, options(tmp_path, *only("nothing"))) == 1


@pytest.mark.parametrize("scheme, bits", [("ott", 2), ("ott", 3), ("kivi", 4)])
def test_random_storage_is_a_valid_cache(scheme, bits):
    config = make_config(scheme, bits).at_layer(5)
    halves = random_halves(
        config, batch_size=2, num_kv_heads=2, head_dim=32, length=700, dtype=torch.float32, device="cpu"
    )
    for half in halves:
        dense = half.read(700)
        assert dense.shape == (2, 2, 700, 32) and dense.isfinite().all()
        assert dense.std() > 0.1
    key, value = halves
    if scheme == "ott":
        marked = torch.signbit(value.tensors["value_scale"][:, :, :, 0]).flatten(2)
        assert marked.sum(-1).unique().tolist() == [3 + 16]
        assert (key.tensors["outlier_position"] >= 0).sum(-1).unique().tolist() == [3 + 16]
    assert bytes_read(halves) < sum(tensor.nbytes for half in halves for tensor in half.tensors.values())


@pytest.mark.parametrize("shape", ["tiny", "gemma"])
@pytest.mark.parametrize("name", ["ottfx", "dynamic-eager", "static-compiled"])
def test_a_synthetic_cache_continues_as_one_of_a_prompt(shape, name, monkeypatch):
    if shape == "gemma":
        fields = dict(sliding_window=64, query_pre_attn_scalar=16, num_key_value_heads=1)
        fields["layer_types"] = ["sliding_attention", "full_attention"]
        monkeypatch.setitem(SHAPES, "gemma", ("Gemma3TextConfig", SHAPES["tiny"][1] | fields))
    model = random_model(shape, device="cpu", dtype=torch.float32)
    way, quantization = CONFIGURATIONS[name], Quantization(lower="eager")
    ids = torch.ones(2, 1, dtype=torch.int64)
    with configured(model, way, quantization), torch.no_grad():
        past = new_cache(model, way, 310)
        fill_cache(past, model, way, quantization, batch_size=2, length=300)
        stored = [type(layer.keys) is KVTensor for layer in past.layers]
        assert stored == [name == "ottfx" and not layer.is_sliding for layer in past.layers]
        out = model(ids, past_key_values=past)
        assert int(past.get_seq_length()) == 301 and out.logits.isfinite().all()
        if name == "ottfx":
            assert past.layers[-1].keys.payload.half.shape.pages == 301 // PAGE + 1
