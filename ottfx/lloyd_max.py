"""Lloyd-Max quantizers of known densities: the tables of schemes that quantize what a random rotation leaves.

After a random rotation the distribution of what is stored is known in closed form, so the best table of a given size
follows from it by numerical integration: nothing is calibrated, nothing is stored.

Source: Max, Quantizing for minimum distortion, IRE Transactions on Information Theory 6(1), 1960; Lloyd, Least squares
quantization in PCM, IEEE Transactions on Information Theory 28(2), 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

POINTS = 1 << 16
"""Intervals of the numerical integration."""
SETTLED = 1e-12
"""Movement of the thresholds, as a share of the interval, at which the iteration ends."""
MOST_STEPS = 20_000


@dataclass(frozen=True, slots=True)
class Codebook:
    """A scalar quantizer: `values[i]` stands for what lies between `thresholds[i - 1]` and `thresholds[i]`."""

    values: tuple[float, ...]
    """Ascending; each is the mean of its cell."""
    thresholds: tuple[float, ...]
    """One fewer than values; each is halfway between two of them."""


def lloyd_max(density: Callable[[Any], Any], low: float, high: float, levels: int) -> Codebook:
    """Compute the quantizer of `levels` values with the least mean squared error.

    Args:
        density: function of a float64 array, positive inside the interval; need not be normalized. The optimum is
            unique where its logarithm is concave.
        low: where the density begins.
        high: where it ends.
        levels: number of values.
    """
    x = np.linspace(low, high, POINTS + 1)
    weight = np.asarray(density(x), dtype=np.float64) * np.ones_like(x)
    mass, moment = _integral(x, weight), _integral(x, weight * x)
    thresholds = np.interp(np.arange(1, levels) / levels * mass[-1], mass, x)
    values = _centroids(x, mass, moment, thresholds)
    for _ in range(MOST_STEPS):
        moved = (values[1:] + values[:-1]) / 2
        settled = np.abs(moved - thresholds).max(initial=0.0) <= SETTLED * (high - low)
        thresholds, values = moved, _centroids(x, mass, moment, moved)
        if settled:
            break
    return Codebook(tuple(values.tolist()), tuple(thresholds.tolist()))


def _integral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])


def _centroids(x: np.ndarray, mass: np.ndarray, moment: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    bounds = np.concatenate([x[:1], thresholds, x[-1:]])
    return np.diff(np.interp(bounds, x, moment)) / np.diff(np.interp(bounds, x, mass))


def sphere_magnitudes(head_dim: int, bits: int) -> Codebook:
    """Quantizer of the size of a coordinate of a random unit vector, for codes of a sign and `bits - 1` bits.

    A coordinate `x` of a vector on the unit sphere in `head_dim` dimensions has a density in proportion to
    `(1 - x**2) ** ((head_dim - 3) / 2)`, near to normal with variance `1 / head_dim`. It is even, so the best quantizer
    of `x` is one of `|x|` and a sign.

    Source: TurboQuant, arXiv:2504.19874, lemma 1 and section 3.1.
    """
    # A tracer may take constants for symbols; a table is of one size.
    return _sphere_magnitudes(int(head_dim), int(bits))


@lru_cache(maxsize=64)
def _sphere_magnitudes(head_dim: int, bits: int) -> Codebook:
    return lloyd_max(lambda x: (1 - x * x) ** ((head_dim - 3) / 2), 0.0, 1.0, 2 ** (bits - 1))


@lru_cache(maxsize=16)
def polar_angles(level: int, bits: int) -> Codebook:
    """Quantizer of an angle of the recursive polar transform, in radians within the first quadrant.

    At level 1 an angle is uniform on the circle: its quadrant is two bits, and the other `bits - 2` say where in the
    quadrant it is. At level `l >= 2` an angle is that of two lengths, in [0, pi / 2], with a density in proportion to
    `sin(2 * angle) ** (2 ** (l - 1) - 1)`.

    Source: PolarQuant, arXiv:2502.02617, lemma 2 and section 4.1.
    """
    if level == 1:
        return lloyd_max(np.ones_like, 0.0, math.pi / 2, 2 ** (bits - 2))
    power = 2 ** (level - 1) - 1
    return lloyd_max(lambda angle: np.sin(2 * angle) ** power, 0.0, math.pi / 2, 2**bits)
