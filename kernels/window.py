"""Device functions on the tokens that are not codes yet: the ring of stored ones and the new ones of this call."""

import triton
import triton.language as tl


@triton.jit
def packed_end(length, packed, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Tokens that are codes once `length` tokens are stored, given `packed` before."""
    return tl.maximum(packed, tl.maximum(length - WINDOW, 0) // STEP * STEP)


@triton.jit
def load_tokens(
    new_ptr, stride_new_token, ring_ptr, token, past, live, channel, in_row,
    CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of `token` int32 [N] as float32 [N, C]: from the ring before `past`, from the new tokens after.

    `new_ptr` and `ring_ptr` point to this (sequence, kv head); rows not `live` and channels not `in_row` give 0.
    """
    is_new = token >= past
    new_offset = (token - past).to(tl.int64)[:, None] * stride_new_token + channel[None, :]
    # [N, C]
    new = tl.load(new_ptr + new_offset, mask=(live & is_new)[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    ring_offset = (token % CAPACITY)[:, None] * HEAD_DIM + channel[None, :]
    # [N, C]
    old = tl.load(ring_ptr + ring_offset, mask=(live & (token < past))[:, None] & in_row[None, :], other=0.0)
    return tl.where(is_new[:, None], new, old.to(tl.float32))


@triton.jit
def load_real(valid_ptr, ring_valid_ptr, token, past, live, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr):
    """Which of `token` [N] are real and not padding, bool; the pointers are those of this sequence."""
    real = tl.load(ring_valid_ptr + token % CAPACITY, mask=live & (token < past), other=0) != 0
    if HAS_VALID:
        real = real | (tl.load(valid_ptr + (token - past), mask=live & (token >= past), other=0) != 0)
    else:
        real = real | (token >= past)
    return real & live
