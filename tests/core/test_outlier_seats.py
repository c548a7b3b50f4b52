"""The comparison of who is kept apart: what a cache gives back, and what attention loses."""

import csv

import pytest
import torch

from benchmarks import outlier_seats
from benchmarks.outlier_seats import QUARTERS, WAYS, Layer, given_back, losses
from ottfx.dense_run import AskedLayer


def asked(key, value, query):
    held, queries = key.shape[1], query.shape[1]
    seen = torch.arange(held) <= torch.arange(held - queries, held).unsqueeze(-1)
    bias = torch.zeros(1, queries, held).masked_fill(~seen, -torch.inf)
    return AskedLayer(key=key, value=value, query=query, bias=bias, softmax_scale=32**-0.5)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    key, value = (torch.randn(2, 512, 32) + 3 * torch.randn(32) for _ in range(2))
    key[:, 200] = key[:, 300] = 0.01
    ends = [128 * quarter for quarter in QUARTERS]
    return Layer(index=3, at_quarters=[asked(key[:, :end], value[:, :end], torch.randn(4, 8, 32)) for end in ends])


def test_tokens_with_a_seat_are_nearly_exact_and_their_groups_better_off(layer):
    read = given_back(layer.index, WAYS["ott+"], layer.rows)
    assert [key.shape[1] for key, _ in read] == [128, 256, 384, 512]
    for rows, exact in zip(read[-1], layer.rows, strict=True):
        assert (rows - exact)[:, [200, 300]].abs().max() < 0.01 * exact.abs().max()
    without, _ = given_back(layer.index, WAYS["nobody"], layer.rows)[-1]
    errors = [(rows - layer.rows[0]).square()[:, 128:384].mean() for rows in (read[-1][0], without)]
    assert errors[0] < 0.8 * errors[1]


def test_losses_are_those_of_the_definition(layer):
    def changed(function):
        return [(function(asked.key), asked.value) for asked in layer.at_quarters]

    assert losses(layer, changed(torch.clone)) == ([0.0] * 4, [0.0] * 4)
    kl, error = losses(layer, changed(lambda key: key + 0.1 * torch.randn_like(key)))
    assert all(0 < one < 1 for one in (*kl, *error))
    key, _ = layer.rows
    query, heads = layer.at_quarters[-1].query, [rows.repeat_interleave(2, 0) for rows in (key, key * 0.5)]
    seen = torch.arange(512) <= torch.arange(504, 512).unsqueeze(-1)
    weights = ((query @ keys.transpose(-1, -2) / 32**0.5).exp() * seen for keys in heads)
    dense, other = (rows / rows.sum(-1, keepdim=True) for rows in weights)
    expected = torch.where(seen, dense * (dense / other).log(), 0.0).sum(-1).mean()
    assert losses(layer, changed(lambda key: key * 0.5))[0][3] == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_writes_a_row_for_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(outlier_seats, "WAYS", {name: WAYS[name] for name in ("ott+", "pool 3+3")})
    out = tmp_path / "seats"
    assert outlier_seats.main(["--model", "random-qwen2", "--tokens", "512", "--out", str(out)]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["ott+", "pool 3+3"]
    assert all(float(row[f"kl_q{quarter}"]) > 0 for row in rows for quarter in range(1, 5))


def test_odd_lengths_are_refused(capsys):
    with pytest.raises(SystemExit):
        outlier_seats.main(["--tokens", "700"])
    assert "multiple of 512" in capsys.readouterr().err
