"""The rotation of values: a Hadamard transform with fixed signs, which spreads what is in few channels over all.

Values are stored rotated, and what attention makes of them is rotated back: `R` is orthogonal and the same for every
token, so it commutes with the weighted sum. Rotated channels are near to normally distributed around 0 with one
variance, which a symmetric grid with one scale a token suits.

Source: incoherence by signed Hadamard matrices (QuIP#, arXiv:2402.04396, section 3). The signs are those of Rudin and
Shapiro, whose Fourier transform is as flat as that of random ones, so nothing has to be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_size(head_dim: int) -> int:
    """Return the largest power of two that divides `head_dim`: channels that are mixed with each other."""
    return head_dim & -head_dim


def rotation(head_dim: int, device: torch.device) -> Tensor:
    """Return `R`, float32 [head_dim, head_dim]: `x @ R` is rotated, `y @ R.T` is back.

    Entry (i, j) within a block of size n is `sign(i) * (-1)**popcount(i & j) / sqrt(n)`, where `sign(i)` is
    `(-1)**popcount(i & (i >> 1))`. Blocks stand on the diagonal.
    """
    size = block_size(head_dim)
    channel = torch.arange(head_dim, device=device)
    row, column = channel.unsqueeze(1), channel.unsqueeze(0)
    inside = torch.div(row, size, rounding_mode="floor") == torch.div(column, size, rounding_mode="floor")
    row, column = row % size, column % size
    odd = _is_odd((row & column) ^ (row & (row >> 1)))
    return torch.where(inside, torch.where(odd, -1.0, 1.0), 0.0) * size**-0.5


def _is_odd(bits: Tensor) -> Tensor:
    # Whether a number below 2**16 has an odd number of ones. popcount(a) + popcount(b) is odd where that of a ^ b is.
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return (bits & 1) == 1


def rotate(x: Tensor) -> Tensor:
    """Return `x` [batch, heads, tokens, head_dim] rotated, in its dtype."""
    return _rotated(x, False, x.dtype)


def rotate_back(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inverse of `rotate`, in `dtype`."""
    return _rotated(x, True, dtype)


def _rotated(x: Tensor, back: bool, dtype: torch.dtype) -> Tensor:
    if x.is_cuda:
        from ottfx.kernels.rotate import rotate as launch

        return launch(x, back, dtype)
    matrix = rotation(x.shape[-1], x.device)
    return (x.float() @ (matrix.T if back else matrix)).to(dtype)
