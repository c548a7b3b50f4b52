"""OTT's vectorized tracing against the sequential oracle, group by group rules included."""

import dataclasses

import pytest
import torch
from scheme_store import Store, random_tokens, state_difference
from sequential_oracle import Oracle

from ottfx.affine_grids import read_key_pages, read_value_pages
from ottfx.schemes.ott import OTTConfig


def config(**options) -> OTTConfig:
    return OTTConfig(**{"group_size": 32, "residual_length": 16, **options}).at_layer(5)


def check_against_oracle(store: Store, key, value, valid=None) -> int:
    """Compare every head with the oracle; return how many slots are outliers."""
    options, outliers = store.config, 0
    state = store.state["key"] | store.state["value"]
    coded_key = read_key_pages(state["key_codes"], state["key_scale"], state["key_zero_point"], options.key_bits)
    coded_value = read_value_pages(
        state["value_codes"], state["value_scale"], state["value_zero_point"], options.value_bits
    )
    marks = torch.signbit(state["value_scale"][:, :, :, 0]).flatten(2)
    for batch in range(key.shape[0]):
        for head in range(key.shape[1]):
            real = [True] * key.shape[2] if valid is None else valid[batch].tolist()
            oracle = Oracle(
                key=key[batch, head], value=value[batch, head], valid=real, bits=options.key_bits,
                group_size=options.group_size, value_group_size=options.value_channels(key.shape[3]),
                residual_length=options.residual_length, capacity=options.outlier_capacity,
                spill_capacity=options.spill_capacity, norm=options.score_norm, replacement=options.replacement,
            ).run()  # fmt: skip
            packed = oracle.packed
            assert store.packed == {"key": packed, "value": packed}
            # Rows that hold a mean are as exact as its sum, whose order is not defined; padding's are never read.
            plain = [token for token in range(packed) if real[token] and token not in oracle.ever_marked]
            assert torch.equal(coded_key[batch, head, plain], oracle.coded_key[plain])
            assert torch.equal(coded_value[batch, head, plain], oracle.coded_value[plain])
            for token in oracle.ever_marked:
                step = state["key_scale"][batch, head].float().max().item()
                close = {"rtol": 0, "atol": 1.01 * step}
                torch.testing.assert_close(coded_key[batch, head, token], oracle.coded_key[token], **close)
            assert state["spill_count"][batch, head] == oracle.spill_count
            position = state["outlier_position"][batch, head].tolist()
            seats = options.outlier_capacity
            assert position[:seats] == oracle.pool + [-1] * (seats - len(oracle.pool))
            assert position[seats:] == oracle.spill + [-1] * (options.spill_capacity - len(oracle.spill))
            assert position == state["value_outlier_position"][batch, head].tolist()
            for row, token in enumerate(position):
                if token >= 0:
                    torch.testing.assert_close(state["outlier_key"][batch, head, row], key[batch, head, token])
                    torch.testing.assert_close(state["outlier_value"][batch, head, row], value[batch, head, token])
            marked = set(marks[batch, head].nonzero().flatten().tolist())
            assert marked == (oracle.ever_marked if options.mask_replaced else set())
            outliers += len(oracle.ever_marked)
    return outliers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spill_capacity": 0},
        {"spill_capacity": 1},
        {"spill_capacity": 2, "outlier_capacity": 1},
        {"spill_capacity": 5, "outlier_capacity": 4, "score_norm": 2},
        {"spill_capacity": 64, "outlier_capacity": 32},
        {"replacement": "group", "bits": 4},
        {"mask_replaced": False, "bits": 3},
        {"outlier_capacity": 0, "bits": 8},
    ],
    ids=lambda options: "-".join(f"{name}{value}" for name, value in options.items()) or "defaults",
)
@pytest.mark.parametrize("sizes", [[200], [1, 46, 1, 100, 52], [31, 33, 136]], ids=["at-once", "ones", "chunks"])
def test_tracing_equals_the_sequential_rule(options, sizes):
    key, value = (random_tokens(2, 3, 200, 16) for _ in range(2))
    store = Store(config(**options), batch_size=2, num_kv_heads=3, head_dim=16, max_length=200)
    store.append_in_chunks(key, value, sizes)
    outliers = check_against_oracle(store, key, value)
    assert (outliers > 0) == (options.get("outlier_capacity") != 0)


def test_tracing_stops_when_the_spill_pool_would_overflow():
    # Every group holds smaller keys than the one before, so all seats change hands each time.
    size = torch.linspace(4.0, 0.1, 256)[None, None, :, None]
    key = size * (1 + 0.1 * torch.rand(1, 1, 256, 16))
    value = torch.randn(1, 1, 256, 16)
    store = Store(config(outlier_capacity=3, spill_capacity=7), num_kv_heads=1, head_dim=16, max_length=256)
    store.append(key, value)
    pool, spill = store.pool_positions(0, 0)
    # Displacements 0, 3, 3, then 3 more would make 9 > 7: the fourth group changes nothing.
    assert store.state["key"]["spill_count"].item() == 7
    assert len(spill) == 6
    assert all(64 <= token < 96 for token in pool)
    assert check_against_oracle(store, key, value) == 9


def test_ties_go_to_the_pool_then_to_the_earlier_token():
    key = torch.ones(1, 1, 160, 16)
    store = Store(config(outlier_capacity=2), num_kv_heads=1, head_dim=16, max_length=160)
    store.append(key, key)
    assert store.pool_positions(0, 0) == ({0, 1}, set())


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_never_wins_a_seat_nor_widens_a_range(side):
    key, value = (random_tokens(2, 2, 160, 32) for _ in range(2))
    valid = torch.ones(2, 160, dtype=torch.bool)
    valid[1, {"left": slice(0, 45), "right": slice(90, 160), "holes": slice(3, 90, 7)}[side]] = False
    noisy_key, noisy_value = key.clone(), value.clone()
    hidden = ~valid[:, None, :, None]
    noisy_key.masked_fill_(hidden, 0.0)
    noisy_value.masked_fill_(hidden, float("nan"))
    store = Store(config(), batch_size=2, head_dim=32, max_length=160)
    store.append_in_chunks(noisy_key, noisy_value, [70, 1, 89], valid)
    check_against_oracle(store, noisy_key, noisy_value, valid)
    for head in range(2):
        pool, spill = store.pool_positions(1, head)
        assert len(pool) == 3
        assert all(valid[1, token] for token in pool | spill)

    # Nor does it matter what the padding was.
    other = Store(config(), batch_size=2, head_dim=32, max_length=160)
    wild = torch.where(hidden, 1e4 * torch.randn_like(key), key)
    other.append_in_chunks(wild, torch.where(hidden, wild, value), [70, 1, 89], valid)
    for name in ("key_scale", "key_zero_point", "value_scale", "value_zero_point", "outlier_position", "key_codes"):
        role = "value" if name.startswith("value") else "key"
        assert torch.equal(store.state[role][name], other.state[role][name]), name


def test_a_group_of_padding_alone_is_zero():
    key, value = (random_tokens(1, 1, 96, 16) for _ in range(2))
    valid = torch.ones(1, 96, dtype=torch.bool)
    valid[:, :40] = False
    store = Store(config(), num_kv_heads=1, head_dim=16, max_length=96)
    store.append_in_chunks(key, value, [96], valid)
    check_against_oracle(store, key, value, valid)
    assert store.state["key"]["key_scale"][0, 0, 0, 0].count_nonzero() == 0
    assert store.state["key"]["key_scale"][0, 0, 0, 1].count_nonzero() == 16


def test_infinities_and_nan_stay_inside_their_group():
    key, value = (random_tokens(1, 1, 128, 16) for _ in range(2))
    key[0, 0, 3, 0], key[0, 0, 5, 1], key[0, 0, 6, 2] = float("inf"), float("-inf"), float("nan")
    value[0, 0, 9, 0], value[0, 0, 10, 0] = float("nan"), float("inf")
    store = Store(config(), num_kv_heads=1, head_dim=16, max_length=128)
    store.append(key, value)
    check_against_oracle(store, key, value)
    for role in ("key", "value"):
        assert store.state[role][f"{role}_scale"].isfinite().all()
        assert store.state[role][f"{role}_zero_point"].isfinite().all()


def test_exempt_layers_have_no_pool():
    options = OTTConfig(exempt_layers=(0, 1))
    for layer, rows in ((0, 0), (1, 0), (2, 35)):
        store = Store(options.at_layer(layer), max_length=128)
        assert store.state["key"]["outlier_key"].shape[2] == rows
        assert store.state["value"]["value_outlier_position"].shape[2] == rows
        assert options.at_layer(layer).at_layer(7) == options.at_layer(layer)


def test_marks_survive_a_scale_of_zero():
    value = torch.zeros(1, 1, 80, 16)
    store = Store(config(), num_kv_heads=1, head_dim=16, max_length=80)
    store.append(random_tokens(1, 1, 80, 16), value)
    assert torch.signbit(store.state["value"]["value_scale"][0, 0, 0, 0]).sum() >= 3


def test_batch_order_does_not_matter():
    key, value = (random_tokens(3, 2, 150, 16) for _ in range(2))
    order = torch.tensor([2, 0, 1])
    stores = []
    for permutation in (torch.arange(3), order):
        store = Store(config(), batch_size=3, head_dim=16, max_length=150)
        store.append_in_chunks(key[permutation], value[permutation], [100, 1, 49])
        stores.append(store)
    straight, mixed = stores
    straight.halves = {role: half.map_batch(lambda tensor: tensor[order]) for role, half in straight.halves.items()}
    assert state_difference(straight, mixed) == []


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OTTConfig().bits = 4
