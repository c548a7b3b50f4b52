"""Kernel and launcher of the rotation of values: `ottfx/rotation.py` defines it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import dense_rows, launch, next_power_of_2

BLOCK = 512
"""Numbers that a program of one warp rotates: few, as a decode step has few and waits for them."""


@triton.jit
def _signs(channel):
    # -1 where the number has an odd number of neighbouring ones, else 1 (Rudin and Shapiro).
    bits = channel & (channel >> 1)
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def _transform(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    # Rows [ROWS, SIZE] times the Hadamard matrix. A step adds and subtracts neighbours and puts the sums before the
    # differences, which turns the bits of the index by one place; after all steps they are back.
    STEPS: tl.constexpr = tl.constexpr(SIZE.bit_length() - 1)
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(x, [ROWS, SIZE // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [ROWS, SIZE])
    return x


@triton.jit(do_not_specialize=["q_len", "blocks"])
def _rotate_kernel(
    x_ptr, output_ptr, stride_batch, stride_head, stride_token, q_len, blocks,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, blocks = tl.cast(q_len, tl.int32), tl.cast(blocks, tl.int64)
    PER_TOKEN: tl.constexpr = HEAD_DIM // SIZE
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (block < blocks)[:, None]
    row = block // PER_TOKEN
    head = row // q_len
    offset = head // HEADS * stride_batch + head % HEADS * stride_head + row % q_len * stride_token
    inside = tl.arange(0, SIZE)
    channel = (block % PER_TOKEN * SIZE)[:, None] + inside[None, :]
    # [ROWS, SIZE]
    x = tl.load(x_ptr + offset[:, None] + channel, mask=live, other=0.0).to(tl.float32)
    sign = _signs(inside)[None, :]
    x = x if BACK else x * sign
    x = _transform(x, ROWS, SIZE) * tl.rsqrt(tl.full([1, 1], SIZE, tl.float32))
    x = x * sign if BACK else x
    tl.store(output_ptr + row[:, None] * HEAD_DIM + channel, x.to(output_ptr.dtype.element_ty), mask=live)


def rotate(x: Tensor, back: bool, dtype: torch.dtype) -> Tensor:
    """Rotate `x` [batch, heads, q_len, head_dim], any strides, or rotate it back; contiguous, of `dtype`."""
    x = dense_rows(x)
    batch_size, heads, q_len, head_dim = x.shape
    size = head_dim & -head_dim
    output = torch.empty((batch_size, heads, q_len, head_dim), dtype=dtype, device=x.device)
    blocks = batch_size * heads * q_len * (head_dim // size)
    rows = max(BLOCK // next_power_of_2(size), 1)
    arguments = {
        "x_ptr": x,
        "output_ptr": output,
        "stride_batch": x.stride(0),
        "stride_head": x.stride(1),
        "stride_token": x.stride(2),
        "q_len": q_len,
        "blocks": blocks,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "SIZE": size,
        "BACK": back,
        "ROWS": rows,
    }
    launch(_rotate_kernel, (-(-blocks // rows),), arguments, num_warps=1, num_stages=1)
    return output
