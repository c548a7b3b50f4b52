"""Pictures of results: which are drawn from what, that they show the data, and what is said without matplotlib."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from sample_results import metrics_of, result_of
from tiny_models import random_tokens, tiny_model
from typer.testing import CliRunner

import ottfx.models
from ottfx import plots
from ottfx.cache_fidelity import Fidelity
from ottfx.cli import app
from ottfx.errors import ConfigError

pytest.importorskip("matplotlib", reason="the pictures need the extra `plots`")

LAYERS, HEADS, TOKENS, CHANNELS = 3, 2, 300, 8


def fidelity_of(kept: list[int]) -> Fidelity:
    """Tokens of norm 1 in which those of layer 1, head 1 that are kept have a small one, and widen all channels."""
    norms = torch.ones(LAYERS, HEADS, TOKENS)
    kept_exact = torch.zeros(LAYERS, HEADS, TOKENS, dtype=torch.bool)
    for token in kept:
        norms[1, 1, token] = 0.1
        kept_exact[1, 1, token] = True
    ranges = torch.full((2, LAYERS, HEADS, CHANNELS), 4.0)
    ranges[1, 1, 1, 2:] = 1.0
    paid = kept_exact.any(-1) * 0.5
    sqnr = torch.full((3, LAYERS, HEADS), 9.0)
    return Fidelity(
        stored=sqnr, decoded=sqnr - 1, kept_exact=kept_exact, kept_attention=paid, ranges=ranges, key_norms=norms.half()
    )


@pytest.fixture
def results():
    kept, plain = result_of("ott 2-bit", [0.1, 0.2] * 40), result_of("kivi 2-bit", [0.3, 0.5] * 40)
    return [
        dataclasses.replace(result_of("none", [1e-9] * 80)),
        dataclasses.replace(kept, fidelity=fidelity_of([0, 7, 150])),
        dataclasses.replace(plain, bits_8k=3.2, fidelity=fidelity_of([])),
    ]


def test_all_pictures_are_written_beside_the_results(results, tmp_path):
    files = plots.draw_plots(results, tmp_path / "new" / "q.json")
    assert [f.name for f in files] == [f"q-{name}.png" for name in plots.PICTURES]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_pictures_without_data_are_left_out(results, tmp_path):
    bare = [dataclasses.replace(r, fidelity=None) for r in results]
    assert [f.name for f in plots.draw_plots(bare, tmp_path / "q")] == ["q-pareto.png", "q-kl-by-position.png"]
    assert plots.draw_plots(results[:1], tmp_path / "q") == []
    no_pool = plots.draw_plots(results[2:], tmp_path / "q")
    assert [f.name for f in no_pool] == ["q-pareto.png", "q-sqnr-by-layer.png", "q-kl-by-position.png"]


def test_the_front_joins_what_nothing_beats(results):
    worse = dataclasses.replace(result_of("worse", [0.4] * 80), bits_8k=3.1)
    good = dataclasses.replace(result_of("good", [0.01] * 80), bits_8k=3.1)
    (ax,) = plots.pareto([*results, worse, good]).axes
    front = ax.lines[-1]
    assert front.get_xdata().tolist() == [2.6, 3.1]
    assert front.get_ydata().tolist() == pytest.approx([0.15, 0.01])
    # What lost nothing has no place on a logarithmic axis.
    assert {text.get_text() for text in ax.texts} == {"ott 2-bit", "kivi 2-bit", "worse", "good"}


def test_kept_tokens_are_marked_where_they_are(results):
    map_ax, head_ax, *_ = plots.key_norms(results).axes
    row = 1 * HEADS + 1
    assert map_ax.collections[0].get_offsets().tolist() == [[t, row + 0.5] for t in (0, 7, 150)]
    image = map_ax.images[0].get_array()
    # 300 tokens in columns of two: the smaller of both counts.
    assert image.shape == (LAYERS * HEADS, 150)
    assert image[row, [0, 3, 75]].tolist() == pytest.approx([-3.32] * 3, abs=0.01) and image[row, 1] == 0
    assert head_ax.get_title(loc="left") == "One head: layer 1, head 1"
    assert head_ax.lines[1].get_xdata().tolist() == [0, 7, 150]


def test_ranges_are_those_of_the_head_that_narrows_most(results):
    head_ax, layer_ax = plots.channel_ranges(results).axes
    assert head_ax.get_title(loc="left").startswith("Layer 1, head 1")
    heights = [[bar.get_height() for bar in bars] for bars in head_ax.containers]
    assert heights[0] == [4.0] * CHANNELS and sorted(heights[1]) == [1.0] * (CHANNELS - 2) + [4.0] * 2
    mean, narrowest = ([y for y in line.get_ydata().tolist() if y == y] for line in layer_ax.lines)
    assert (mean, narrowest) == ([(2 * 100 + 6 * 25) / 8], [25.0])


def test_attention_stands_beside_the_number_of_tokens(results):
    (ax,) = plots.attention_share(results).axes
    assert ax.lines[0].get_ydata().tolist() == [0, 0, 0, 50, 0, 0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0, 100 * 3 / (HEADS * TOKENS), 0])


def test_errors_by_layer_and_position(results):
    by_layer = plots.sqnr_by_layer(results)
    for ax in by_layer.axes:
        solid, dotted = ax.lines[:2]
        assert solid.get_ydata().tolist() == [9.0] * LAYERS and dotted.get_ydata().tolist() == [8.0] * LAYERS
    rising = dataclasses.replace(results[1], metrics=metrics_of([0.1] * 40 + [0.9] * 40))
    (line,) = plots.kl_by_position([rising]).axes[0].lines
    assert line.get_ydata()[[0, -1]].tolist() == pytest.approx([0.1, 0.9])
    assert line.get_xdata()[0] > rising.conditions.start


def test_without_matplotlib_nothing_is_measured(dense_compile, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ConfigError, match=r"Run pip install 'ottfx\[plots\]'"):
        plots.draw_plots([], tmp_path / "q")
    done = CliRunner().invoke(app, ["eval", "--plots", "--out", str(tmp_path / "q")])
    assert done.exit_code == 1 and "pip install 'ottfx[plots]'" in done.output
    assert dense_compile == []


def test_command_draws_and_measures_what_pictures_need(dense_compile, monkeypatch, tmp_path):
    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=random_tokens(1, 64))

    monkeypatch.setattr(ottfx.models, "load_smollm2", lambda dtype, notify: (tiny_model("llama"), tokenizer))
    command = ["eval", "--plots", "--schemes", "ott", "--tokens", "48", "--start", "32", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "q")])
    assert done.exit_code == 0, done.output
    assert "sqnr" in json.loads((tmp_path / "q.json").read_text())[0]
    # The compiler stand-in loses nothing: there is nothing to draw.
    assert not list(tmp_path.glob("*.png"))
