"""Grids that are narrower than the range of their group, chosen by the error that they leave. Plain torch, traceable.

A wide range makes every step wide. Cutting off the ends costs those few members more than rounding, and saves all the
others some: the best of a few candidates is taken, group by group, when codes are made. Reading them costs the same.

Source: clipping chosen by an L_p error, as in post-training quantization of weights (arXiv:1911.07190). p is 4:
large errors of keys are what a softmax punishes most, and of values, too, it leaves less divergence than 2 does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ottfx.reference import FINITE_MAX, group_range, make_finite, reciprocal, round_to_half

CANDIDATES = 7
CUT = 5 / 64
"""Share of a group's range that each further candidate gives up. Exact in binary, as all of them."""
CUT_OF_ONE_BIT = 7 / 64
"""The same for codes of one bit, whose best grid is much narrower."""
SYMMETRIC_CUT = 3 / 32
"""Share of the largest magnitude that each further candidate of a symmetric grid gives up."""


def search_affine(
    x: Tensor,
    levels: Tensor,
    dim: int,
    taking_part: Tensor | None = None,
    candidates: int = CANDIDATES,
    widest: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups to affine grids, each on the candidate range with the least sum of fourth powers of errors.

    Args:
        x: float [..., members, ...]; made finite first, arithmetic in fp32.
        levels: float32, broadcastable to `x`, the same for all members of a group: the highest code.
        dim: the axis of the members.
        taking_part: bool, broadcastable to `x`, or None for all; as in `ottfx.reference.quantize_affine`.
        candidates: how many are tried; 1 is the whole range.
        widest: an upper bound of the width of a code.

    Returns:
        codes uint8 of the shape of `x`; scale and zero_point fp16 of the shape of `x` without `dim`.
    """
    x = make_finite(x)
    low, high = group_range(x, dim, taking_part)
    cut = torch.where(levels == 1, CUT_OF_ONE_BIT / 2, CUT / 2)
    folds = [torch.where(levels >= half, half / 2, 0.0) for half in _half_points(widest)]
    best_scale = best_zero_point = best_error = torch.zeros_like(low)
    for candidate in range(candidates):
        margin = (high - low) * (candidate * cut)
        zero_point = round_to_half(low + margin)
        scale = round_to_half(((high - margin - zero_point) / levels).clamp(0.0, FINITE_MAX))
        error = _distance(x - (levels / 2 * scale + zero_point), scale, folds)
        square = error * error
        if taking_part is not None:
            square = torch.where(taking_part, square, 0.0)
        total = (square * square).sum(dim, keepdim=True)
        better = total < best_error if candidate else torch.ones_like(total, dtype=torch.bool)
        best_error = torch.where(better, total, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    codes = _steps(x, best_scale, best_zero_point, levels).round().to(torch.uint8)
    return codes, best_scale.squeeze(dim).half(), best_zero_point.squeeze(dim).half()


def _half_points(bits: int) -> list[int]:
    return [2**place for place in range(bits - 1, -1, -1)]


def _distance(x: Tensor, scale: Tensor, folds: Sequence[Tensor | float]) -> Tensor:
    # Of `x`, counted from the middle of a grid, from the grid's nearest point; its sign means nothing. The grid is
    # folded in its middle until a single point is left.
    for fold in folds:
        x = x.abs() - fold * scale
    return x


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor) -> Tensor:
    return torch.minimum(((x - zero_point) * reciprocal(scale)).clamp(min=0.0), levels)


def search_symmetric(x: Tensor, bits: int, dim: int = -1, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """Quantize groups to grids around 0, each with the candidate scale of the least sum of fourth powers of errors.

    The grid is `(code - (2**bits - 1) / 2) * scale`: no zero point is stored.

    Args:
        x: float [..., members, ...]; made finite first, arithmetic in fp32.
        bits: width of a code.
        dim: the axis of the members.
        candidates: how many are tried; 1 covers the largest magnitude.

    Returns:
        codes uint8 of the shape of `x`; scale fp16 of the shape of `x` without `dim`, at least 0.
    """
    x = make_finite(x)
    levels = 2**bits - 1
    largest = x.abs().amax(dim, keepdim=True)
    best_scale = best_error = torch.zeros_like(largest)
    for candidate in range(candidates):
        scale = round_to_half((largest * (1 - candidate * SYMMETRIC_CUT) * (2 / levels)).clamp(max=FINITE_MAX))
        error = _distance(x, scale, [half / 2 for half in _half_points(bits)])
        square = error * error
        total = (square * square).sum(dim, keepdim=True)
        better = total < best_error if candidate else torch.ones_like(total, dtype=torch.bool)
        best_error = torch.where(better, total, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = _symmetric_steps(x, best_scale, levels).round().to(torch.uint8)
    return codes, best_scale.squeeze(dim).half()


def _symmetric_steps(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (x * reciprocal(scale) + levels / 2).clamp(0, levels)


def dequantize_symmetric(codes: Tensor, scale: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Return `(codes - (2**bits - 1) / 2) * |scale|` in fp32; operands as those of `dequantize_affine`."""
    return (codes.float() - (2**bits - 1) / 2) * scale.float().abs().unsqueeze(dim)
