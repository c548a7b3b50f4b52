"""Kernel and launcher of the rotation, and its steps for other kernels: `ottfx/rotation.py` defines it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import dense_rows, launch, next_power_of_2

BLOCK = 512
"""Numbers that a program of one warp rotates: few, as a decode step has few and waits for them."""
NO_SEED = tl.constexpr(-1)
_MULTIPLIER = tl.constexpr(0x45D9F3B)


@triton.jit
def _random_signs(channel, OFFSET: tl.constexpr):
    # -1 or 1 by a bit of a hash.
    bits = (channel + OFFSET).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * _MULTIPLIER
    bits = (bits ^ (bits >> 16)) * _MULTIPLIER
    return 1.0 - 2.0 * ((bits >> 16) & 1).to(tl.float32)


@triton.jit
def rotation_signs(channel, SIZE: tl.constexpr, OFFSET: tl.constexpr):
    """Float32 signs of channels int32, in blocks of SIZE; OFFSET is that of a seed, or NO_SEED."""
    if OFFSET == NO_SEED:
        signs = _fixed_signs(channel % SIZE)
    else:
        signs = _random_signs(channel, OFFSET)
    return signs


@triton.jit
def _fixed_signs(channel):
    # -1 where the number has an odd number of neighbouring ones, else 1 (Rudin and Shapiro).
    bits = channel & (channel >> 1)
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Float32 rows [ROWS, SIZE] times the Hadamard matrix of entries 1 and -1."""
    STEPS: tl.constexpr = tl.constexpr(SIZE.bit_length() - 1)
    for step in tl.static_range(STEPS):
        x = tl.reshape(x, [ROWS, SIZE >> (step + 1), 2, 1 << step])
        lower, upper = tl.split(tl.permute(x, [0, 1, 3, 2]))
        x = tl.permute(tl.join(lower + upper, lower - upper), [0, 1, 3, 2])
        x = tl.reshape(x, [ROWS, SIZE])
    return x


@triton.jit
def rotate_rows(x, SIZE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate float32 rows [ROWS, BLOCK_D], 0 behind their channels; BLOCK_D is a power of two."""
    BLOCKS: tl.constexpr = ROWS * BLOCK_D // SIZE
    x = tl.reshape(x * rotation_signs(tl.arange(0, BLOCK_D), SIZE, OFFSET)[None, :], [BLOCKS, SIZE])
    x = hadamard(x, BLOCKS, SIZE) * tl.rsqrt(tl.full([1, 1], SIZE, tl.float32))
    return tl.reshape(x, [ROWS, BLOCK_D])


@triton.jit
def rotate_rows_back(x, SIZE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Undo `rotate_rows`."""
    BLOCKS: tl.constexpr = ROWS * BLOCK_D // SIZE
    x = hadamard(tl.reshape(x, [BLOCKS, SIZE]), BLOCKS, SIZE) * tl.rsqrt(tl.full([1, 1], SIZE, tl.float32))
    return tl.reshape(x, [ROWS, BLOCK_D]) * rotation_signs(tl.arange(0, BLOCK_D), SIZE, OFFSET)[None, :]


@triton.jit(do_not_specialize=["q_len", "blocks"])
def _rotate_kernel(
    x_ptr, output_ptr, stride_batch, stride_head, stride_token, q_len, blocks,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
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
    sign = rotation_signs(channel.to(tl.int32), SIZE, OFFSET)
    x = x if BACK else x * sign
    x = hadamard(x, ROWS, SIZE) * tl.rsqrt(tl.full([1, 1], SIZE, tl.float32))
    x = x * sign if BACK else x
    tl.store(output_ptr + row[:, None] * HEAD_DIM + channel, x.to(output_ptr.dtype.element_ty), mask=live)


def block_size(head_dim: int) -> int:
    """Return how many channels are mixed with each other: the largest power of two that divides `head_dim`."""
    return head_dim & -head_dim


def rotate(x: Tensor, back: bool, dtype: torch.dtype, seed_offset: int | None = None) -> Tensor:
    """Rotate `x` [batch, heads, q_len, head_dim], any strides, or rotate it back; contiguous, of `dtype`.

    `seed_offset` is that of the seed (`ottfx/rotation.py`), None for the fixed signs.
    """
    x = dense_rows(x)
    batch_size, heads, q_len, head_dim = x.shape
    size = block_size(head_dim)
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
        "OFFSET": NO_SEED.value if seed_offset is None else seed_offset,
    }
    launch(_rotate_kernel, (-(-blocks // rows),), arguments, num_warps=1, num_stages=1)
    return output
