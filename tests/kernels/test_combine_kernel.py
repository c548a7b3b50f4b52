"""Joining parts against a softmax over all of them, with more parts than a program holds at once as well."""

import pytest
import torch

from ottfx.kernels.affine_combine import combine
from ottfx.kernels.rotate import NO_SEED
from ottfx.rotation import rotate_back

HEADS, QUERIES_PER_KV = 4, 2


def joined(partial, log_sum, new_value, rotated):
    """The definition, [rows, head_dim]."""
    weight = torch.softmax(log_sum.double(), dim=1).nan_to_num(0.0)
    parts = torch.where(weight[..., None] > 0.0, partial.double(), 0.0)
    if new_value is None:
        result = (weight[..., None] * parts).sum(1)
        return rotate_back(result.float(), torch.float32) if rotated else result
    stored = rotate_back((weight[:, :-1, None] * parts[:, :-1]).sum(1).float(), torch.float32)
    new_value = new_value.repeat_interleave(QUERIES_PER_KV, dim=1).reshape(-1, partial.shape[2])
    return stored + weight[:, -1, None] * new_value


@pytest.mark.parametrize(
    "parts, most_parts, head_dim, q_len, rotated",
    [
        (1, 1, 64, 1, False),
        (5, 20, 80, 3, False),
        (70, 70, 128, 1, False),
        (700, 1100, 64, 1, False),
        (3, 3, 128, 1, True),
        (7, 33, 96, 2, True),
        (39, 39, 128, 1, True),
        (140, 200, 256, 1, True),
        (150, 150, 256, 2, True),
    ],
)
def test_parts_are_joined_as_by_one_softmax(parts, most_parts, head_dim, q_len, rotated, kernel_device):
    generator = torch.Generator().manual_seed(parts)
    rows = HEADS * q_len
    partial = torch.randn(rows, parts, head_dim, generator=generator)
    log_sum = 3 * torch.randn(rows, parts, generator=generator) + 100
    # Parts that saw nothing, which wrote nothing; and a row of which no part saw anything.
    log_sum[:, 1::3], partial[:, 1::3] = float("-inf"), float("nan")
    log_sum[-1], partial[-1] = float("-inf"), float("nan")
    new_value = torch.randn(1, HEADS // QUERIES_PER_KV, 1, head_dim, generator=generator)
    new_value = new_value if rotated and q_len == 1 else None
    want = joined(partial, log_sum, new_value, rotated)
    if q_len > 1:
        # Rows are by token and head of a kv head; the output is by head and token.
        want = want.reshape(-1, q_len, QUERIES_PER_KV, head_dim).transpose(1, 2).reshape(rows, head_dim)
    output = torch.full((1, HEADS, q_len, head_dim), 7.0, device=kernel_device)
    combine(
        partial.to(kernel_device), log_sum.to(kernel_device), output, parts=parts, most_parts=most_parts,
        queries_per_kv=QUERIES_PER_KV, rotation=NO_SEED.value if rotated else None,
        new_value=None if new_value is None else new_value.to(kernel_device),
    )  # fmt: skip
    torch.testing.assert_close(output.cpu().reshape(rows, head_dim), want.float(), atol=2e-5, rtol=1e-5)
