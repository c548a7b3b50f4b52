"""Which layer loses an answer: the cache that questions are asked of, and the rows of a run."""

import csv

import pytest
import torch

from benchmarks import lost_lines
from benchmarks.lost_lines import dense_keys, give_back
from ottfx import mixed_words


def test_the_storage_gives_back_what_it_rounds_and_the_window_nearly_as_it_was():
    torch.manual_seed(0)
    key, value = (torch.randn(2, 2, 300, 64) for _ in range(2))
    read = give_back(5, (key, value))
    for rows, exact in zip(read, (key, value), strict=True):
        errors = (rows - exact).square().mean((0, 1, 3))
        assert 0.02 < errors[:256].mean() < 0.4 and errors[256:].max() < 1e-3


def test_the_keys_of_one_layer_or_of_one_head_are_as_they_were():
    dense, stored = ((torch.full((1, 3, 4, 8), number), torch.full((1, 3, 4, 8), -number)) for number in (1.0, 2.0))
    assert dense_keys(7)(6, dense, stored) is stored
    key, value = dense_keys(7)(7, dense, stored)
    assert torch.equal(key, dense[0]) and torch.equal(value, stored[1])
    key, value = dense_keys(7, head=1)(7, dense, stored)
    assert key[0, :, 0, 0].tolist() == [2.0, 1.0, 2.0] and torch.equal(value, stored[1])
    assert (stored[0] == 2.0).all(), "what the storage gives back is asked again"


def test_a_run_writes_a_row_for_each_layer_and_for_the_heads_of_one(tmp_path):
    steep, out = mixed_words.STEEP, tmp_path / "lost"
    assert lost_lines.main(["--model", "random-qwen2", "--samples", "2", "--out", str(out)]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["as_it_was"] for row in rows]
    assert names[:5] == ["everything", "nothing", "all keys", "all values", "nothing"]
    assert names[5:9] == [f"keys of layer {layer}" for layer in range(4)] and len(names) == 11
    kl = {(row["widths"], row["as_it_was"]): float(row["kl"]) for row in rows}
    assert kl["", "everything"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < kl["both sets", "all keys"] < kl["both sets", "nothing"]
    assert all(row["asked"] == "2" for row in rows)
    assert mixed_words.STEEP == steep
