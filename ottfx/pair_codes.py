"""Codes of keys in pairs of channels: a radius and an angle each, on grids that a group of tokens shares. Plain torch.

Channels `i` and `i + head_dim / 2` are a pair: the two that a rotary embedding turns. Where one of them is far from 0,
the pair of a few tokens lies on a ring, along which it is spread evenly.

Source: Wu et al., PolarQuant, arXiv:2502.00527, section 3: codes are cells of the range, read at their centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ottfx.reference import FINITE_MAX, group_range, reciprocal, round_to_half, unpack_page
from ottfx.schemes.base import PAGE


def to_polar(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (radius, angle in 0 .. 2 pi) fp32 [..., head_dim / 2] of finite fp32 keys [..., head_dim]."""
    first, second = keys.unflatten(-1, (2, -1)).unbind(-2)
    radius = (first.square() + second.square()).sqrt()
    angle = torch.atan2(second, first)
    angle = torch.where(angle < 0, angle + 2 * math.pi, angle)
    # A pair at 0 has no angle; that of zeros would depend on their signs.
    return radius.clamp(max=FINITE_MAX), torch.where(radius == 0, 0.0, angle)


def quantize_cells(x: Tensor, bits: int, taking_part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the range of each group into `2**bits` cells of one width.

    Args:
        x: fp32 [batch, heads, groups, tokens of a group, pairs], finite.
        bits: width of a code.
        taking_part: bool, broadcastable to `x`: whom the range covers. The codes of others are 0.

    Returns:
        codes uint8 of the shape of `x`; widths of cells and lower ends, fp16 [batch, heads, groups, pairs].
    """
    low, high = group_range(x, 3, taking_part)
    zero_point = round_to_half(low)
    scale = round_to_half(((high - zero_point) / 2**bits).clamp(0.0, FINITE_MAX))
    cell = torch.floor((x - zero_point) * reciprocal(scale)).clamp(0, 2**bits - 1)
    codes = torch.where(taking_part, cell, 0.0).to(torch.uint8)
    return codes, scale.squeeze(3).half(), zero_point.squeeze(3).half()


def read_cells(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the centres of cells, fp32 [batch, heads, slots, pairs].

    Args:
        codes: int32 [batch, heads, pages, words].
        scale: fp16 [batch, heads, pages, groups of a page, pairs]; `zero_point` alike.
        zero_point: see `scale`.
        bits: width of a code.
    """
    groups, pairs = scale.shape[-2:]
    cell = unpack_page(codes, bits, pairs, PAGE).transpose(-1, -2).unflatten(-2, (groups, -1))
    centre = zero_point.float().unsqueeze(-2) + (cell.float() + 0.5) * scale.float().unsqueeze(-2)
    return centre.flatten(2, 4)


def read_keys(radius: Sequence[Tensor], angle: Sequence[Tensor], radius_bits: int, angle_bits: int) -> Tensor:
    """Return keys fp32 [batch, heads, slots, head_dim]; codes, scale and zero point of both are as for `read_cells`."""
    length, turn = (
        read_cells(codes, scale, zero_point, bits)
        for (codes, scale, zero_point), bits in ((radius, radius_bits), (angle, angle_bits))
    )
    return torch.cat([length * torch.cos(turn), length * torch.sin(turn)], dim=-1)
