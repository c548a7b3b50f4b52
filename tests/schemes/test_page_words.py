"""Words of a page and constants of a group: docs/storage.md read element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ottfx.errors import ConfigError
from ottfx.reference import (
    dequantize_affine,
    make_finite,
    pack_page,
    quantize_affine,
    round_to_half,
    unpack_page,
    words_per_page,
)

WIDTHS = [2, 3, 4, 8]


def element_of(words, bits, row, column, rows, contraction):
    """The code at (row, column), found by the table in docs/storage.md."""

    def field(word, position, width):
        return (int(word) >> position) & (2**width - 1)

    width = 2 if bits == 3 else bits
    per_word = 32 // width
    i = column % per_word
    code = field(words[column // per_word * rows + row], width * (i // 2) + 16 * (i % 2), width)
    if bits == 3:
        plane, half = words[rows * contraction // 16 :], rows // 2
        i, upper = column % 16, row >= half
        word = plane[column // 16 * half + row % half]
        code |= field(word, i // 2 + 16 * (i % 2) + 8 * upper, 1) << 2
    return code


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "contraction"), [(128, 16), (80, 128)])
def test_words_are_laid_out_as_documented(bits, rows, contraction):
    codes = torch.randint(0, 2**bits, (rows, contraction), dtype=torch.uint8)
    words = pack_page(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (words_per_page(rows, contraction, bits),)
    flat = words.tolist()
    for index in torch.randperm(rows * contraction)[:400].tolist():
        row, column = divmod(index, contraction)
        assert element_of(flat, bits, row, column, rows, contraction) == codes[row, column]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_unpack_inverts_pack(bits, head_dim):
    for rows, contraction in ((128, head_dim), (head_dim, 128)):
        codes = torch.randint(0, 2**bits, (2, 3, rows, contraction), dtype=torch.uint8)
        assert torch.equal(unpack_page(pack_page(codes, bits), bits, rows, contraction), codes)


def test_unsupported_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"bits must be one of \[2, 3, 4, 8\]. Got 5"):
        pack_page(torch.zeros(16, 16, dtype=torch.uint8), 5)
    with pytest.raises(ConfigError, match=r"multiples of 2 and of 16. Got \[16, 24\]"):
        pack_page(torch.zeros(16, 24, dtype=torch.uint8), 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    members=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=24),
)
def test_round_trip_error_is_within_half_a_step(bits, members):
    x = torch.tensor(members)
    codes, scale, zero_point = quantize_affine(x, bits)
    error = (dequantize_affine(codes, scale, zero_point) - x).abs().max().item()
    # Half a step, plus what rounding both constants to fp16 (11 bits, spacing 2**-24 at least) can move the grid by.
    levels = 2**bits - 1
    slack = 2.0**-11 * (zero_point.float().abs() + levels * scale.float()).item() + 2.0**-24 * (levels + 1)
    assert error <= 0.5 * scale.item() + slack
    assert scale >= 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_constant_group_costs_nothing(bits):
    x = torch.full((4, 32), 1.5)
    codes, scale, zero_point = quantize_affine(x, bits)
    assert codes.count_nonzero() == scale.count_nonzero() == 0
    assert torch.equal(dequantize_affine(codes, scale, zero_point), x)


def test_members_that_take_no_part_do_not_widen_the_range():
    x = torch.tensor([[1.0, 2.0, 3.0, 1000.0], [5.0, 6.0, 7.0, 8.0]])
    taking_part = torch.tensor([[True, True, True, False], [False] * 4])
    codes, scale, zero_point = quantize_affine(x, 2, taking_part=taking_part)
    assert zero_point.tolist() == [1.0, 0.0]
    assert scale.tolist() == pytest.approx([2 / 3, 0.0], rel=1e-3)
    assert codes[0, 3] == 3
    assert codes[1].count_nonzero() == 0


def test_infinities_are_clamped_and_nan_is_zero():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -2.0])
    assert make_finite(x).tolist() == [65504.0, -65504.0, 0.0, 65504.0, -2.0]
    codes, scale, zero_point = quantize_affine(x, 8)
    assert torch.isfinite(dequantize_affine(codes, scale, zero_point)).all()


def test_the_sign_of_a_scale_is_not_a_value():
    codes = torch.tensor([3], dtype=torch.uint8)
    scale, zero_point = torch.tensor(0.5).half(), torch.tensor(1.0).half()
    assert dequantize_affine(codes, -scale, zero_point) == dequantize_affine(codes, scale, zero_point) == 2.5


def test_rounding_by_arithmetic_equals_rounding_by_cast():
    sizes = [10.0**power for power in range(-9, 5)]
    edges = torch.tensor([0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-14, 65504.0, 65503.9, 2049.0, 2051.0])
    x = torch.cat([*(torch.randn(5000) * size for size in sizes), edges, -edges]).clamp(-65504, 65504)
    assert torch.equal(round_to_half(x), x.half().float())
