"""Tables against published ones, against their own definition, and against samples of what they quantize."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ottfx.lloyd_max import lloyd_max, polar_angles, sphere_magnitudes

# Max, Quantizing for minimum distortion, 1960, table 1: outputs of the normal distribution's quantizers, and the error.
MAX_1960 = {
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def normal(x):
    return np.exp(-x * x / 2)


@pytest.mark.parametrize("bits", MAX_1960)
def test_normal_distribution_has_the_published_tables(bits):
    values, error = MAX_1960[bits]
    half = lloyd_max(normal, 0.0, 12.0, 2 ** (bits - 1))
    assert half.values == pytest.approx(values, rel=5e-4)
    whole = lloyd_max(normal, -12.0, 12.0, 2**bits)
    assert whole.values == pytest.approx([*reversed([-v for v in half.values]), *half.values], abs=1e-5)
    assert mean_error(normal, whole, -12.0, 12.0) == pytest.approx(error, rel=1e-3)


def mean_error(density, table, low, high):
    x = np.linspace(low, high, 200_001)
    nearest = np.asarray(table.values)[np.searchsorted(table.thresholds, x)]
    weight = density(x)
    return float((weight * (x - nearest) ** 2).sum() / weight.sum())


@pytest.mark.parametrize("bits", MAX_1960)
def test_coordinates_of_long_unit_vectors_are_normal(bits):
    assert np.array(sphere_magnitudes(4096, bits).values) * 64 == pytest.approx(MAX_1960[bits][0], rel=3e-3)
    # Short vectors have no long tails.
    assert sphere_magnitudes(16, bits).values[-1] * 4 < MAX_1960[bits][0][-1] * 0.98


@settings(max_examples=25, deadline=None)
@given(power=st.floats(0.0, 40.0), levels=st.integers(1, 8), high=st.floats(0.5, 3.0))
def test_values_are_means_of_their_cells_and_thresholds_lie_between(power, levels, high):
    def density(x):
        return (1 - (x / high) ** 2 * 0.999) ** power

    table = lloyd_max(density, 0.0, high, levels)
    assert list(table.values) == sorted(table.values) and len(table.values) == levels
    middles = [(a + b) / 2 for a, b in zip(table.values, table.values[1:], strict=False)]
    assert table.thresholds == pytest.approx(middles, abs=1e-9 * high)
    x = np.linspace(0.0, high, 400_001)
    cell, weight = np.searchsorted(table.thresholds, x), density(x)
    means = np.bincount(cell, weight * x, levels) / np.bincount(cell, weight, levels)
    assert table.values == pytest.approx(means, abs=1e-4 * high)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_densities_are_those_of_random_unit_vectors(head_dim):
    unit = torch.nn.functional.normalize(torch.randn(40_000, head_dim, dtype=torch.float64), dim=-1)
    sampled = sampled_cells(unit.abs(), sphere_magnitudes(head_dim, 4))
    assert sampled == pytest.approx(sphere_magnitudes(head_dim, 4).values, rel=0.01)


def sampled_cells(x, table):
    cell = torch.bucketize(x.flatten(), torch.tensor(table.thresholds, dtype=x.dtype))
    return [x.flatten()[cell == i].mean().item() for i in range(len(table.values))]


def test_angles_are_those_of_the_polar_tree_of_random_vectors():
    lengths = torch.randn(60_000, 16, dtype=torch.float64).abs()
    for level, bits in ((1, 4), (2, 2), (3, 2), (4, 2)):
        angle = torch.atan2(lengths[:, 1::2], lengths[:, 0::2])
        table = polar_angles(level, bits)
        assert len(table.values) == 4
        assert sampled_cells(angle, table) == pytest.approx(table.values, rel=0.01)
        assert table.values[::-1] == pytest.approx([math.pi / 2 - value for value in table.values], abs=1e-6)
        lengths = torch.hypot(lengths[:, 0::2], lengths[:, 1::2])
