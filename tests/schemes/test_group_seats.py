"""Seats of groups: who has one, what it keeps, and that nobody else is disturbed by it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import PAGE, ROLES, Store, random_tokens

from ottfx.affine_schedule import Due
from ottfx.group_seats import choose_seats, seat_positions, seat_rows, write_seats
from ottfx.registry import make_config
from ottfx.window_rows import decode_rows, encode_rows

GROUP, HEAD_DIM, TOKENS = 32, 16, 300


def filled(key, value, sizes, valid=None, **options):
    config = make_config("ott+", **{"group_size": GROUP, "residual_length": 16, "group_seats": 2, **options})
    store = Store(config.at_layer(3), key.shape[0], 2, HEAD_DIM, TOKENS + 50)
    store.append_in_chunks(key, value, sizes, valid)
    return store


@pytest.fixture
def tokens():
    return tuple(random_tokens(2, 2, TOKENS, HEAD_DIM) for _ in ROLES)


def positions(store, name="seat_row"):
    """Positions of the packed tokens that have a seat, by sequence and head."""
    half = store.state["key" if name == "seat_row" else "value"]
    rows = half[name].long()
    page = torch.arange(rows.shape[2]).view(-1, 1)
    at = torch.where(rows >= 0, rows + PAGE * page, -1).flatten(2)
    return [[{p for p in head.tolist() if 0 <= p < store.packed["key"]} for head in sequence] for sequence in at]


@given(seed=st.integers(0, 2**20), seats=st.integers(1, 4), norm=st.sampled_from([1, 2]), padding=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_the_lowest_real_tokens_of_each_group_have_the_seats(seed, seats, norm, padding):
    generator = torch.Generator().manual_seed(seed)
    # Few different norms, so that there are ties.
    key = torch.randint(1, 4, (2, 3, 2 * GROUP, 1), generator=generator) * torch.ones(HEAD_DIM)
    real = torch.arange(2 * GROUP).expand(2, -1) >= torch.tensor([[padding], [0]])
    chosen = choose_seats(key, real, GROUP, seats, norm)
    assert chosen.offset.shape == chosen.taken.shape == (2, 3, 2, seats)
    for sequence in range(2):
        for head in range(3):
            for group in range(2):
                members = range(group * GROUP, (group + 1) * GROUP)
                order = sorted((key[sequence, head, t, 0].item(), t) for t in members if real[sequence, t])
                want = [t for _, t in order[:seats]]
                taken = chosen.taken[sequence, head, group]
                assert (chosen.offset[sequence, head, group][taken] + group * GROUP).tolist() == want
                seated = chosen.is_seated[sequence, head, members.start : members.stop].nonzero().flatten()
                assert (seated + members.start).tolist() == sorted(want)


def test_a_seat_keeps_what_8_bits_hold_of_a_token_and_its_place():
    torch.manual_seed(0)
    rows = torch.randn(1, 2, 3 * GROUP, HEAD_DIM)
    real = torch.ones(1, 3 * GROUP, dtype=torch.bool)
    chosen = choose_seats(rows, real, GROUP, 2, 1)
    # Two groups of three are due: the last of page 0, the first of page 1.
    start = torch.tensor(PAGE - GROUP)
    due = Due(start, start + 2 * GROUP, 3 * GROUP, torch.tensor([0, 1]))
    state = (
        torch.full((1, 2, 2, 8, HEAD_DIM), 55, dtype=torch.int8),
        torch.full((1, 2, 2, 8), 7.0, dtype=torch.float16),
        torch.full((1, 2, 2, 8), -1, dtype=torch.int8),
    )
    write_seats(rows, chosen, due, GROUP, *state)
    kept, position = seat_rows(*state[:2]), seat_positions(state[2])
    assert (position[:, :, 6:10] >= 0).all() and (position >= 0).sum() == 8, "the third group is not due"
    assert (state[0][:, :, 0, :6] == 55).all() and (state[1][:, :, 1, 2:] == 7).all()
    for head in range(2):
        for row, at in zip(kept[0, head, 6:10], position[0, head, 6:10].tolist(), strict=True):
            exact = rows[0, head, at - PAGE + GROUP]
            assert torch.equal(row, decode_rows(*encode_rows(exact)))


def test_groups_with_few_real_tokens_leave_seats_free(tokens):
    valid = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[2 * GROUP - 1], [0]])
    store = filled(*tokens, [TOKENS], valid)
    padded, whole = positions(store)
    groups = store.packed["key"] // GROUP
    # Of the first sequence, the first group is padding, and the second has one real token.
    assert all(len(head) == 2 * (groups - 2) + 1 and 2 * GROUP - 1 in head for head in padded)
    assert all(len(head) == 2 * groups for head in whole)
    assert positions(store, "value_seat_row") == [padded, whole]


def test_tokens_with_a_seat_come_back_nearly_exact_and_their_slots_are_marked(tokens):
    store = filled(*tokens, [TOKENS])
    marked = store.state["value"]["value_scale"][:, :, :, 0].signbit().flatten(2)
    for role, exact in zip(ROLES, tokens, strict=True):
        read = store.read(role)
        for sequence in range(2):
            for head in range(2):
                at = sorted(positions(store)[sequence][head])
                assert marked[sequence, head, : store.packed["key"]].nonzero().flatten().tolist() == at
                error = (read - exact)[sequence, head].norm(dim=-1) / exact[sequence, head].norm(dim=-1)
                assert error[at].max() < 0.02


def test_a_seated_token_widens_no_range(tokens):
    key, value = tokens
    plain = filled(key, value, [TOKENS], mixed_keys=False)
    spoiled = key.clone()
    for sequence in range(2):
        for head in range(2):
            for at in positions(plain)[sequence][head]:
                # Of a lower norm than before, in another direction.
                spoiled[sequence, head, at] = -0.5 * key[sequence, head, at].flip(-1)
    other = filled(spoiled, value, [TOKENS], mixed_keys=False)
    assert positions(other) == positions(plain)
    for name in ("key_scale", "key_zero_point"):
        assert torch.equal(other.state["key"][name], plain.state["key"][name])


@pytest.mark.parametrize("sizes", [[100, 200], [1, 31, 33, 235], [47, *[1] * 53, 200]])
def test_chunks_do_not_change_who_has_a_seat(tokens, sizes):
    at_once, chunked = (filled(*tokens, s, quantized_residual=False) for s in ([TOKENS], sizes))
    for name in ("seat_key", "seat_key_scale", "seat_row"):
        assert torch.equal(at_once.state["key"][name], chunked.state["key"][name]), name


@pytest.mark.parametrize("length", [70, 64, 150])
def test_seats_behind_the_end_are_forgotten(tokens, length):
    key, value = tokens
    store = filled(key, value, [TOKENS])
    before = {role: store.read(role)[:, :, :length] for role in ROLES}
    kept = [[{p for p in head if p < length // GROUP * GROUP} for head in sequence] for sequence in positions(store)]
    store.crop(length)
    assert positions(store) == kept
    for role in ROLES:
        # Those of a group that is cut are in the window again, as their seats had them.
        torch.testing.assert_close(store.read(role), before[role], atol=0.05, rtol=0)
    query = torch.randn(2, 4, 1, HEAD_DIM)
    new = key[:, :, :1], value[:, :, :1]
    seen_key, seen_value = (
        torch.cat([store.read(r), x], 2).repeat_interleave(2, 1) for r, x in zip(ROLES, new, strict=True)
    )
    expected = (query @ seen_key.transpose(-1, -2) * 0.125).softmax(-1) @ seen_value
    torch.testing.assert_close(store.attend(query, *new), expected, atol=1e-5, rtol=1e-5)


def test_masks_hide_seats_as_other_tokens(tokens):
    store = filled(*tokens, [TOKENS])
    key, value = (one[:, :, :1] for one in tokens)
    query = torch.randn(2, 4, 1, HEAD_DIM)
    at = sorted(positions(store)[0][0])[3]
    mask = torch.zeros(2, 1, 1, TOKENS + 1, dtype=torch.bool)
    mask[..., at] = True
    got = store.attend(query, key, value, mask)[0, :2, 0]
    torch.testing.assert_close(got, store.read("value")[0, :1, at].expand(2, -1), atol=1e-5, rtol=1e-5)


def test_exempt_layers_and_zero_seats_take_no_room():
    for config in (make_config("ott+", exempt_layers=(3,)), make_config("ott+", group_seats=0)):
        store = Store(config.at_layer(3), 1, 2, 64, 300)
        assert store.state["key"]["seat_key"].numel() == store.state["value"]["value_seat_row"].numel() == 0
