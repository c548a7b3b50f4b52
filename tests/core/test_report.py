"""The documentation's tables: those committed are what the results files give, and blocks are filled as promised."""

import csv

import pytest

from benchmarks import report
from benchmarks.report import BlockError, filled
from benchmarks.tables import generate
from benchmarks.tables.markdown import groups, table

CARD = {"card": "NVIDIA Test", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "date": "2026-11-22"}
DENSE = {
    "shape": "llama-2-7b", "layers": 2, "batch_size": 8, "prompt": 7936, "new_tokens": 256,
    "configuration": "dynamic-eager", "cache_bytes": 4_000_000_000, "dense_cache_bytes": 4_000_000_000,
    "prefill_peak_bytes": "", "decode_peak_bytes": "",
}  # fmt: skip
PACKED = DENSE | {"configuration": "ottfx", "cache_bytes": 500_000_000}
BLOCK = "before\n<!-- generated: {} -->\nstale 1.23x\n<!-- end -->\nafter\n"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / report.FOLDER / "memory_x.csv", [DENSE | CARD, PACKED | CARD])
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(BLOCK.format("memory from memory_x.csv"))
    (tmp_path / "docs" / "a.md").write_text(BLOCK.format("memory from memory_x.csv"))
    return tmp_path


def test_committed_tables_are_those_of_the_results_files():
    assert report.main(["--check"]) == 0, "run `python -m benchmarks.report`"


def test_readme_has_the_headline_tables():
    text = (report.ROOT / "README.md").read_text()
    tables = {match["table"] for match in report.BEGIN.finditer(text)}
    assert tables >= {"quality-schemes", "memory", "attention-headline"}


def test_a_block_gets_the_table_its_conditions_and_a_link(root):
    assert report.main([], root) == 0
    lines = (root / "README.md").read_text().splitlines()
    assert lines[0] == "before" and lines[-2:] == ["<!-- end -->", "after"]
    assert "| bytes of the cache, everything counted | 4.00 GB | 0.50 GB | 8.00x smaller |" in lines
    assert "| peak over the weights, prompt included |  |  |  |" in lines
    assert lines[-3].startswith("NVIDIA Test, torch 2.11.0, triton 3.6.0, transformers 5.17.0, 2026-11-22; ")
    assert lines[-3].endswith("[memory_x.csv](benchmarks/results/memory_x.csv).")
    assert "(../benchmarks/results/memory_x.csv)" in (root / "docs" / "a.md").read_text()
    assert "stale" not in "\n".join(lines)


def test_check_sees_one_changed_figure_and_writes_nothing(root, capsys):
    assert report.main(["--check"], root) == 1
    assert "stale" in (root / "README.md").read_text()
    report.main([], root)
    assert report.main(["--check"], root) == 0
    write(root / report.FOLDER / "memory_x.csv", [DENSE | CARD, PACKED | CARD | {"cache_bytes": 500_000_000 * 2}])
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    out = capsys.readouterr().out
    assert "-| bytes of the cache, everything counted | 4.00 GB | 0.50 GB | 8.00x smaller |" in out
    assert "+| bytes of the cache, everything counted | 4.00 GB | 1.00 GB | 4.00x smaller |" in out


def test_what_was_not_measured_says_what_measures_it(root):
    text = filled(BLOCK.format("append from append_x.csv"), root / "README.md", root / report.FOLDER)
    assert "Not measured yet: `python -m benchmarks.append` makes `append_x.csv`." in text


@pytest.mark.parametrize(
    "text, message",
    [
        (BLOCK.format("speed from a.csv"), "must be one of"),
        (BLOCK.format("memory"), "expected"),
        ("<!-- generated: memory from a.csv -->\n", "has no"),
        ("<!-- generated: memory from a.csv -->\n" * 2 + "<!-- end -->\n", "has no"),
        ("<!-- end -->\n", "without a block"),
    ],
)
def test_a_block_that_cannot_be_filled_is_an_error(root, text, message):
    with pytest.raises(BlockError, match=message):
        filled(text, root / "README.md", root / report.FOLDER)


def test_conditions_of_several_days_are_all_told():
    rows = [CARD, CARD, CARD | {"date": "2026-11-23"}]
    assert report.conditions(rows).count("NVIDIA Test") == 2


STEP = {
    "card": "x", "shape": "llama-2-7b", "layers": "8", "batch_size": "96", "start": "prompt 160", "new_tokens": "338",
    "error": "", "largest": "", "stopped_by": "", "device_ms": "", "floor_ms": "2", "idle_ms": "", "append_ms": "",
    "peak_bytes": "", "tokens_per_s": "1000", "cache_bytes": "8000000000",
}  # fmt: skip
GENERATED = [
    STEP | {"configuration": "dynamic-eager", "step_ms": "40.0"},
    STEP | {"configuration": "static-compiled", "step_ms": "4.5"},
    STEP | {"configuration": "dynamic-compiled", "step_ms": "", "error": "OutOfMemoryError: CUDA"},
    STEP | {"configuration": "quanto", "step_ms": "1.0"},
    STEP
    | {"configuration": "ottfx-graphs", "step_ms": "3.0", "cache_bytes": "2000000000"}
    | {"device_ms": "2.5", "idle_ms": "0.5", "append_ms": "0.06"},
    STEP | {"configuration": "ottfx", "step_ms": "9.0"},
    STEP | {"configuration": "ottfx", "step_ms": "20.0", "batch_size": "700", "largest": "batch_size"},
]


def test_the_headline_takes_the_fastest_of_each_side_and_no_peer_of_fewer_bits():
    (line,) = generate.headline(GENERATED).splitlines()[2:]
    assert line.startswith("| llama-2-7b, 8 layers | 96 x prompt 160 + 338 | 4.50 (static-compiled) |")
    assert line.endswith("| 1.00 (quanto) | 3.00 (ottfx-graphs) | 1.50x | 4.00x |")
    (line,) = generate.headline([row for row in GENERATED if row["configuration"] != "quanto"]).splitlines()[2:]
    assert "| not measured | 3.00 (ottfx-graphs) |" in line


def test_steps_and_largest_sizes_are_two_tables():
    text = generate.steps(GENERATED)
    assert "| 96 x prompt 160 + 338 | ottfx-graphs | 3.00 | 2.00 | 2.50 | 0.50 | 2.0% | 1,000 | 2.00 |  |" in text
    assert "| dynamic-compiled | fails: OutOfMemoryError: CUDA |" in text and "700" not in text
    assert len(generate.largest(GENERATED).splitlines()) == 3
    assert "| 700 x prompt 160 + 338 | batch | ottfx | 20.00 |" in generate.largest(GENERATED)


def test_a_prefill_is_compared_with_the_fastest_in_16_bits():
    row = STEP | {"prompt": "8192", "batch_size": "4"}
    times = {"dynamic-eager": "300", "ottfx": "210", "dynamic-compiled": "220", "fixed-compiled": "200"}
    text = generate.prefill([row | {"configuration": name, "ms": ms} for name, ms in times.items()])
    assert "| 4 x 8,192 | ottfx | 210.0 | +5.0% |" in text


def test_rows_are_grouped_in_the_order_of_the_file():
    rows = [{"a": "2"}, {"a": "1"}, {"a": "2", "b": "x"}]
    assert groups(rows, "a") == [[rows[0], rows[2]], [rows[1]]]
    assert table(["x"], []) == "Not measured yet."
    assert table(["x"], [["1"]]) == "| x |\n| --- |\n| 1 |"
