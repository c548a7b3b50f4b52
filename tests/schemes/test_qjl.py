"""What QJL stores: signs of random projections and norms, of all channels but a few and of those few."""

import dataclasses
import math

import pytest
import torch
from scheme_store import PAGE, ROLES, Store, random_tokens

from ottfx import sketch_codes
from ottfx.errors import ConfigError
from ottfx.metrics import formula_bits
from ottfx.registry import make_config
from ottfx.word_planes import unpack_plane

CPU = torch.device("cpu")


def filled(key, valid=None, **options):
    options = {"group_size": 32, "residual_length": 32, "early_layers": 0, **options}
    batch, heads, length, head_dim = key.shape
    store = Store(make_config("qjl", **options), batch, heads, head_dim, length)
    store.append(key, key.clone(), None if valid is None else valid[:, None, None])
    return store


def scores_of_the_paper(query, state, token, projection, outliers):
    """The estimate of section 4 for one query and one stored key, in float64."""
    rows, half = projection.shape[0], projection.shape[0] // 2
    is_outlier = torch.zeros(query.shape[-1], dtype=torch.bool)
    is_outlier[outliers] = True
    whole, outer = state["key_norms"][0, 0].flatten(0, 1)[token].double()
    total = 0.0
    for name, norm, taken, count in (
        ("key_signs", (whole**2 - outer**2).clamp(min=0).sqrt(), ~is_outlier, rows),
        ("key_outlier_signs", outer, is_outlier, half),
    ):
        sign = 1.0 - 2.0 * unpack_plane(state[name][0, 0].flatten(0, 1)[token], 1, count).double()
        sketched = projection[:count].double() @ torch.where(taken, query.double(), 0.0)
        total += math.sqrt(math.pi / 2) / count * norm * (sketched @ sign)
    return total


@pytest.mark.parametrize(("head_dim", "key_bits"), [(16, 2), (64, 3), (128, 2)])
def test_scores_are_those_of_the_papers_estimator(head_dim, key_bits):
    key, query = random_tokens(1, 1, 64, head_dim), torch.randn(5, head_dim)
    store = filled(key, key_bits=key_bits, seed=3)
    state, projection = store.state["key"], sketch_codes.sketch(head_dim, key_bits, CPU, 3)
    for group in (0, 1):
        rows = key[0, 0, 32 * group : 32 * group + 32]
        outliers = rows.square().sum(0).topk(8).indices
        assert set(state["key_outliers"][0, 0, 0, group].tolist()) == set(outliers.tolist())
        inner = rows.clone()
        inner[:, outliers] = 0.0
        signs = unpack_plane(state["key_signs"][0, 0, 0, 32 * group : 32 * group + 32], 1, projection.shape[0]) == 1
        assert ((inner @ projection.T < 0) != signs).float().mean() < 1e-3
        torch.testing.assert_close(
            state["key_norms"][0, 0, 0, 32 * group, 0].float(), rows[0].norm(), rtol=1e-3, atol=0
        )
        for token in (0, 31):
            read = store.read("key")[0, 0, 32 * group + token].double()
            for q in query:
                want = scores_of_the_paper(q, state, 32 * group + token, projection, outliers)
                assert (q.double() @ read).item() == pytest.approx(want.item(), rel=1e-4, abs=1e-4)


def test_blocks_of_the_sketch_are_orthogonal_and_of_their_seed():
    projection = sketch_codes.sketch(64, 4, CPU, 5)
    assert projection.shape == (256, 64)
    for block in projection.split(64):
        torch.testing.assert_close(block @ block.T, 64 * torch.eye(64), atol=1e-4, rtol=0)
    assert not torch.equal(projection, sketch_codes.sketch(64, 4, CPU, 6))
    assert torch.equal(projection[:128], sketch_codes.sketch(64, 2, CPU, 5))
    # The fourth moment of a coordinate on a sphere of radius 8.
    assert projection.pow(4).mean().item() == pytest.approx(3 * 64 / 66, abs=0.15)


def test_the_estimate_has_no_bias_and_errs_less_with_more_signs():
    key, query = random_tokens(1, 1, 32, 64), torch.randn(32, 64)
    exact = (key[0, 0] * query).sum(-1)
    size = key[0, 0].norm(dim=-1) * query.norm(dim=-1)
    spread = []
    for key_bits in (2, 8):
        errors = torch.stack(
            [
                ((filled(key, key_bits=key_bits, seed=seed).read("key")[0, 0] * query).sum(-1) - exact) / size
                for seed in range(40)
            ]
        )
        spread.append(errors.std().item())
        # The mean of 40 * 32 errors, those of one seed far from independent: within five standard deviations of 40.
        assert abs(errors.mean().item()) < 5 * spread[-1] / 40**0.5
    assert spread[1] < 0.7 * spread[0]


def test_padding_is_no_outlier_and_has_no_norm():
    key = 0.1 * random_tokens(1, 2, 64, 32)
    key[:, :, :20, 7] = 100.0
    key[:, :, 20:32, 9] = 50.0
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, :20] = valid[:, 32:] = False
    state = filled(key, valid, outlier_channels=1).state["key"]
    assert (state["key_outliers"][:, :, 0, 0] == 9).all()
    assert not state["key_norms"][:, :, 0, :20].any() and not state["key_norms"][:, :, 0, 32:64].any()
    assert not state["key_signs"][:, :, 0, 32:64].any()


def test_what_is_not_finite_or_zero():
    key = random_tokens(1, 1, 32, 32)
    key[0, 0, 0] = 0.0
    key[0, 0, 1, 3] = torch.nan
    key[0, 0, 2, 4] = torch.inf
    read = filled(key).read("key")
    assert read.isfinite().all() and not read[0, 0, 0].any()


@pytest.mark.parametrize(
    ("options", "layer", "head_dim", "key_bits", "value_bits"),
    [
        # (256 + 128 + 16 + 16 + 2) / 128, and with 512 signs in the first 15 layers.
        ({}, 15, 128, 3.265625, 3),
        ({}, 14, 128, 6.265625, 3),
        ({"layer_bits": {0: (3, 4)}}, 0, 64, 3 + 1.5 + (32 + 2) / 64, 5),
        ({"outlier_channels": 4, "group_size": 64, "early_layers": 0}, 0, 64, 3 + (32 + 0.5) / 64, 2.5),
    ],
)
def test_bytes_are_the_published_bits(options, layer, head_dim, key_bits, value_bits):
    store = Store(make_config("qjl", **options).at_layer(layer), 2, 3, head_dim, 1000, torch.float16)
    elements = 2 * 3 * store.shape.pages * PAGE * head_dim
    for role, bits in zip(ROLES, (key_bits, value_bits), strict=True):
        specs = store.scheme.state_spec(store.config, role, store.shape)
        held = sum(tensor.nbytes for name, tensor in store.state[role].items() if specs[name].paged_dim == 2)
        assert held * 8 == bits * elements
        # On the average half of the window is filled.
        expected = (bits * (700 - 63.5) + 16 * 63.5) / 700
        assert formula_bits(store.scheme, store.config, role, store.shape, 700) == pytest.approx(expected)


def test_options_are_checked_and_described():
    with pytest.raises(ConfigError, match=r"ottfx.qjl: outlier_channels must be from 1 to 16. Got outlier_channels=0"):
        make_config("qjl", outlier_channels=0)
    with pytest.raises(ConfigError, match=r"ottfx.qjl: early_key_bits must be one of \[2, 3, 4, 8\]"):
        make_config("qjl", early_key_bits=1)
    with pytest.raises(ConfigError, match=r"ottfx.qjl: seed must be a number in"):
        make_config("qjl", seed=-1)
    config = make_config("qjl")
    want = "qjl 2 signs a channel, 4 in 15 layers, 8 outliers, 2-bit values, group 32, residual 128"
    assert config.describe() == want
    assert config.at_layer(3) == config.at_layer(3).at_layer(20) != config.at_layer(15)
    assert config.at_layer(3).describe() == want.replace("2 signs a channel, 4 in 15 layers", "4 signs a channel")
    shape = Store(config.at_layer(20), head_dim=64).shape
    refused = dataclasses.replace(shape, head_dim=80)
    assert "power of two" in Store(config).scheme.check(config, refused)
