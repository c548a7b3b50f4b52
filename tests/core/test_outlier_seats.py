"""The comparison of who has a seat: seats in pages, and what attention loses."""

import csv

import pytest
import torch

from benchmarks import outlier_seats
from benchmarks.outlier_seats import NO_POOL, Layer, Way, given_back, losses, page_outliers, with_page_seats


@pytest.fixture
def layer():
    torch.manual_seed(0)
    key, value = (torch.randn(1, 2, 512, 32) + 3 * torch.randn(32) for _ in range(2))
    key[:, :, 200] = key[:, :, 300] = 0.01
    return Layer(index=3, query=torch.randn(1, 4, 512 // outlier_seats.EVERY_QUERY, 32), key=key, value=value)


def test_the_lowest_norm_of_each_page_has_a_seat(layer):
    seated = page_outliers(layer.key, Way(name="", options={}, page_seats=1))
    assert seated.shape == (1, 2, 512, 1) and seated.unflatten(2, (4, 128)).sum(3).eq(1).all()
    assert seated[:, :, 200].all() and seated[:, :, 300].all()
    only_small = page_outliers(layer.key, Way(name="", options={}, page_seats=2, below=0.1))
    assert only_small.nonzero()[:, 2].tolist() == [200, 300] * 2


def test_seated_tokens_are_nearly_exact_and_their_pages_better_off(layer):
    (key, value), taken = with_page_seats(layer, Way(name="", options=NO_POOL, page_seats=1))
    assert taken == 1
    for rows, exact in ((key, layer.key), (value, layer.value)):
        assert (rows - exact)[:, :, [200, 300]].abs().max() < 0.01 * exact.abs().max()
    without = given_back(layer, NO_POOL, layer.key, layer.value)[0]
    errors = [(rows - layer.key).square()[:, :, 128:384].mean() for rows in (key, without)]
    assert errors[0] < 0.8 * errors[1]


def test_losses_are_those_of_the_definition(layer):
    assert losses(layer, layer.key, layer.value) == ([0.0] * 4, [0.0] * 4)
    kl, error = losses(layer, layer.key + 0.1 * torch.randn_like(layer.key), layer.value)
    assert all(0 < one < 1 for one in (*kl, *error))
    query, heads = layer.query[:, :, 28:], [rows.repeat_interleave(2, 1) for rows in (layer.key, layer.key * 0.5)]
    seen = torch.arange(512) <= torch.tensor([448, 464, 480, 496]).unsqueeze(-1)
    weights = ((query @ keys.transpose(-1, -2) / 32**0.5).exp() * seen for keys in heads)
    dense, other = (rows / rows.sum(-1, keepdim=True) for rows in weights)
    expected = torch.where(seen, dense * (dense / other).log(), 0.0).sum(-1).mean()
    assert losses(layer, layer.key * 0.5, layer.value)[0][3] == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_writes_a_row_for_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(outlier_seats, "WAYS", outlier_seats.WAYS[:1] + outlier_seats.WAYS[4:5])
    out = tmp_path / "seats"
    assert outlier_seats.main(["--model", "random-qwen2", "--tokens", "512", "--out", str(out)]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["ott+", "page seats 1"] and rows[1]["taken_of_a_page"] == "1.0"
    assert all(float(row[f"kl_q{quarter}"]) > 0 for row in rows for quarter in range(1, 5))


def test_odd_lengths_are_refused(capsys):
    with pytest.raises(SystemExit):
        outlier_seats.main(["--tokens", "700"])
    assert "multiple of 512" in capsys.readouterr().err
