"""Ideas of `benchmarks.quality_ideas`: each patch does what its row says, and leaves nothing behind."""

import csv
from contextlib import nullcontext

import pytest
import torch
from sample_results import result_of
from scheme_store import ROLES, Store, random_tokens

from benchmarks.quality_ideas import IDEAS, add_changes
from benchmarks.scheme_patches import (
    BF16,
    E4M3,
    E4M3_SCALE,
    dual_scales,
    factors_of_keys,
    narrow_constants,
    seats_at_the_beginning,
    token_norms,
)
from ottfx import affine_cache, effective_bits, grid_search
from ottfx.evaluation import evaluate
from ottfx.group_seats import seat_positions
from ottfx.models import load_known
from ottfx.registry import make_config
from ottfx.results import Variant, csv_table
from ottfx.schemes import ott_plus

PATCHED = (
    (affine_cache, "due_range"), (affine_cache, "choose_seats"),
    (affine_cache, "code_keys"), (affine_cache, "code_values"), (grid_search, "round_to_half"),
    (ott_plus, "affine_append"), (ott_plus, "affine_attend"), (effective_bits, "formula_bits"),
)  # fmt: skip
TOKENS = 420


def filled(key, value, **options):
    store = Store(make_config("ott+", **options).at_layer(3), 1, 2, 32, TOKENS)
    store.append_in_chunks(key, value, [200, 1, 100, TOKENS - 301])
    return store


@pytest.fixture
def tokens():
    return tuple(random_tokens(1, 2, TOKENS, 32) for _ in ROLES)


def seated(store, head, role="key"):
    """Positions of the packed tokens that have a seat."""
    rows = store.state[role]["seat_row" if role == "key" else "value_seat_row"]
    return sorted(p for p in seat_positions(rows)[0, head].tolist() if 0 <= p < store.packed["key"])


@pytest.mark.parametrize("count", [1, 4])
def test_first_tokens_have_seats_beside_those_of_others(tokens, count):
    key, value = tokens
    key[:, :, :count] *= 100
    key[:, 1, 2] /= 1e4
    plain = filled(key, value)
    with seats_at_the_beginning(count, of_first_tokens=True):
        store = filled(key, value, group_seats=1 + count)
    for head in range(2):
        for role in ROLES:
            assert seated(store, head, role) == sorted({*seated(plain, head), *range(count)})
    for role, dense in zip(ROLES, tokens, strict=True):
        error = (store.read(role) - dense)[:, :, :count].norm(dim=-1) / dense[:, :, :count].norm(dim=-1)
        assert error.max() < 0.02
        # What is codes in both: all but the first group, whose ranges the sinks have left.
        assert torch.equal(store.read(role)[:, :, 128:], plain.read(role)[:, :, 128:])


def test_the_first_group_alone_has_more_seats(tokens):
    one, four = filled(*tokens), filled(*tokens, group_seats=4)
    with seats_at_the_beginning(3, of_first_tokens=False):
        store = filled(*tokens, group_seats=4)
    for head in range(2):
        of_first_group = [p for p in seated(four, head) if p < 128]
        assert len(of_first_group) == 4
        assert seated(store, head) == of_first_group + [p for p in seated(one, head) if p >= 128]
    for role in ROLES:
        for start, stop, same in ((0, 128, four), (128, TOKENS, one)):
            assert torch.equal(store.read(role)[:, :, start:stop], same.read(role)[:, :, start:stop])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("roundings", [(E4M3_SCALE,), (E4M3_SCALE, BF16, E4M3), (BF16, BF16, BF16)])
def test_constants_are_rounded(tokens, roundings, symmetric):
    plain = filled(*tokens, symmetric_values=symmetric)
    with narrow_constants(*roundings):
        store = filled(*tokens, symmetric_values=symmetric)
    scale, key_zero_point, value_zero_point = (*roundings, torch.clone, torch.clone)[:3]
    for name, rounded in (
        ("key_scale", scale), ("key_zero_point", key_zero_point),
        ("value_scale", scale), ("value_zero_point", value_zero_point),
    ):  # fmt: skip
        constants = store.state[name.partition("_")[0]][name].float()
        assert constants.any() or (name == "value_zero_point" and symmetric)
        assert torch.equal(constants, rounded(constants)), name
    unrounded = plain.state["key"]["key_scale"].float()
    assert not torch.equal(unrounded, scale(unrounded))
    for role, dense in zip(ROLES, tokens, strict=True):
        error, plain_error = ((s.read(role) - dense).square().mean() for s in (store, plain))
        assert error < 1.3 * plain_error


def test_e4m3_has_four_significant_bits():
    assert E4M3(torch.tensor([17.0, 1.0625, 1e4])).tolist() == [16, 1, 448]
    assert E4M3_SCALE(torch.tensor([0.0, 1.0625, 1e4])).tolist() == [0, 1, 28]


def attended(key, value, context, **options):
    """What one token at a time gets after a prompt, in a new store."""
    store = Store(make_config("ott+", **options).at_layer(3), 1, 2, 32, TOKENS)
    results = []
    with context:
        store.append(key[:, :, :300], value[:, :, :300])
        for t in range(300, TOKENS):
            new = key[:, :, t : t + 1], value[:, :, t : t + 1]
            query = torch.linspace(-1, 1, 32).expand(1, 4, 1, 32)
            results.append(store.attend(query, *new))
            store.append(*new)
    return torch.cat(results, dim=2)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_equal_factors_change_nothing(tokens, factor):
    plain = attended(*tokens, nullcontext())
    scaled = attended(*tokens, factors_of_keys(lambda group: torch.full_like(group[..., :1], factor)))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


def test_factors_do_not_see_tokens_with_a_seat(tokens):
    key, value = tokens
    key[:, :, 40] /= 1e4
    seen = []
    with factors_of_keys(lambda group: seen.append(group) or torch.ones_like(group[..., :1])):
        filled(key, value)
    others = torch.cat([key[:, :, :40], key[:, :, 41:128]], dim=2)
    torch.testing.assert_close(seen[0][:, :, 0, 40], others.mean(2))
    assert torch.equal(seen[0][:, :, 0, :40], key[:, :, :40])


def test_equal_factors_change_nothing_in_a_compiled_model():
    model, _ = load_known("random-qwen2")
    variant = Variant(label="ott+", options={"scheme": "ott+", "bits": 2, "lower": "eager"})
    ids = torch.arange(300) * 7 % model.config.vocab_size
    results = []
    for context in (nullcontext(), factors_of_keys(lambda group: torch.ones_like(group[..., :1]))):
        with context:
            results += evaluate(model, ids, [variant], num_tokens=300, start=200)
    assert 0 < results[0].mean_kl == pytest.approx(results[1].mean_kl, rel=1e-3)


@pytest.mark.parametrize("factors", [token_norms, dual_scales])
def test_factors_of_keys_take_up_their_norms(factors):
    direction = torch.randn(1, 2, 1, 32)
    sizes = torch.rand(1, 2, TOKENS, 1) * 4 + 1
    key = (direction + 0.01 * torch.randn(1, 2, TOKENS, 32)) * sizes
    value = torch.randn(1, 2, TOKENS, 32)
    exact = attended(key, value, nullcontext(), residual_length=TOKENS)
    plain = attended(key, value, nullcontext(), value_bits=8)
    divided = attended(key, value, factors_of_keys(factors), value_bits=8)
    assert (divided - exact).norm() < 0.8 * (plain - exact).norm()


def test_dual_scales_balance_tokens():
    group = torch.randn(1, 1, 2, 128, 32) * (torch.rand(128, 1) * 9 + 1) * (torch.rand(32) * 9 + 1)
    before, after = group.std(-1), (group / dual_scales(group)).std(-1)
    assert after.amax() / after.amin() < 0.5 * before.amax() / before.amin()


@pytest.mark.parametrize("idea", IDEAS, ids=lambda idea: idea.name)
def test_ideas_count_their_bits_and_leave_nothing_behind(tokens, idea):
    before = [getattr(module, name) for module, name in PATCHED]
    half = filled(*tokens, **idea.options).halves["key"]
    plain = effective_bits.formula_bits(half.scheme, half.config, "key", half.shape, 8192)
    with idea.applied():
        counted = effective_bits.formula_bits(half.scheme, half.config, "key", half.shape, 8192)
    packed = (8192 - 32 - 63.5) / 8192
    assert counted == pytest.approx(plain + packed * idea.extra_bits("key", 32), abs=1e-6)
    assert before == [getattr(module, name) for module, name in PATCHED]


@pytest.mark.parametrize("idea", IDEAS[:3], ids=lambda idea: idea.name)
@pytest.mark.parametrize("role", ROLES)
def test_free_seats_take_no_bits(tokens, idea, role):
    plain, half = (filled(*tokens, **options).halves[role] for options in ({}, idea.options))
    bits = [effective_bits.formula_bits(half.scheme, half.config, role, half.shape, 8192) for half in (plain, half)]
    with idea.applied():
        counted = effective_bits.formula_bits(half.scheme, half.config, role, half.shape, 8192)
    assert counted == pytest.approx(bits[0], abs=1e-6) and bits[1] > bits[0] + 0.005


def test_bits_of_a_key():
    extra = {idea.name: idea.extra_bits("key", 64) for idea in IDEAS}
    assert extra["token norms of keys"] == 0.25 and extra["e4m3 scales and zero points"] == -0.125


def test_changes_are_position_by_position(tmp_path):
    results = [result_of("plain", [0.1] * 128), result_of("idea", [0.1] * 64 + [0.3] * 64)]
    file = tmp_path / "ideas.csv"
    file.write_text(csv_table(results))
    add_changes(results, file)
    with file.open(newline="") as lines:
        plain, idea = csv.DictReader(lines)
    assert float(plain["kl_change"]) == float(plain["kl_change_high"]) == 0
    assert float(idea["kl_change"]) == pytest.approx(0.1)
    assert float(idea["kl_change_low"]) == pytest.approx(0) and float(idea["kl_change_high"]) == pytest.approx(0.2)
