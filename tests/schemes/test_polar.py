"""What PolarQuant stores: nearest angles of a tree over blocks of 16 rotated coordinates, and radii."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import PAGE, ROLES, Store, random_tokens

from ottfx import polar_codes
from ottfx.errors import ConfigError
from ottfx.lloyd_max import polar_angles
from ottfx.metrics import formula_bits
from ottfx.registry import make_config
from ottfx.rotation import rotate, rotate_back


def read_back(x, first_bits=4, seed=0):
    return rotate_back(polar_codes.decode(*polar_codes.encode(x, first_bits, seed), first_bits), torch.float32, seed)


def codebook(level, first_bits):
    """All angles of a level, as the paper writes them: those of level 1 on the whole circle."""
    if level > 1:
        return torch.tensor(polar_angles(level, 2).values)
    cells = 2**first_bits
    return (torch.arange(cells) + 0.5) * (2 * math.pi / cells)


def by_angles(y, first_bits):
    """One block [16] through the transform of the paper, with arcus tangent and nearest angles, and back."""
    lengths, angles = y.double(), []
    for level in (1, 2, 3, 4):
        angle = torch.atan2(lengths[1::2], lengths[0::2]) % (2 * math.pi)
        table = codebook(level, first_bits).double()
        distance = (angle.unsqueeze(-1) - table).abs()
        angles.append(table[torch.minimum(distance, 2 * math.pi - distance).argmin(-1)])
        lengths = torch.hypot(lengths[0::2], lengths[1::2])
    result = torch.empty(16, dtype=torch.float64)
    for i in range(16):
        product = lengths.half().double()[0]
        for level in (1, 2, 3, 4):
            angle = angles[level - 1][i >> level]
            product = product * (angle.sin() if (i >> (level - 1)) & 1 else angle.cos())
        result[i] = product
    return result


@settings(max_examples=25, deadline=None)
@given(
    first_bits=st.sampled_from(polar_codes.FIRST_BITS),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    exponent=st.integers(-4, 6),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_block_is_that_of_the_papers_transform(first_bits, head_dim, exponent, seed):
    x = torch.randn(1, 1, 2, head_dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    decoded = polar_codes.decode(*polar_codes.encode(x, first_bits, seed), first_bits)
    for rotated, blocks in zip(rotate(x, seed)[0, 0], decoded[0, 0], strict=True):
        for y, got in zip(rotated.split(16), blocks.split(16), strict=True):
            torch.testing.assert_close(got.double(), by_angles(y, first_bits), atol=2e-6 * 2.0**exponent * 4, rtol=1e-4)


@pytest.mark.parametrize("first_bits", polar_codes.FIRST_BITS)
def test_norms_are_kept(first_bits):
    x = random_tokens(1, 2, 50, 64)
    blocks = rotate(x, 0).unflatten(-1, (-1, 16))
    decoded = polar_codes.decode(*polar_codes.encode(x, first_bits, 0), first_bits).unflatten(-1, (-1, 16))
    torch.testing.assert_close(decoded.norm(dim=-1), blocks.norm(dim=-1), rtol=2**-11 + 1e-5, atol=0)


def test_a_code_is_where_the_layout_says():
    head_dim, blocks = 80, 5
    angles, upper, radius = polar_codes.encode(torch.randn(1, 1, 1, head_dim), 4, 0)
    assert (angles.shape[-1], upper.shape[-1], radius.shape[-1]) == (5, 5 + 3 + 2, 5)
    decoded = polar_codes.decode(angles, upper, radius, 4)[0, 0, 0]
    angles, upper, radius = (part[0, 0, 0].tolist() for part in (angles, upper, radius))
    for channel in range(head_dim):
        value = radius[channel // 16]
        for level, start in ((4, blocks + 3), (3, blocks), (2, 0)):
            node = channel >> level
            place = (upper[start + node // 4] >> (2 * (node % 4))) & 3
            angle = polar_angles(level, 2).values[place]
            value *= math.sin(angle) if (channel >> (level - 1)) & 1 else math.cos(angle)
        code = (angles[channel // 16] >> (4 * (channel // 2 % 8))) & 15
        angle = (code % 4 + 0.5) * math.pi / 8
        if channel % 2:
            value *= math.sin(angle) * (-1) ** (code >> 3)
        else:
            value *= math.cos(angle) * (-1) ** ((code >> 2) & 1)
        assert decoded[channel].item() == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_distortion_falls_with_bits_and_is_near_that_of_a_table_of_its_size():
    x = torch.randn(1, 1, 2000, 128) * torch.rand(1, 1, 2000, 1)
    distortion = [
        ((x - read_back(x, bits)).square().sum(-1) / x.square().sum(-1)).mean().item()
        for bits in polar_codes.FIRST_BITS
    ]
    assert distortion == sorted(distortion, reverse=True)
    # Between tables of 3 and of 4 bits for each coordinate (Max, 1960): 3.875 bits here.
    assert 0.009497 < distortion[-1] < 0.03454


@pytest.mark.parametrize("first_bits", polar_codes.FIRST_BITS)
def test_what_is_not_finite_or_zero(first_bits):
    x = torch.randn(1, 1, 4, 32)
    x[0, 0, 0] = 0.0
    x[0, 0, 1, 3] = torch.inf
    x[0, 0, 2, 3] = torch.nan
    read = read_back(x, first_bits)
    assert read.isfinite().all() and not read[0, 0, 0].any()
    clean = x[0, 0, 2].nan_to_num(0.0)
    assert (read[0, 0, 2] - clean).norm() < 1.1 * clean.norm()


@pytest.mark.parametrize(
    ("first_bits", "head_dim", "bits"),
    [
        (4, 128, 3.875),
        (2, 128, 2.875),
        (1, 128, 2.375),
        (4, 64, 3.875),
        # Levels 3 and 4 of five blocks take three and two bytes.
        (4, 80, (5 * 32 + (5 + 3 + 2) * 8 + 5 * 16) / 80),
    ],
)
def test_bytes_are_the_published_bits(first_bits, head_dim, bits):
    store = Store(make_config("polar", first_bits=first_bits), 2, 3, head_dim, 1000, torch.float16)
    for role in ROLES:
        held = sum(tensor.nbytes for tensor in store.state[role].values()) * 8
        assert held / (2 * 3 * store.shape.pages * PAGE * head_dim) == bits
        assert formula_bits(store.scheme, store.config, role, store.shape, 700) == bits


def test_options_are_checked_and_described():
    with pytest.raises(ConfigError, match=r"ottfx.polar: first_bits must be one of \[1, 2, 4\]. Got first_bits=3"):
        make_config("polar", first_bits=3)
    with pytest.raises(ConfigError, match=r"ottfx.polar: seed must be"):
        make_config("polar", seed=2**31)
    assert make_config("polar").describe() == "polar 4/2/2/2-bit angles"
    assert make_config("polar", first_bits=1, seed=4).describe() == "polar 1/2/2/2-bit angles, seed 4"
