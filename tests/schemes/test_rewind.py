"""What comes back when the end of a sequence is forgotten: exact values where the ring still has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import ROLES, Store

from ottfx.cache_state import Payload
from ottfx.kv_tensor import KVTensor
from ottfx.registry import make_config

G, HEAD_DIM = 32, 16
STEP_ERROR = 8e-3
"""Bound on what 8-bit codes of values from -1 to 1 are off by: half a step of 2 / 255, 255 times the rounding of a
float16 scale (1e-3), the rounding of a zero point (5e-4), and room for ranges that earlier errors have widened."""

CONFIGS = {
    "ott": make_config("ott", 8, group_size=G, residual_length=16).at_layer(5),
    "ott-no-pool": make_config("ott", 8, group_size=G, residual_length=16).at_layer(0),
    "ott-no-window": make_config("ott", 8, group_size=G, residual_length=0).at_layer(5),
    "kivi": make_config("kivi", 8, group_size=G, residual_length=64).at_layer(0),
}


class RingOracle:
    """Which token lies in which ring row, row by row, and how often the value there went through codes."""

    def __init__(self, store: Store, role: str) -> None:
        self.window, self.step = store.scheme.schedule(store.config, role)
        self.written_back = store.config.scheme == "kivi" and role == "key"
        self.tokens: list[int] = []
        self.ring: list[int | None] = [None] * store.state[role][f"{role}_residual"].shape[2]
        self.times_coded: list[int] = []
        self.packed = 0

    def append(self, count: int) -> None:
        for _ in range(count):
            self.ring[len(self.tokens) % len(self.ring)] = len(self.times_coded)
            self.tokens.append(len(self.times_coded))
            self.times_coded.append(0)
        packed = max(self.packed, (len(self.tokens) - self.window) // self.step * self.step)
        if self.written_back:
            for token in self.tokens[self.packed : packed]:
                self.times_coded[token] += 1
        self.packed = packed

    def crop(self, length: int) -> None:
        self.packed = min(self.packed, length // G * G)
        self.tokens = self.tokens[:length]
        for position in range(self.packed, length):
            token, row = self.tokens[position], position % len(self.ring)
            if self.ring[row] != token:
                self.ring[row] = token
                self.times_coded[token] += 1

    def check(self, read: torch.Tensor, written: torch.Tensor) -> None:
        """Compare what is read [length, head_dim] with what was written, by token [tokens, head_dim]."""
        coded = torch.tensor([self.times_coded[token] for token in self.tokens])
        coded[: self.packed] += 1
        error = (read - written[self.tokens]).abs().amax(-1)
        assert (error <= coded * STEP_ERROR).all(), "0 where the value never went through codes"


def tokens(count: int) -> torch.Tensor:
    return 2 * torch.rand(1, 1, count, HEAD_DIM) - 1


def filled(config, count: int) -> tuple[Store, torch.Tensor, torch.Tensor]:
    store = Store(config, 1, 1, HEAD_DIM, 512)
    key, value = tokens(count), tokens(count)
    store.append(key, value)
    return store, key, value


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.integers(1, 6), st.integers(1, 120))),
        st.tuples(st.just("crop"), st.one_of(st.integers(1, 6), st.integers(1, 150))),
        st.tuples(st.just("clone"), st.just(0)),
    ),
    min_size=2,
    max_size=14,
)


@pytest.mark.parametrize("name", CONFIGS)
@given(steps=STEPS, first=st.integers(60, 160))
@settings(max_examples=100, deadline=None)
def test_any_appends_and_crops_keep_what_the_ring_holds(name, steps, first):
    torch.manual_seed(0)
    store = Store(CONFIGS[name], 1, 1, HEAD_DIM, 2048)
    oracles = {role: RingOracle(store, role) for role in ROLES}
    written = {role: torch.empty(1, 1, 0, HEAD_DIM) for role in ROLES}
    for kind, amount in [("append", first), *steps]:
        if kind == "append":
            new = {role: tokens(amount) for role in ROLES}
            store.append(new["key"], new["value"])
            written = {role: torch.cat([written[role], new[role]], dim=2) for role in ROLES}
        elif kind == "crop":
            amount = max(store.length - amount, 0)
            store.crop(amount)
        else:
            store.halves = {role: half.map_batch(torch.clone) for role, half in store.halves.items()}
        for role, oracle in oracles.items():
            if kind != "clone":
                getattr(oracle, kind)(amount)
            assert (store.length, store.packed[role]) == (len(oracle.tokens), oracle.packed)
            oracle.check(store.read(role)[0, 0], written[role][0, 0])


def test_a_cut_group_comes_back_exactly():
    store, key, value = filled(CONFIGS["ott"], 112)
    assert store.packed == {"key": 96, "value": 96}
    assert not torch.equal(store.read("key")[:, :, 64:90], key[:, :, 64:90])
    store.crop(90)
    assert store.packed == {"key": 64, "value": 64}
    for role, exact in (("key", key), ("value", value)):
        assert torch.equal(store.read(role)[:, :, 64:], exact[:, :, 64:90]), "48 rows hold tokens 64 to 111"


def test_what_forgotten_tokens_overwrote_is_not_read_again():
    # Tokens 100 to 111 took the rows of 52 to 63, which a ring that only ever held 100 tokens would still have.
    store, key, value = filled(CONFIGS["ott"], 112)
    store.crop(100)
    store.crop(63)
    for role, exact in (("key", key), ("value", value)):
        error = (store.read(role) - exact[:, :, :63]).abs()
        assert error.max() < STEP_ERROR
        assert error[:, :, 52:].max() > 0, "neither exact nor another token"


def test_after_a_long_crop_the_ring_counts_again():
    store, *_ = filled(CONFIGS["ott"], 400)
    store.crop(0)
    key, value = tokens(48), tokens(48)
    store.append(key, value)
    assert store.packed == {"key": 32, "value": 32}
    store.crop(20)
    assert torch.equal(store.read("key"), key[:, :, :20])
    assert torch.equal(store.read("value"), value[:, :, :20])


@pytest.mark.parametrize(("scheme", "window"), [("ott", 32), ("kivi", 64)])
def test_padding_that_the_ring_still_knows_stays_padding(scheme, window):
    """Forgetting tokens that are then written again leaves what one append of all of them leaves."""
    config = make_config(scheme, 4, group_size=G, residual_length=window).at_layer(0)
    key, value = 30 * tokens(64), tokens(64)
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, :9] = False
    straight, cropped = (Store(config, 1, 1, HEAD_DIM, 128) for _ in range(2))
    straight.append_in_chunks(key, value, [64], valid)
    cropped.append_in_chunks(key, value, [64], valid)
    cropped.crop(20)
    cropped.append(key[:, :, 20:], value[:, :, 20:], valid[:, None, None])
    # The keys of `kivi` come back decoded, so their grid may be another.
    for name in ["residual_valid", *(["key_scale", "key_zero_point"] if scheme == "ott" else [])]:
        assert torch.equal(straight.state["key"][name], cropped.state["key"][name]), name


def test_padding_that_the_ring_has_lost_counts_as_real():
    store = Store(CONFIGS["ott-no-pool"], 1, 1, HEAD_DIM, 128)
    valid = torch.ones(1, 100, dtype=torch.bool)
    valid[:, :9] = False
    store.append_in_chunks(tokens(100), tokens(100), [100], valid)
    store.crop(20)
    assert store.state["key"]["residual_valid"][:, :20].all()


def test_a_batch_joined_from_caches_with_other_pasts_is_not_mixed_up():
    # Both hold 112 tokens, but in the second one, tokens that were forgotten lie in the rows of 64 to 91.
    stores = [filled(CONFIGS["ott"], count) for count in (112, 140)]
    stores[1][0].crop(112)
    for index, role in enumerate(ROLES):
        handles = [KVTensor.from_payload(Payload(store.halves[role], 112)) for store, *_ in stores]
        half = torch.cat(handles, dim=0).payload.half
        half.rewind(90)
        exact = torch.cat([store_and_tokens[1 + index][:, :, :90] for store_and_tokens in stores])
        assert half.packed == 64
        assert (half.read(90) - exact).abs().max() < STEP_ERROR
