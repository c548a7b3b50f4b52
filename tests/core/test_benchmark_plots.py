"""Pictures of the benchmarks: which lines they have, and that they are drawn."""

import csv

import pytest

from benchmarks import attention, plots

CARD = {"card": "NVIDIA Test", "torch": "2.11.0", "date": "2026-11-22"}


def op(workload, what, us, query="q1"):
    return {"shape": "llama-3-8b", "workload": workload, "query": query, "what": what, "us": us, **CARD}


def step(batch_size, start, configuration, ms, error=""):
    return {
        "shape": "llama-3-8b", "layers": "8", "batch_size": batch_size, "start": f"synthetic {start}",
        "new_tokens": "256", "configuration": configuration, "step_ms": ms, "outside_ms": "1", "error": error,
        "cache_bytes": str(2 * int(start) * 10**6), "tokens_per_s": str(int(batch_size) * 100), **CARD,
    }  # fmt: skip


OPS = [
    op("8x32k", "2b-g128-complete", "80"),
    op("8x4k", "2b-g128-complete", "20"),
    op("8x32k", "sdpa-cudnn", "360"),
    op("8x32k", "sdpa-flash", ""),
    op("1x128k", "2b-g128-complete", "50"),
    op("8x4k", "2b-g128-complete", "21", query="q2"),
]
STEPS = [
    step("8", "2048", "ottfx", "3"),
    step("8", "1024", "ottfx", "2"),
    step("8", "1024", "dynamic-eager", "", error="OutOfMemoryError"),
    step("16", "1024", "ottfx", "4"),
]


def test_attention_is_drawn_against_length_where_two_were_measured():
    (picture,) = plots.pictures_of(OPS)
    assert picture.name == "llama-3-8b-batch-8-time"
    assert picture.lines == {
        "2b-g128-complete": [(4096, 20.0), (32768, 80.0)],
        "sdpa-cudnn": [(32768, 360.0)],
    }


def test_generation_is_drawn_against_length_and_against_batch():
    lines = {picture.name.removeprefix("llama-3-8b-8-layers-"): picture.lines for picture in plots.pictures_of(STEPS)}
    assert lines == {
        "batch-8-time": {"ottfx": [(1024, 2.0), (2048, 3.0)]},
        "batch-8-memory": {"ottfx": [(1024, 2.048), (2048, 4.096)]},
        "synthetic-1024-throughput": {"ottfx": [(8, 800.0), (16, 1600.0)]},
    }


def test_a_drawing_is_the_same_each_time_and_tells_its_conditions(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "attention_x.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(OPS[0]))
        writer.writeheader()
        writer.writerows(OPS)
    assert plots.main([str(file)]) == 0
    drawn = tmp_path / "attention_x-llama-3-8b-batch-8-time.svg"
    before = drawn.read_bytes()
    text = before.decode()
    assert all(word in text for word in ("sdpa-cudnn", "NVIDIA Test, torch 2.11.0, 2026-11-22", ">4k<", ">32k<"))
    plots.main([str(file)])
    assert drawn.read_bytes() == before


def test_one_size_is_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "x.csv"
    file.write_text(",".join(OPS[0]) + "\n" + ",".join(OPS[0].values()) + "\n")
    assert plots.main([str(file)]) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        attention.main(["--device", "cpu", "--tiny", "--plots"])
    assert "pip install 'ottfx[plots]'" in capsys.readouterr().err


def test_rows_of_another_benchmark_are_refused():
    with pytest.raises(ValueError, match="attention, generate or memory"):
        plots.pictures_of([{"kind": "encode", **CARD}])
