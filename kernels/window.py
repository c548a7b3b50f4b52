"""Device functions on the tokens that are not packed yet: the ring of stored ones and the new ones of this call.

A ring of int8 has one scale a token (docs/storage.md, *Window in 8 bits*); the pointer to them means nothing otherwise.
"""

import triton
import triton.language as tl

from ottfx.kernels.packing import ROUND_MAGIC, make_finite, reciprocal

HIGHEST_ROW_CODE = tl.constexpr(127.0)


@triton.jit
def packed_end(length, packed, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Tokens that are codes once `length` tokens are stored, given `packed` before."""
    return tl.maximum(packed, tl.maximum(length - WINDOW, 0) // STEP * STEP)


@triton.jit
def load_rows(ring_ptr, scale_ptr, offset, scale_index, mask, live):
    """Stored tokens at `offset` [N, C], float32; `scale_index` and `live` [N] are those of their scales."""
    rows = tl.load(ring_ptr + offset, mask=mask, other=0).to(tl.float32)
    if ring_ptr.dtype.element_ty == tl.int8:
        rows *= tl.load(scale_ptr + scale_index, mask=live, other=0.0).to(tl.float32)[:, None]
    return rows


@triton.jit
def encode_rows(rows):
    """Tokens [N, C] as codes int8 [N, C], and their scales float16 [N]."""
    rows = make_finite(rows)
    largest = tl.max(tl.abs(rows), axis=1)
    scale = tl.div_rn(largest, tl.full(largest.shape, HIGHEST_ROW_CODE, tl.float32)).to(tl.float16)
    codes = rows * reciprocal(scale)[:, None] + ROUND_MAGIC - ROUND_MAGIC
    return tl.minimum(tl.maximum(codes, -HIGHEST_ROW_CODE), HIGHEST_ROW_CODE).to(tl.int8), scale


@triton.jit
def load_tokens(
    new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, token, past, live, channel, in_row,
    CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of `token` int32 [N] as float32 [N, C]: from the ring before `past`, from the new tokens after.

    `new_ptr`, `ring_ptr` and `ring_scale_ptr` point to this (sequence, kv head). Rows not `live` and channels not
    `in_row` give 0.
    """
    # Loaded as [C, N]: the lanes of a warp lie along the first axis where addresses are gathered, and a thread that
    # holds many tokens of few channels makes few constants.
    is_new = token >= past
    new_offset = channel[:, None] + (token - past).to(tl.int64)[None, :] * stride_new_token
    new = tl.load(new_ptr + new_offset, mask=in_row[:, None] & (live & is_new)[None, :], other=0.0).to(tl.float32)
    ring_row = token % CAPACITY
    is_old = live & (token < past)
    old_offset = channel[:, None] + ring_row[None, :] * HEAD_DIM
    old = tl.load(ring_ptr + old_offset, mask=in_row[:, None] & is_old[None, :], other=0).to(tl.float32)
    if ring_ptr.dtype.element_ty == tl.int8:
        old *= tl.load(ring_scale_ptr + ring_row, mask=is_old, other=0.0).to(tl.float32)[None, :]
    return tl.trans(tl.where(is_new[None, :], new, old))


@triton.jit
def load_real(valid_ptr, ring_valid_ptr, token, past, live, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr):
    """Which of `token` [N] are real and not padding, bool; the pointers are those of this sequence."""
    real = tl.load(ring_valid_ptr + token % CAPACITY, mask=live & (token < past), other=0) != 0
    if HAS_VALID:
        real = real | (tl.load(valid_ptr + (token - past), mask=live & (token >= past), other=0) != 0)
    else:
        real = real | (token >= past)
    return real & live
