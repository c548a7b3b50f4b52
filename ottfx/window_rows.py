"""Tokens of the window in 8 bits: one scale a token (docs/storage.md, *Window in 8 bits*). Plain torch, traceable."""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.reference import make_finite, reciprocal, round_to_half

HIGHEST = 127
"""The largest code; codes are symmetric."""


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round tokens to 8 bits, each to the grid of its largest magnitude.

    Args:
        rows: float [..., head_dim]; made finite first, arithmetic in fp32.

    Returns:
        codes int8 of the shape of `rows`, -127 .. 127; scale fp16 without the last axis.
    """
    rows = make_finite(rows)
    scale = round_to_half(rows.abs().amax(-1) / HIGHEST)
    codes = torch.round(rows * reciprocal(scale).unsqueeze(-1)).clamp(-HIGHEST, HIGHEST)
    return codes.to(torch.int8), scale.half()


def decode_rows(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Return what `encode_rows` stored, fp32; or `codes` as they are if they have no scale."""
    return codes if scale is None else codes.float() * scale.float().unsqueeze(-1)


def present(scale: Tensor | None) -> Tensor | None:
    """Return the scales of a window, None for the state tensor without rows of a window in full precision."""
    return None if scale is None or scale.shape[-1] == 0 else scale
