"""The rotation: a Hadamard transform with signs, which spreads what is in few channels over all.

Values are stored rotated, and what attention makes of them is rotated back: `R` is orthogonal and the same for every
token, so it commutes with the weighted sum. Rotated channels are near to normally distributed around 0 with one
variance, which a symmetric grid with one scale a token suits.

Source: incoherence by signed Hadamard matrices (QuIP#, arXiv:2402.04396, section 3). Without a seed the signs are those
of Rudin and Shapiro, whose Fourier transform is as flat as that of random ones. With a seed they are random: bits of a
hash of the channel and the seed. Either way nothing has to be stored.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ottfx.opaque_call import in_opaque_call


def block_size(head_dim: int) -> int:
    """Return the largest power of two that divides `head_dim`: channels that are mixed with each other."""
    return head_dim & -head_dim


def rotation(head_dim: int, device: torch.device, seed: int | None = None) -> Tensor:
    """Return `R`, float32 [head_dim, head_dim]: `x @ R` is rotated, `y @ R.T` is back.

    Entry (i, j) within a block of size n is `sign(i) * (-1)**popcount(i & j) / sqrt(n)`, where `sign(i)` is
    `(-1)**popcount(i & (i >> 1))`, or that of `random_signs` if there is a seed. Blocks stand on the diagonal.
    """
    size = block_size(head_dim)
    channel = torch.arange(head_dim, device=device)
    row, column = channel.unsqueeze(1), channel.unsqueeze(0)
    inside = torch.div(row, size, rounding_mode="floor") == torch.div(column, size, rounding_mode="floor")
    row, column = row % size, column % size
    odd = _is_odd(row & column if seed is not None else (row & column) ^ (row & (row >> 1)))
    matrix = torch.where(inside, torch.where(odd, -1.0, 1.0), 0.0) * size**-0.5
    return matrix if seed is None else random_signs(channel, seed).unsqueeze(1) * matrix


SIGN_MULTIPLIER = 0x45D9F3B
"""Odd and below 2**27, so that no product in `random_signs` needs more than 63 bits."""


def seed_offset(seed: int) -> int:
    """Return where the channels of a seed begin in the numbers that are hashed: below 2**31, far from other seeds."""
    return (int(seed) * 0x9E3779B9 + 1) & 0x7FFFFFFF


def random_signs(channel: Tensor, seed: int) -> Tensor:
    """Return float32 signs of `channel`, int64: the same number for the same channel and seed on every device."""
    bits = channel + seed_offset(seed)
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * SIGN_MULTIPLIER) & 0xFFFFFFFF
    return torch.where(((bits >> 16) & 1) == 1, -1.0, 1.0)


def _is_odd(bits: Tensor) -> Tensor:
    # Whether a number below 2**16 has an odd number of ones. popcount(a) + popcount(b) is odd where that of a ^ b is.
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return (bits & 1) == 1


def rotate(x: Tensor, seed: int | None = None) -> Tensor:
    """Return `x` [batch, heads, tokens, head_dim] rotated, in its dtype."""
    return _rotated(x, False, x.dtype, seed)


def rotate_back(x: Tensor, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """Return the inverse of `rotate` with the same seed, in `dtype`."""
    return _rotated(x, True, dtype, seed)


# Where nobody traces: making the matrix takes longer than multiplying one token by it.
_remembered_rotation = functools.lru_cache(maxsize=16)(rotation)


def _rotated(x: Tensor, back: bool, dtype: torch.dtype, seed: int | None) -> Tensor:
    if x.is_cuda:
        from ottfx.kernels.rotate import rotate as launch

        return launch(x, back, dtype, None if seed is None else seed_offset(seed))
    matrix = (_remembered_rotation if in_opaque_call() else rotation)(x.shape[-1], x.device, seed)
    return (x.float() @ (matrix.T if back else matrix)).to(dtype)
