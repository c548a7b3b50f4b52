"""What the PolarQuant of Wu et al. stores: cells of radius and angle of rotary pairs, on grids of groups of tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import PAGE, ROLES, Store, random_tokens

from ottfx.errors import ConfigError
from ottfx.metrics import formula_bits
from ottfx.reference import unpack_page
from ottfx.registry import make_config

WIDTHS = st.sampled_from([2, 3, 4, 8])


def filled(length, head_dim=32, batch_size=1, heads=2, valid=None, tokens=None, **options):
    """Return a store with `length` tokens, and their keys."""
    key = random_tokens(batch_size, heads, length, head_dim) if tokens is None else tokens
    options = {"group_size": 32, "residual_length": 32, **options}
    store = Store(make_config("polar_pairs", **options), batch_size, heads, head_dim, length)
    store.append(key, key.clone(), None if valid is None else valid[:, None, None])
    return store, key


def by_the_paper(key, radius_bits, angle_bits):
    """A group of one pair through the paper's quantizer in double precision: `key` [tokens, 2], and how far it is off.

    Returns the keys read back, and the width of a cell of radius and angle.
    """
    first, second = key.double().unbind(-1)
    parts, widths = [], []
    for x, bits in (
        (torch.hypot(first, second), radius_bits),
        (torch.atan2(second, first) % (2 * math.pi), angle_bits),
    ):
        low, width = x.min(), (x.max() - x.min()) / 2**bits
        code = ((x - low) / width).floor().clamp(0, 2**bits - 1)
        parts.append(low + (code + 0.5) * width)
        widths.append(width.item())
    radius, angle = parts
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), widths


@settings(max_examples=20, deadline=None)
@given(
    radius_bits=WIDTHS,
    angle_bits=WIDTHS,
    head_dim=st.sampled_from([16, 64, 80]),
    group_size=st.sampled_from([32, 64]),
    exponent=st.integers(-4, 6),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_group_is_that_of_the_papers_quantizer(radius_bits, angle_bits, head_dim, group_size, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    key = (torch.randn(1, 1, group_size, head_dim, generator=generator) + 1) * 2.0**exponent
    store, _ = filled(
        group_size, head_dim, heads=1, tokens=key, radius_bits=radius_bits, angle_bits=angle_bits,
        group_size=group_size, residual_length=group_size,
    )  # fmt: skip
    assert store.packed["key"] == group_size
    got = store.read("key")[0, 0]
    far = 0
    for i in range(head_dim // 2):
        pair = key[0, 0][:, [i, i + head_dim // 2]]
        want, (radius_width, angle_width) = by_the_paper(pair, radius_bits, angle_bits)
        radius = pair.double().norm(dim=-1)
        error = (got[:, [i, i + head_dim // 2]].double() - want).norm(dim=-1)
        # Ends in fp16 move all cells by a little, and a few tokens near a border into the cell beside.
        little = (radius.max() + 2 * math.pi * radius) * 2.0**-9
        far += (error > little).sum().item()
        assert (error <= little + radius_width + (radius + radius_width) * angle_width).all()
    assert far <= 0.02 * group_size * head_dim / 2 * 2 ** (max(radius_bits, angle_bits) - 3)


@settings(max_examples=15, deadline=None)
@given(bits=WIDTHS, seed=st.integers(0, 2**31 - 1))
def test_radius_and_angle_are_off_by_at_most_half_a_cell(bits, seed):
    key = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(seed)) * 3
    store, _ = filled(32, 16, heads=1, tokens=key, key_bits=bits)
    read = store.read("key")
    for x, got, name in zip(polar(key), polar(read), ("key_radius", "key_angle"), strict=True):
        half_cell = store.state["key"][f"{name}_scale"][:, :, 0, :1].float() / 2
        # fp16 ends: a cell at either end may be further away by their rounding.
        assert ((x - got).abs() <= half_cell + 2.0**-9 * x.abs().amax()).all()


def polar(x):
    first, second = x.chunk(2, dim=-1)
    return torch.hypot(first, second), torch.atan2(second, first) % (2 * math.pi)


def test_a_code_is_where_the_layout_says():
    store, _ = filled(160, head_dim=48, heads=1, radius_bits=3, angle_bits=2, group_size=64, residual_length=64)
    state = {name: tensor[0, 0] for name, tensor in store.state["key"].items() if name != "residual_valid"}
    read = store.read("key")[0, 0]
    for token, i in ((0, 0), (63, 5), (64, 12), (127, 23)):
        page, row, group = token // PAGE, token % PAGE, token % PAGE // 64
        words = state["key_angle"][page].tolist()
        angle_code = (words[row // 16 * 24 + i] >> (2 * (row % 16 // 2) + 16 * (row % 2))) & 3
        radius_code = unpack_page(state["key_radius"][page], 3, 24, PAGE)[i, row].item()
        radius, angle = (
            state[f"{name}_zero_point"][page, group, i].item()
            + (code + 0.5) * state[f"{name}_scale"][page, group, i].item()
            for name, code in (("key_radius", radius_code), ("key_angle", angle_code))
        )
        assert read[token, i].item() == pytest.approx(radius * math.cos(angle), abs=1e-5)
        assert read[token, i + 24].item() == pytest.approx(radius * math.sin(angle), abs=1e-5)


def test_the_window_leaves_all_at_once():
    store, key = filled(127, group_size=64, residual_length=128)
    assert store.packed == {"key": 0, "value": 0}
    assert all(torch.equal(store.read(role), key) for role in ROLES)
    store.append(key[:, :, :1], key[:, :, :1])
    assert store.packed == {"key": 128, "value": 128}
    assert not torch.equal(store.read("key")[:, :, :127], key)


def test_padding_widens_no_range():
    key = random_tokens(1, 2, 64, 32)
    key[:, :, :20] *= 50
    key[:, :, 32:] *= 50
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, :20] = valid[:, 32:] = False
    padded, _ = filled(64, tokens=key, valid=valid)
    scale = padded.state["key"]["key_radius_scale"][:, :, 0]
    radius, _ = polar(key[:, :, 20:32])
    torch.testing.assert_close(scale[:, :, 0].float() * 16, radius.amax(2) - radius.amin(2), rtol=2e-2, atol=1e-3)
    assert not scale[:, :, 1].any(), "a group of padding"


def test_what_is_not_finite_or_zero():
    key = random_tokens(1, 1, 32, 32)
    key[0, 0, 0] = 0.0
    key[0, 0, 1, 3] = torch.nan
    key[0, 0, 2, 4] = torch.inf
    key[0, 0, :, 5] = key[0, 0, :, 21] = -0.0
    store, _ = filled(32, heads=1, tokens=key, key_bits=8)
    read = store.read("key")
    assert read.isfinite().all()
    assert not read[0, 0, :, [5, 21]].any()
    assert (read[0, 0, 3:, 6] - key[0, 0, 3:, 6]).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "head_dim", "key_bits", "value_bits"),
    [
        ({}, 128, 4.25, 2.25),
        ({"group_size": 32}, 64, 5, 3),
        ({"radius_bits": 2}, 128, 3.25, 2.25),
        ({"key_bits": 3, "value_group_size": 16}, 80, 3.25, 4),
    ],
)
def test_bytes_are_the_published_bits(options, head_dim, key_bits, value_bits):
    store = Store(make_config("polar_pairs", **options), 2, 3, head_dim, 1000, torch.float16)
    elements = 2 * 3 * store.shape.pages * PAGE * head_dim
    window = 2 * 3 * store.config.residual_length * head_dim
    for role, bits in zip(ROLES, (key_bits, value_bits), strict=True):
        specs = store.scheme.state_spec(store.config, role, store.shape)
        held = sum(tensor.nbytes for name, tensor in store.state[role].items() if specs[name].paged_dim == 2)
        assert held * 8 == bits * elements
        assert store.state[role][f"{role}_residual"].nbytes == 2 * window
        # On the average half of the window is filled.
        expected = (bits * (700 - 63.5) + 16 * 63.5) / 700
        assert formula_bits(store.scheme, store.config, role, store.shape, 700) == pytest.approx(expected)


def test_options_are_checked_and_described():
    with pytest.raises(ConfigError, match=r"ottfx.polar_pairs: angle_bits must be None or one of \[2, 3, 4, 8\]. Got"):
        make_config("polar_pairs", angle_bits=5)
    with pytest.raises(
        ConfigError, match=r"ottfx.polar_pairs: residual_length must be a positive multiple of group_size"
    ):
        make_config("polar_pairs", residual_length=32)
    default = "polar_pairs 4-bit radii, 4-bit angles, 2-bit values, group 128, residual 128"
    assert make_config("polar_pairs").describe() == default
    other = make_config("polar_pairs", radius_bits=2, value_bits=4, group_size=32).at_layer(0)
    assert other.describe() == "polar_pairs 2-bit radii, 4-bit angles, 4-bit values, group 32, residual 128"
