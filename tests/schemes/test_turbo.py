"""What TurboQuant stores: nearest entries of one table after a random rotation, and one norm a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_store import PAGE, ROLES, Store, random_tokens

from ottfx import turbo_codes
from ottfx.errors import ConfigError
from ottfx.lloyd_max import sphere_magnitudes
from ottfx.metrics import formula_bits
from ottfx.registry import make_config
from ottfx.rotation import random_signs, rotate, rotate_back, rotation


def signed_table(head_dim, bits):
    values = torch.tensor(sphere_magnitudes(head_dim, bits).values)
    return torch.cat([-values.flip(0), values])


def read_back(x, bits, norm_correction=False, seed=0):
    words, norm = turbo_codes.encode(x, bits, norm_correction, seed)
    return rotate_back(turbo_codes.decode(words, norm, bits, x.shape[-1]), torch.float32, seed)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(turbo_codes.CODE_BITS),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    exponent=st.integers(-6, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_coordinate_becomes_the_nearest_entry(bits, head_dim, exponent, seed):
    x = torch.randn(1, 2, 5, head_dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    words, norm = turbo_codes.encode(x, bits, False, seed)
    length = x.norm(dim=-1)
    torch.testing.assert_close(norm.float(), length, rtol=2**-11, atol=0)
    unit, table = rotate(x, seed) / length.unsqueeze(-1), signed_table(head_dim, bits)
    decoded = turbo_codes.decode(words, torch.ones_like(norm), bits, head_dim)
    assert torch.isin(decoded, table).all()
    best = (unit.unsqueeze(-1) - table).abs().amin(-1)
    torch.testing.assert_close((unit - decoded).abs(), best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", turbo_codes.CODE_BITS)
def test_a_code_is_where_the_layout_says(bits):
    head_dim = 80
    x = torch.randn(1, 1, 3, head_dim)
    words, norm = turbo_codes.encode(x, bits, False, 0)
    assert words.shape[-1] == turbo_codes.words_per_token(head_dim, bits)
    assert turbo_codes.channels(words.shape[-1], bits) == head_dim
    table, decoded = sphere_magnitudes(head_dim, bits).values, turbo_codes.decode(words, norm, bits, head_dim)

    def field(token, start, width, channel):
        word = int(words[0, 0, token, start + channel // (32 // width)])
        return (word >> (width * (channel % (32 // width)))) & (2**width - 1)

    for token in range(3):
        for channel in range(head_dim):
            if bits == 3:
                place, negative = field(token, 0, 2, channel), field(token, 5, 1, channel)
            else:
                code = field(token, 0, bits, channel)
                place, negative = code % 2 ** (bits - 1), code // 2 ** (bits - 1)
            expected = table[place] * (-1) ** negative * norm[0, 0, token].item()
            assert decoded[0, 0, token, channel].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_distortion_is_the_published_one(bits, distortion):
    # TurboQuant, theorem 1: 0.117, 0.03 and 0.009 of the squared norm.
    x = torch.randn(1, 1, 4000, 128) * torch.rand(1, 1, 4000, 1)
    error = (x - read_back(x, bits)).square().sum(-1) / x.square().sum(-1)
    assert error.mean().item() == pytest.approx(distortion, rel=0.03)
    # Whatever the vector: in a single channel, or all channels alike.
    for worst in (torch.eye(128), torch.ones(1, 128), 30 * torch.eye(128) + torch.randn(128, 128)):
        errors = [
            (worst - read_back(worst[None, None], bits, seed=seed)[0, 0]).square().sum(-1) / worst.square().sum(-1)
            for seed in range(40)
        ]
        assert torch.cat(errors).mean() < 3 * distortion


def test_norm_correction_gives_the_norm_back():
    x = random_tokens(1, 2, 50, 64)
    short, exact = read_back(x, 2), read_back(x, 2, norm_correction=True)
    torch.testing.assert_close(exact.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    assert (short.norm(dim=-1) / x.norm(dim=-1)).mean() < 0.96


@pytest.mark.parametrize("bits", turbo_codes.CODE_BITS)
def test_what_is_not_finite_or_zero(bits):
    x = torch.randn(1, 1, 4, 32)
    x[0, 0, 0] = 0.0
    x[0, 0, 1, 3] = torch.inf
    x[0, 0, 2, 3] = torch.nan
    read = read_back(x, bits)
    assert read.isfinite().all() and not read[0, 0, 0].any()
    clean = x[0, 0, 2].nan_to_num(0.0)
    assert (read[0, 0, 2] - clean).norm() < 0.5 * clean.norm()


@pytest.mark.parametrize(
    ("options", "head_dim", "bits"),
    [
        ({}, 128, (2 + 16 / 128, 2 + 16 / 128)),
        ({"bits": 3}, 64, (3 + 16 / 64, 3 + 16 / 64)),
        ({"key_bits": 4, "value_bits": 2}, 128, (4.125, 2.125)),
        # 80 signs take three words.
        ({"bits": 3}, 80, ((2 * 80 + 96 + 16) / 80,) * 2),
    ],
)
def test_bytes_are_the_published_bits(options, head_dim, bits):
    store = Store(make_config("turbo", **options), 2, 3, head_dim, 1000, torch.float16)
    for role, expected in zip(ROLES, bits, strict=True):
        held = sum(tensor.nbytes for tensor in store.state[role].values()) * 8
        assert held / (2 * 3 * store.shape.pages * PAGE * head_dim) == expected
        assert formula_bits(store.scheme, store.config, role, store.shape, 700) == expected


def test_rotation_by_a_seed_is_orthogonal_and_of_that_seed():
    for head_dim in (16, 80, 128):
        matrix = rotation(head_dim, torch.device("cpu"), 3)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
        assert torch.equal(matrix, rotation(head_dim, torch.device("cpu"), 3))
        assert not torch.equal(matrix, rotation(head_dim, torch.device("cpu"), 4))


def test_signs_are_random():
    channel = torch.arange(256)
    signs = torch.stack([random_signs(channel, seed) for seed in range(400)])
    assert signs.abs().eq(1).all() and signs.unique(dim=0).shape[0] == 400
    # Means of 400 and of 256 fair coins, and of products of neighbours: within five standard deviations.
    assert signs.mean(0).abs().max() < 5 / 400**0.5
    assert signs.mean(1).abs().max() < 5 / 256**0.5
    assert (signs[:, 1:] * signs[:, :-1]).mean(0).abs().max() < 5 / 400**0.5
    assert (signs[1:] * signs[:-1]).mean(1).abs().max() < 5 / 256**0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 8}, r"ottfx.turbo: bits must be one of \[2, 3, 4\]. Got bits=8"),
        ({"key_bits": 1}, r"key_bits must be one of"),
        ({"seed": -1}, r"seed must be a number in \[0, 2\*\*31\). Got seed=-1"),
        ({"norm_correction": 1}, r"norm_correction must be True or False"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ConfigError, match=text):
        make_config("turbo", **options)


def test_descriptions():
    assert make_config("turbo").describe() == "turbo 2-bit"
    other = make_config("turbo", key_bits=4, value_bits=3, norm_correction=True, seed=5)
    assert other.describe() == "turbo 4-bit keys, 3-bit values, norm correction, seed 5"
