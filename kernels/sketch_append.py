"""Append of `qjl`: the sketch, a launch that packs what is due, and one that fills the window.

`ottfx/group_pages.py` and `ottfx/sketch_codes.py` define it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.group_append import common_arguments, fill_window, pack_arguments, pack_values
from ottfx.kernels.launch import dense_rows, launch
from ottfx.kernels.sketch import sketch, store_sketch
from ottfx.kernels.window import packed_end


@triton.jit(do_not_specialize=["q_len", "pages", "key_items", "items"])
def _pack_kernel(
    key_ptr, value_ptr, valid_ptr, lengths_ptr, key_residual_ptr, value_residual_ptr, residual_valid_ptr,
    sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_point_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    q_len, pages, key_items, items,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr, OUTLIERS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    # One group of keys, or one strip of values, a program.
    q_len, pages = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32)
    key_items, items = tl.cast(key_items, tl.int32), tl.cast(items, tl.int32)
    pair = (tl.program_id(0) // items).to(tl.int64)
    item = tl.program_id(0) % items
    batch, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    past = tl.load(lengths_ptr).to(tl.int32)
    packed = tl.load(lengths_ptr + 1).to(tl.int32)
    end = packed_end(past + q_len, packed, 0, CAPACITY)
    new_valid_ptr = valid_ptr + batch * q_len
    ring_valid_ptr = residual_valid_ptr + batch * CAPACITY
    if item < key_items:
        start = packed + item * GROUP
        if start < end:
            store_sketch(
                pair, start, key_ptr + batch * stride_key_batch + head * stride_key_head, stride_key_token,
                key_residual_ptr + pair * CAPACITY * HEAD_DIM, new_valid_ptr, ring_valid_ptr, past, pages,
                sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr,
                KEY_BITS, OUTLIERS, GROUP, HEAD_DIM, CAPACITY, HAS_VALID,
            )  # fmt: skip
    else:
        strip = packed // 16 + item - key_items
        if strip * 16 < end:
            pack_values(
                pair, strip, value_ptr + batch * stride_value_batch + head * stride_value_head, stride_value_token,
                value_residual_ptr + pair * CAPACITY * HEAD_DIM, new_valid_ptr, ring_valid_ptr,
                value_codes_ptr, value_scale_ptr, value_zero_point_ptr, past, packed, end, pages,
                VALUE_BITS, VALUE_GROUPS, HEAD_DIM, CAPACITY, HAS_VALID, BLOCK_HALF,
            )  # fmt: skip


def pack_warps(head_dim: int) -> int:
    """Return the warps of a program that packs: on Hopper only 256 channels leave a few words on the stack."""
    return 8 if head_dim > 128 else 4


def append(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    lengths: Tensor,
    key_signs: Tensor,
    key_outlier_signs: Tensor,
    key_norms: Tensor,
    key_outliers: Tensor,
    key_residual: Tensor,
    residual_valid: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor,
    value_residual: Tensor,
    key_bits: int,
    value_bits: int,
    group_size: int,
    seed_offset: int,
) -> None:
    """Store new tokens as `ottfx::qjl_append` does, without a host sync.

    Args:
        key: [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        valid: bool [batch, q_len], False for padding, or None.
        lengths: int64 [1, 3]: those of this site.
        key_signs: state, mutated, as the nine that follow; shapes in docs/storage.md.
        key_outlier_signs: state.
        key_norms: state.
        key_outliers: state.
        key_residual: state.
        residual_valid: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state.
        value_residual: state.
        key_bits: signs for each channel.
        value_bits: width of a value code.
        group_size: tokens of a group.
        seed_offset: that of the sketch's first rotation.
    """
    key, value = dense_rows(key), dense_rows(value)
    common = common_arguments(key, value, valid, lengths, key_residual, residual_valid, value_residual)
    arguments = pack_arguments(common, value_codes, value_scale, value_zero_point, value_bits, group_size) | {
        "sketch_ptr": sketch(key.shape[3], key_bits, torch.float32, key.device, seed_offset),
        "signs_ptr": key_signs,
        "outlier_signs_ptr": key_outlier_signs,
        "norms_ptr": key_norms,
        "outliers_ptr": key_outliers,
        "KEY_BITS": key_bits,
        "OUTLIERS": key_outliers.shape[4],
    }
    grid = (key.shape[0] * key.shape[1] * arguments["items"],)
    launch(_pack_kernel, grid, arguments, pack_warps(key.shape[3]), num_stages=1)
    fill_window(common)
