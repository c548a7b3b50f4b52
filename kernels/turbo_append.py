"""Append of TurboQuant: norm, rotation, nearest entries and packing of new tokens in one kernel.

`ottfx/turbo_codes.py` defines it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import dense_rows, launch, row_strides
from ottfx.kernels.packing import FINITE_MAX, PAGE, make_finite
from ottfx.kernels.rotate import BLOCK, block_size, rotate_rows
from ottfx.kernels.table_codes import entry, nearest, padded_channels, store_signed, table_constants


@triton.jit
def _store_tokens(
    x_ptr, codes_ptr, scale_ptr, token_offset, slot, live,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, OFFSET: tl.constexpr, CORRECT: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    in_row = (channel < HEAD_DIM)[None, :]
    # [ROWS, BLOCK_D]
    x = make_finite(tl.load(x_ptr + token_offset[:, None] + channel[None, :], mask=live[:, None] & in_row, other=0.0))
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    per_norm = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))
    unit = rotate_rows(x, SIZE, OFFSET, ROWS, BLOCK_D) * per_norm[:, None]
    HALF: tl.constexpr = 1 << (BITS - 1)
    place = nearest(tl.abs(unit), HALF, T0, T1, T2, T3, T4, T5, T6, T7)
    if CORRECT:
        size = tl.where(in_row, entry(place, HALF, T0, T1, T2, T3, T4, T5, T6, T7), 0.0)
        norm = norm / tl.sqrt_rn(tl.sum(size * size, axis=1))
    store_signed(codes_ptr + slot * WORDS, place, (unit < 0.0).to(tl.int32), live, BITS, HEAD_DIM, ROWS, BLOCK_D)
    tl.store(scale_ptr + slot, tl.minimum(norm, FINITE_MAX).to(tl.float16), mask=live)


@triton.jit(do_not_specialize=["q_len", "pages"])
def _append_kernel(
    key_ptr, value_ptr, lengths_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    q_len, pages,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr, SIZE: tl.constexpr, OFFSET: tl.constexpr,
    CORRECT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
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
    if tl.program_id(2) == 0:
        offset = batch * stride_key_batch + head * stride_key_head + token * stride_key_token
        _store_tokens(
            key_ptr, key_codes_ptr, key_scale_ptr, offset, slot, live, KEY_BITS, HEAD_DIM, SIZE, OFFSET, CORRECT,
            KEY_WORDS, ROWS, BLOCK_D, T0, T1, T2, T3, T4, T5, T6, T7,
        )  # fmt: skip
    else:
        offset = batch * stride_value_batch + head * stride_value_head + token * stride_value_token
        _store_tokens(
            value_ptr, value_codes_ptr, value_scale_ptr, offset, slot, live, VALUE_BITS, HEAD_DIM, SIZE, OFFSET,
            CORRECT, VALUE_WORDS, ROWS, BLOCK_D, T8, T9, T10, T11, T12, T13, T14, T15,
        )  # fmt: skip


def append(
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    key_codes: Tensor,
    key_norm: Tensor,
    value_codes: Tensor,
    value_norm: Tensor,
    key_bits: int,
    value_bits: int,
    norm_correction: bool,
    key_table: Sequence[float],
    value_table: Sequence[float],
    seed_offset: int,
) -> None:
    """Store new tokens as `ottfx::turbo_append` does.

    Args:
        key: [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        lengths: int64 [1, 3]: those of this site.
        key_codes: state, mutated, as the three that follow; shapes in docs/storage.md.
        key_norm: state.
        value_codes: state.
        value_norm: state.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        norm_correction: whether tokens are read back with the norm they had.
        key_table: ascending magnitudes of keys; `value_table` of values.
        value_table: see `key_table`.
        seed_offset: that of the rotation's seed.
    """
    key, value = dense_rows(key), dense_rows(value)
    batch_size, num_kv_heads, q_len, head_dim = key.shape
    block_d = padded_channels(head_dim)
    rows = max(BLOCK // block_d, 1)
    arguments = {
        "key_ptr": key,
        "value_ptr": value,
        "lengths_ptr": lengths,
        "key_codes_ptr": key_codes,
        "key_scale_ptr": key_norm,
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_norm,
        **row_strides(key=key, value=value),
        "q_len": q_len,
        "pages": key_codes.shape[2],
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_WORDS": key_codes.shape[4],
        "VALUE_WORDS": value_codes.shape[4],
        "SIZE": block_size(head_dim),
        "OFFSET": seed_offset,
        "CORRECT": norm_correction,
        "ROWS": rows,
        "BLOCK_D": block_d,
        **table_constants(0, 8, key_table),
        **table_constants(8, 8, value_table),
    }
    launch(_append_kernel, (batch_size * num_kv_heads, -(-q_len // rows), 2), arguments, num_warps=1, num_stages=1)
