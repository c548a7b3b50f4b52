"""Planes of words: codes of one width, neighbours beside each other, the first at the lowest bits. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.reference import to_int32


def plane_words(count: int, width: int, word_bits: int) -> int:
    """Return how many words of `word_bits` hold `count` codes of `width` bits: rounded up."""
    return -(-count * width // word_bits)


def pack_plane(codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Pack codes int64 [..., count], each below 2**width, into words [..., plane_words] of int32 or uint8."""
    per_word = dtype.itemsize * 8 // width
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = (codes << (width * torch.arange(per_word, device=codes.device))).sum(-1)
    return to_int32(words) if dtype == torch.int32 else words.to(dtype)


def unpack_plane(words: Tensor, width: int, count: int) -> Tensor:
    """Return int32 [..., count]: the codes in words [..., plane_words]."""
    per_word = words.dtype.itemsize * 8 // width
    shift = width * torch.arange(per_word, dtype=torch.int32, device=words.device)
    # A right shift of int32 repeats the sign, but never below the bits that the mask keeps.
    codes = (words.int().unsqueeze(-1) >> shift) & (2**width - 1)
    return codes.flatten(-2).narrow(-1, 0, count)


def entries(index: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return `values[index]` in fp32, without a table on the device, which a tracer would have to lift."""
    result = torch.full_like(index, values[0], dtype=torch.float32)
    for place, value in enumerate(values[1:], 1):
        result = torch.where(index == place, value, result)
    return result
