"""The parts of `ott+`: words of mixed widths, the order of channels, searched grids, rotation, and their switches."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import ROLES, Store, random_tokens

from ottfx import mixed_words
from ottfx.grid_search import dequantize_symmetric, search_affine, search_symmetric
from ottfx.metrics import formula_bits
from ottfx.reference import dequantize_affine, quantize_affine
from ottfx.registry import get_scheme, make_config
from ottfx.rotation import block_size, rotate, rotate_back, rotation
from ottfx.schemes.ott_plus import SWITCHES
from ottfx.window_rows import decode_rows, encode_rows

HEAD_DIMS = [16, 64, 80, 96, 128, 256, 512]


def plus(**options):
    return make_config("ott+", **{"group_size": 32, "residual_length": 16, **options}).at_layer(3)


# ---- words of mixed widths


@pytest.mark.parametrize("is_steep", [False, True])
def test_a_word_is_full_and_two_bits_wide_on_average(is_steep):
    steep = torch.tensor(is_steep)
    widths, starts = mixed_words.element_widths(steep).tolist(), mixed_words.element_positions(steep).tolist()
    taken = [bit for width, start in zip(widths, starts, strict=True) for bit in range(start, start + width)]
    assert sorted(taken) == list(range(32))
    assert [widths.count(bits) for bits in (4, 3, 2, 1)] == ([4, 2, 0, 10] if is_steep else [2, 2, 6, 6])
    # The tensor cores read the low ten bits of a half as they are, and the others behind a shift by ten.
    for start, width in zip(starts, widths, strict=True):
        assert (start % 16 + width <= 10) or start % 16 >= 10


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mixed_words_come_back(head_dim):
    steep = torch.tensor([[True, False, False], [False, True, True]])
    highest = mixed_words.channel_levels(steep, head_dim).unsqueeze(2).unsqueeze(2)
    codes = (torch.rand(2, 3, 5, 128, head_dim) * (highest + 1)).to(torch.uint8)
    words = mixed_words.pack_mixed(codes, steep)
    assert words.shape == (2, 3, 5, 4 * head_dim * 2) and words.dtype == torch.int32
    assert torch.equal(mixed_words.unpack_mixed(words, steep, 128, head_dim), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wider_channels_have_more_bits(head_dim):
    spread = torch.rand(2, 3, head_dim)
    spread[:, 1] = 1 + 9 * (torch.arange(head_dim) % 4 == 3) + 0.01 * spread[:, 1]
    key_order = mixed_words.order_channels(spread).to(torch.int16)
    steep, order = mixed_words.steep_heads(key_order), mixed_words.known_order(key_order)
    assert steep.tolist() == [[False, True, False]] * 2
    assert torch.equal(order.sort(-1).values, torch.arange(head_dim).expand(2, 3, -1))
    levels, stored = mixed_words.channel_levels(steep, head_dim), spread.gather(-1, order)
    for more, fewer in ((15, 7), (7, 3), (7, 1), (3, 1)):
        least = torch.where(levels == more, stored, torch.inf).amin(-1)
        assert (least >= torch.where(levels == fewer, stored, 0.0).amax(-1)).all()
    assert (levels.add(1).log2().mean(-1) == 2).all()


@given(seed=st.integers(0, 2**20), steepness=st.floats(0.0, 8.0))
@settings(max_examples=50, deadline=None)
def test_a_head_has_the_widths_that_lose_less(seed, steepness):
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randn(64, generator=generator).abs().mul(steepness / 4).exp().sort(descending=True).values
    errors = []
    for is_steep in (False, True):
        widths = mixed_words.element_widths(torch.tensor(is_steep)).sort(descending=True).values.repeat_interleave(4)
        errors.append((ranges.double() ** 2 * torch.tensor(mixed_words.ERRORS).double()[widths]).sum().item())
    if abs(errors[0] - errors[1]) > 1e-5 * errors[0]:
        assert mixed_words.suits_steep(ranges).item() == (errors[1] < errors[0])


def test_equal_channels_keep_their_order_within_a_width():
    order = mixed_words.order_channels(torch.zeros(32))
    assert order[0] == 0 and order.max() == 31, "channels without a range have gradual widths"
    assert torch.equal(mixed_words.known_order(torch.full((1, 4), -1, dtype=torch.int16)), torch.arange(4)[None])
    assert not mixed_words.steep_heads(torch.full((1, 4), -1, dtype=torch.int16)).any()


def test_a_head_with_a_quarter_of_wide_channels_is_stored_better_for_it():
    key, value = (random_tokens(1, 2, 160, 64) for _ in range(2))
    key[:, 0, :, 10:26] *= 12

    def stored():
        store = Store(plus(group_size=128), 1, 2, 64, 256)
        store.append(key, value)
        difference = store.read("key")[:, :, :128] - key[:, :, :128]
        return mixed_words.steep_heads(store.state["key"]["key_order"]).tolist(), difference.square().mean((0, 2, 3))

    with patch.object(mixed_words, "STEEP", mixed_words.GRADUAL):
        heads, of_gradual = stored()
    assert heads == [[False, False]]
    heads, error = stored()
    assert heads == [[True, False]]
    assert error[0] < 0.9 * of_gradual[0] and error[1] == of_gradual[1]


@pytest.mark.parametrize("padding", [0, 40, 70])
def test_the_order_is_decided_once_by_the_first_real_tokens(padding):
    key, value = (random_tokens(1, 2, 300, 32) for _ in range(2))
    key[..., 5] += 30 * torch.randn(1, 2, 300)
    valid = torch.arange(300)[None] >= padding
    store = Store(plus(), 1, 2, 32, 400)
    store.append_in_chunks(key[:, :, :48], value[:, :, :48], [48], valid[:, :48])
    order = store.state["key"]["key_order"]
    assert (order < 0).all() == (padding > 32), "nothing but padding decides nothing"
    store.append_in_chunks(key[:, :, 48:200], value[:, :, 48:200], [152], None)
    decided = order.clone()
    channels = mixed_words.known_order(decided)
    assert (channels.sort(-1).values == torch.arange(32)).all()
    assert (channels[..., 0] == 5).all(), "the widest channel has four bits"
    key[..., 9] *= 1000
    store.append(key[:, :, 200:], value[:, :, 200:])
    assert torch.equal(order, decided)


# ---- searched grids


@given(seed=st.integers(0, 2**20), bits=st.sampled_from([1, 2, 3, 4]), scale=st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_a_searched_grid_is_never_worse_than_the_whole_range(seed, bits, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 32, 5, generator=generator) ** 3 * scale
    codes, steps, zero_point = search_affine(x, torch.tensor(2.0**bits - 1), 1)
    assert codes.max().item() < 2**bits
    whole = search_affine(x, torch.tensor(2.0**bits - 1), 1, candidates=1)
    errors = [((dequantize_affine(*grid, dim=1) - x) ** 4).sum(1) for grid in ((codes, steps, zero_point), whole)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    plain = quantize_affine(x, bits, dim=1) if bits > 1 else None
    if plain is not None:
        assert all(torch.equal(got, expected) for got, expected in zip(whole, plain, strict=True))


def test_the_search_finds_the_narrow_range_of_a_group_with_one_outlier():
    x = torch.linspace(-1, 1, 127).repeat(1, 1)
    x = torch.cat([x, torch.full((1, 1), 1.6)], dim=1)
    errors = []
    for candidates in (1, 7):
        grid = search_affine(x, torch.tensor(3.0), 1, candidates=candidates)
        errors.append(((dequantize_affine(*grid, dim=1) - x) ** 4).sum().item())
    assert errors[1] < 0.8 * errors[0]


def test_only_those_that_take_part_decide():
    x = torch.randn(2, 32, 4)
    taking_part = torch.ones(2, 32, 1, dtype=torch.bool)
    taking_part[:, :5] = False
    spoiled = torch.where(taking_part, x, 1e4)
    for one, two in zip(
        search_affine(x, torch.tensor(3.0), 1, taking_part)[1:],
        search_affine(spoiled, torch.tensor(3.0), 1, taking_part)[1:],
        strict=True,
    ):
        assert torch.equal(one, two)
    nobody = search_affine(x, torch.tensor(3.0), 1, torch.zeros(2, 32, 1, dtype=torch.bool))
    assert not nobody[1].any() and not nobody[2].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grids_of_a_normal_distribution_are_near_the_best(bits):
    # Errors of the best uniform grid for a normal distribution: Max (1960), table II; of 8 bits roughly. Grids chosen
    # by fourth powers are a little wider.
    best, over = {2: (0.1188, 1.17), 3: (0.03744, 1.08), 4: (0.01154, 1.02), 8: (1e-4, 3)}[bits]
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    codes, scale = search_symmetric(x, bits)
    assert codes.max().item() < 2**bits and (scale > 0).all()
    error = (dequantize_symmetric(codes, scale, bits) - x).square().mean().item()
    assert error < best * over


def test_symmetric_grids_of_zeros_and_of_what_is_not_finite():
    x = torch.tensor([[0.0] * 16, [float("inf")] + [1.0] * 15, [float("nan")] + [1.0] * 15])
    codes, scale = search_symmetric(x, 2)
    values = dequantize_symmetric(codes, scale, 2)
    assert values.isfinite().all() and not values[0].any()


# ---- rotation


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_orthogonal_and_spreads_one_channel_over_its_block(head_dim):
    matrix = rotation(head_dim, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-5, rtol=0)
    assert set(matrix.abs().count_nonzero(-1).tolist()) == {block_size(head_dim)}
    x = torch.randn(2, 3, 7, head_dim)
    torch.testing.assert_close(rotate_back(rotate(x), x.dtype), x, atol=1e-5, rtol=1e-5)
    # Not the plain Hadamard matrix, to which a constant token is one channel.
    assert rotate(torch.ones(1, 1, 1, head_dim)).abs().max() < 0.8 * block_size(head_dim) ** 0.5


# ---- window in 8 bits


@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-7, 1e-3, 1.0, 3e3]))
@settings(max_examples=30, deadline=None)
def test_a_row_is_off_by_half_a_step_at_most(seed, scale):
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) * scale
    codes, steps = encode_rows(rows)
    assert codes.dtype == torch.int8 and steps.dtype == torch.float16 and codes.abs().max() <= 127
    # Steps are rounded to fp16, the largest element may lie beyond 127 of them.
    bound = 0.5 * steps.float() + rows.abs().amax(-1) * 2**-10 + 2**-18
    assert ((decode_rows(codes, steps) - rows).abs() <= bound.unsqueeze(-1)).all()


def test_rows_of_zeros_and_of_what_is_not_finite():
    rows = torch.tensor([[0.0] * 16, [float("inf")] + [1.0] * 15, [float("nan")] + [1.0] * 15])
    decoded = decode_rows(*encode_rows(rows))
    assert decoded.isfinite().all() and not decoded[0].any() and decoded[1, 0] > 65000
    torch.testing.assert_close(decoded[2, 1:], torch.ones(15), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "options, coded",
    [
        ({"bits": 2}, True), ({"bits": 3}, True), ({"key_bits": 3, "value_bits": 4}, True), ({"bits": 4}, False),
        ({"key_bits": 8, "value_bits": 2}, False), ({"bits": 4, "quantized_residual": True}, True),
        ({"bits": 2, "quantized_residual": False}, False),
    ],
    ids=str,
)  # fmt: skip
def test_the_window_is_in_8_bits_where_codes_are_coarser(options, coded):
    state = Store(plus(**options), 1, 1, 32, 50).state
    for role in ROLES:
        assert (state[role][f"{role}_residual"].dtype == torch.int8) is coded
        assert (state[role][f"{role}_residual_scale"].numel() > 0) is coded
    said = plus(**options).describe()
    assert said.endswith(", without quantized_residual") is (options == {"bits": 2, "quantized_residual": False})
    assert said.endswith(", window in 8 bits") is (options == {"bits": 4, "quantized_residual": True})


@pytest.mark.parametrize("sizes", [[100], [90, 1, 9], [1, 31, 33, 35]])
def test_the_newest_tokens_are_read_from_8_bits(sizes):
    key, value = (random_tokens(2, 2, 100, 64) for _ in range(2))
    store, exact = (Store(plus(quantized_residual=on), 2, 2, 64, 200) for on in (True, False))
    for one in (store, exact):
        one.append_in_chunks(key, value, sizes)
    assert store.state["key"]["key_residual"].dtype == torch.int8
    assert exact.state["key"]["key_residual_scale"].numel() == 0
    for role, tokens in (("key", key), ("value", value)):
        error = (store.read(role) - tokens)[:, :, store.packed[role] :].square().mean() / tokens.square().mean()
        assert 1e-6 < error < 1e-4, "about 45 dB"
        both = [one.read(role)[:, :, : store.packed[role]] for one in (store, exact)]
        assert (both[0] - both[1]).square().mean() < 0.02 * tokens.square().mean()
    query = torch.randn(2, 4, 1, 64)
    results = [one.attend(query, key[:, :, :1], value[:, :, :1]) for one in (store, exact)]
    assert (results[0] - results[1]).norm() < 0.05 * results[1].norm()


def test_tokens_that_go_back_to_the_window_are_encoded_again():
    key, value = (random_tokens(1, 2, 200, 64) for _ in range(2))
    store = Store(plus(), 1, 2, 64, 300)
    store.append(key, value)
    before = [store.read(role)[:, :, :70] for role in ROLES]
    store.crop(70)
    for role, was in zip(ROLES, before, strict=True):
        assert store.packed[role] == 64
        torch.testing.assert_close(store.read(role), was, atol=0.03, rtol=0)


# ---- switches


def test_without_its_parts_it_is_ott():
    key, value = (random_tokens(2, 2, 250, 32) for _ in range(2))
    off = dict.fromkeys(SWITCHES, False)
    grids = dict(group_size=32, residual_length=16, outlier_capacity=3, spill_capacity=3)
    one = Store(make_config("ott", **grids).at_layer(3), 2, 2, 32, 300)
    two = Store(make_config("ott+", **grids, **off, group_seats=0).at_layer(3), 2, 2, 32, 300)
    for store in (one, two):
        store.append_in_chunks(key, value, [100, 1, 149])
    for role in ROLES:
        for name, tensor in one.state[role].items():
            assert torch.equal(two.state[role][name], tensor), name
    assert two.state["key"]["key_order"].numel() == 0


@pytest.mark.parametrize("switch", ["mixed_keys", "range_search", "rotate_values"])
def test_each_part_lowers_the_error(switch):
    torch.manual_seed(0)
    channels = torch.randn(1, 2, 1, 64).exp()
    key, value = (random_tokens(1, 2, 400, 64) * channels + torch.randn(1, 2, 400, 64) for _ in range(2))
    errors = []
    for on in (True, False):
        store = Store(plus(**{switch: on}), 1, 2, 64, 450)
        store.append(key, value)
        exact = (value if switch == "rotate_values" else key)[:, :, : store.packed["key"]]
        read = store.read("value" if switch == "rotate_values" else "key")[:, :, : store.packed["key"]]
        errors.append((read - exact).square().mean().item())
    assert errors[0] < 0.95 * errors[1]


def test_bits_are_those_of_the_formula():
    # Keys 2 + 32 / 128; values 2 + 16 / 64; 95.5 tokens on average in the window, 8 + 16 / 64; in each page a seat, its
    # scale and its row.
    scheme, config = get_scheme("ott+"), make_config("ott+", 2).at_layer(3)
    store = Store(config, 1, 2, 64, 300, torch.float16)
    bits = [formula_bits(scheme, config, role, store.shape, 8192) for role in ROLES]
    window = 95.5 / 8192
    seat = (8 + 16 / 64 + 8 / 64) / 128
    assert bits == pytest.approx([(1 - window) * 2.25 + window * 8.25 + seat] * 2, abs=1e-3)
    assert sum(bits) / 2 < 2.4


def test_switches_are_checked_and_shown():
    assert plus(mixed_keys=False).describe().endswith("seats 1, without mixed_keys")
    assert plus(group_seats=0, outlier_capacity=2).describe().endswith("pool 2+3")
    with pytest.raises(Exception, match="group_seats must be 0 beside a pool"):
        plus(outlier_capacity=3)
    with pytest.raises(Exception, match="group_seats must be from 0 to 16"):
        plus(group_seats=17)
    assert make_config("ott+", exempt_layers=(3,)).at_layer(3).group_seats == 0
    with pytest.raises(Exception, match="range_search must be True or False"):
        plus(range_search=1)
    assert make_config("ott+", 3).at_layer(0).mixes_keys is False, "only two bits are divided"
