"""Append of PolarQuant: rotation, angles, radii and packing of new tokens in one kernel.

`ottfx/polar_codes.py` defines it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import dense_rows, launch, row_strides
from ottfx.kernels.packing import FINITE_MAX, PAGE, make_finite
from ottfx.kernels.polar_codes import level_constants, padded_blocks, store_blocks
from ottfx.kernels.rotate import BLOCK, block_size, rotate_rows


@triton.jit(do_not_specialize=["q_len", "pages"])
def _append_kernel(
    key_ptr, value_ptr, lengths_ptr, key_codes_ptr, key_upper_ptr, key_scale_ptr,
    value_codes_ptr, value_upper_ptr, value_scale_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    q_len, pages,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, BYTES: tl.constexpr,
    SIZE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
    T8: tl.constexpr, T9: tl.constexpr, T10: tl.constexpr, T11: tl.constexpr,
    T12: tl.constexpr, T13: tl.constexpr, T14: tl.constexpr, T15: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pages = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int64)
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // NUM_KV_HEADS
    head = pair % NUM_KV_HEADS
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < q_len
    slot = pair * (pages * PAGE) + tl.load(lengths_ptr) + token
    channel = tl.arange(0, BLOCK_D)
    in_tile = live[:, None] & (channel < HEAD_DIM)[None, :]
    if tl.program_id(2) == 0:
        offset = batch * stride_key_batch + head * stride_key_head + token * stride_key_token
        x = make_finite(tl.load(key_ptr + offset[:, None] + channel[None, :], mask=in_tile, other=0.0))
        store_blocks(
            rotate_rows(x, SIZE, OFFSET, ROWS, BLOCK_D), key_codes_ptr + slot * WORDS, key_upper_ptr + slot * BYTES,
            key_scale_ptr + slot * (HEAD_DIM // 16), live, BITS, HEAD_DIM, ROWS, BLOCK_D, FINITE_MAX,
            T0, T1, T2, T3, T4, T5, T6, T7, T8, T9, T10, T11, T12, T13, T14, T15,
        )  # fmt: skip
    else:
        offset = batch * stride_value_batch + head * stride_value_head + token * stride_value_token
        x = make_finite(tl.load(value_ptr + offset[:, None] + channel[None, :], mask=in_tile, other=0.0))
        store_blocks(
            rotate_rows(x, SIZE, OFFSET, ROWS, BLOCK_D), value_codes_ptr + slot * WORDS,
            value_upper_ptr + slot * BYTES, value_scale_ptr + slot * (HEAD_DIM // 16), live,
            BITS, HEAD_DIM, ROWS, BLOCK_D, FINITE_MAX,
            T0, T1, T2, T3, T4, T5, T6, T7, T8, T9, T10, T11, T12, T13, T14, T15,
        )  # fmt: skip


def append(
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    key_codes: Tensor,
    key_upper: Tensor,
    key_radius: Tensor,
    value_codes: Tensor,
    value_upper: Tensor,
    value_radius: Tensor,
    first_bits: int,
    slopes: Sequence[Sequence[float]],
    seed_offset: int,
) -> None:
    """Store new tokens as `ottfx::polar_append` does.

    Args:
        key: [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        lengths: int64 [1, 3]: those of this site.
        key_codes: state, mutated, as the five that follow; shapes in docs/storage.md.
        key_upper: state.
        key_radius: state.
        value_codes: state.
        value_upper: state.
        value_radius: state.
        first_bits: bits of an angle of level 1.
        slopes: at each of the four levels, what separates the angles of the first quadrant.
        seed_offset: that of the rotation's seed.
    """
    key, value = dense_rows(key), dense_rows(value)
    batch_size, num_kv_heads, q_len, head_dim = key.shape
    block_d = padded_blocks(head_dim)
    rows = max(BLOCK // block_d, 1)
    arguments = {
        "key_ptr": key,
        "value_ptr": value,
        "lengths_ptr": lengths,
        "key_codes_ptr": key_codes,
        "key_upper_ptr": key_upper,
        "key_scale_ptr": key_radius,
        "value_codes_ptr": value_codes,
        "value_upper_ptr": value_upper,
        "value_scale_ptr": value_radius,
        **row_strides(key=key, value=value),
        "q_len": q_len,
        "pages": key_codes.shape[2],
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BITS": first_bits,
        "WORDS": key_codes.shape[4],
        "BYTES": key_upper.shape[4],
        "SIZE": block_size(head_dim),
        "OFFSET": seed_offset,
        "ROWS": rows,
        "BLOCK_D": block_d,
        **level_constants(slopes),
    }
    launch(_append_kernel, (batch_size * num_kv_heads, -(-q_len // rows), 2), arguments, num_warps=1, num_stages=1)
