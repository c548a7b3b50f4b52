"""Results in files: the formats, the comparison with the study, the command that writes them."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
from sample_results import result_of
from tiny_models import random_tokens, tiny_model
from typer.testing import CliRunner

from ottfx.errors import ConfigError
from ottfx.eval_command import default_variants
from ottfx.registry import make_config
from ottfx.results import csv_table, json_text, markdown_table, write_results
from ottfx.study import EQUAL_BITS, STUDY, study_table, study_variants


def test_results_survive_json_and_csv():
    results = [result_of("a", [0.1, 0.2]), result_of("b", [0.3, 0.6])]
    loaded = json.loads(json_text(results))
    assert [row["mean_kl"] for row in loaded] == [r.mean_kl for r in results]
    assert loaded[0]["conditions"] == dataclasses.asdict(results[0].conditions)
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [float(row["top1"]) for row in rows] == [1.0, 0.5]
    assert rows[1]["label"] == "b" and rows[1]["model"] == "tiny" and "metrics" not in rows[1]


def test_numbers_that_do_not_exist_are_null_in_json():
    (row,) = json.loads(json_text([result_of("a", [0.1])]), parse_constant=pytest.fail)
    assert row["kl_drift"] is None and row["mean_kl"] == pytest.approx(0.1)


def test_markdown_says_which_layers_stayed_dense():
    mixed = dataclasses.replace(result_of("a", [0.1]), quantized_layers=3, layers=18)
    assert markdown_table([mixed, mixed]).count("3 of 18 layers are stored by the schemes") == 1
    assert "layers are stored" not in markdown_table([result_of("a", [0.1])])


def test_markdown_states_the_conditions_once():
    table = markdown_table([result_of("a", [0.1, 0.2]), result_of("b", [0.3, 0.6])])
    assert "| a | 3.00 | 3.50 | 2.60 | 0.1500 | 0.0000 to 1.0000 | 0.199 |  | 1.000 | 1.105 |" in table
    assert table.count("tiny, float32 on CPU") == 1 and "positions 5 to 8 are scored" in table


def test_write_results_by_suffix(tmp_path):
    results = [result_of("a", [0.1])]
    assert [f.name for f in write_results(results, tmp_path / "new" / "q")] == ["q.npz", "q.json", "q.csv", "q.md"]
    assert [f.name for f in write_results(results, tmp_path / "only.csv")] == ["only.csv"]
    assert json.loads((tmp_path / "new" / "q.json").read_text())[0]["label"] == "a"
    with pytest.raises(ConfigError, match="must end in one of"):
        write_results(results, tmp_path / "q.xlsx")


def test_study_table_compares_with_the_anchor():
    ott, kivi = EQUAL_BITS
    anchor = {row.variant.label: row.anchor for row in STUDY}[ott].mean_kl
    near = study_table([result_of(ott, [anchor * 1.1] * 128), result_of(kivi, [0.38] * 128)])
    assert "+10.0%, within 20%" in near and "(paired): better." in near
    far = study_table([result_of(ott, [anchor * 2] * 128), result_of(kivi, [0.38] * 128)])
    assert "+100.0%, OUTSIDE 20%" in far and "(paired): worse." in far
    assert "paired" not in study_table([result_of(ott, [0.1] * 128)])


def test_study_labels_are_unique_and_selectable():
    labels = [row.variant.label for row in STUDY]
    assert len(set(labels)) == len(labels) and set(EQUAL_BITS) <= set(labels)
    assert [v.label for v in study_variants([labels[2], labels[0]])] == [labels[0], labels[2]]


def test_default_variants_of_the_command():
    options = [v.options for v in default_variants([" none", "ott", ""], ["4"])]
    assert options == [{"scheme": "none"}, {"scheme": "ott", "bits": 4}]
    # A label says the width also where there is only one: runs of several widths may end in one file.
    assert [v.label for v in default_variants(["ott"], ["4"])] == ["ott 4-bit"]
    variants = default_variants(["none", "ott", "kivi"], ["2", " 3"])
    assert [v.label for v in variants] == ["none", "ott 2-bit", "ott 3-bit", "kivi 2-bit", "kivi 3-bit"]
    assert variants[2].options == {"scheme": "ott", "bits": 3}
    with pytest.raises(ConfigError, match="scheme must be one of .* Got 'unheard'"):
        default_variants(["unheard"])
    with pytest.raises(ConfigError, match="at least one scheme"):
        default_variants([" "])
    for widths in ([], ["two"], ["2", "-3"]):
        with pytest.raises(ConfigError, match="must be whole numbers"):
            default_variants(["ott"], widths)


def test_variants_with_other_options():
    variants = default_variants(["none", "ott", "ott+"], ["2"], ["range_search=False", "group_size=64"])
    assert [v.label for v in variants] == [
        "none", "ott 2-bit", "ott 2-bit group_size=64",
        "ott+ 2-bit", "ott+ 2-bit range_search=False", "ott+ 2-bit group_size=64",
    ]  # fmt: skip
    assert variants[4].options == {"scheme": "ott+", "bits": 2, "range_search": False}
    assert variants[5].options["group_size"] == 64
    both = default_variants(["ott+"], ["2"], ["group_size=64 range_search=False"])[1]
    assert both.label == "ott+ 2-bit group_size=64 range_search=False"
    assert both.options == {"scheme": "ott+", "bits": 2, "group_size": 64, "range_search": False}
    layers = default_variants(["ott+"], ["2"], ["layer_bits={0:3,29:(4,2)}"])[1]
    assert make_config(**layers.options).layer_bits == ((0, 3), (29, (4, 2)))
    lower = default_variants(["ott+"], ["2"], ["range_search=false rotate_values=TRUE"])[1]
    assert lower.options == {"scheme": "ott+", "bits": 2, "range_search": False, "rotate_values": True}
    assert default_variants(["ott"], ["2"], ["replacement=group"])[1].options["replacement"] == "group"
    for change, said in (("group_size", "NAME=VALUE"), ("unheard=3", "unheard")):
        with pytest.raises(ConfigError, match=said):
            default_variants(["ott"], ["2"], [change])


def test_command_writes_what_it_measured(dense_compile, monkeypatch, tmp_path):
    import typer

    import ottfx.models
    from ottfx.eval_command import register

    def load(dtype, notify):
        notify("loading")
        return tiny_model("llama"), lambda text, return_tensors: SimpleNamespace(input_ids=random_tokens(1, 40))

    monkeypatch.setattr(ottfx.models, "load_smollm2", load)
    app = typer.Typer()
    app.command("other")(lambda: None)
    register(app)
    arguments = "eval --schemes ott --tokens 40 --start 32 --device cpu --lower eager --out".split()
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "q.json")])
    assert done.exit_code == 0, done.output
    assert dense_compile == [{"scheme": "ott", "bits": 2, "lower": "eager"}]
    (row,) = json.loads((tmp_path / "q.json").read_text())
    assert row["label"] == "ott 2-bit" and row["conditions"]["model"] == "SmolLM2-135M-Instruct"
    assert "mean KL" in done.output
    refused = CliRunner().invoke(app, ["eval", "--dtype", "int8"])
    assert refused.exit_code == 1 and "Got 'int8'" in refused.output
