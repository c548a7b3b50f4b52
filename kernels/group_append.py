"""The append that storage by groups shares: values of due tokens, the window, and arguments of both launches.

Pointers of new tokens and of the ring are those of this (sequence, kv head).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.affine_pack import pack_value_strip
from ottfx.kernels.launch import launch, next_power_of_2, row_strides
from ottfx.kernels.packing import PAGE

RING_ROWS = 16
"""Tokens that one program writes into the window."""


@triton.jit
def pack_values(
    pair, strip, value_ptr, stride_value_token, ring_ptr, valid_ptr, ring_valid_ptr,
    codes_ptr, scale_ptr, zero_point_ptr, past, packed, end, pages,
    BITS: tl.constexpr, VALUE_GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    HAS_VALID: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Quantize and store the due values among the 16 tokens from `16 * strip` on."""
    pack_value_strip(
        pair, strip // (PAGE // 16), strip % (PAGE // 16), value_ptr, stride_value_token, ring_ptr, ring_ptr,
        valid_ptr, ring_valid_ptr, valid_ptr, codes_ptr, scale_ptr, zero_point_ptr, past, packed, end, pages,
        BITS, False, False, 16, VALUE_GROUPS, HEAD_DIM, CAPACITY, HAS_VALID, False, False, False, False, BLOCK_HALF,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "blocks"])
def _fill_window_kernel(
    key_ptr, value_ptr, valid_ptr, lengths_ptr, key_residual_ptr, value_residual_ptr, residual_valid_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    q_len, blocks,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # ROWS of the newest tokens a program, after everything due was packed.
    q_len, blocks = tl.cast(q_len, tl.int32), tl.cast(blocks, tl.int32)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    past = tl.load(lengths_ptr).to(tl.int32)
    source = tl.maximum(q_len - CAPACITY, 0) + tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = source < q_len
    row = (past + source) % CAPACITY
    channel = tl.arange(0, BLOCK_D)
    in_row = live[:, None] & (channel < HEAD_DIM)[None, :]
    target = (pair * CAPACITY + row)[:, None] * HEAD_DIM + channel[None, :]
    token = source.to(tl.int64)
    offset = batch * stride_key_batch + head * stride_key_head + token * stride_key_token
    key = tl.load(key_ptr + offset[:, None] + channel[None, :], mask=in_row, other=0.0)
    tl.store(key_residual_ptr + target, key.to(key_residual_ptr.dtype.element_ty), mask=in_row)
    offset = batch * stride_value_batch + head * stride_value_head + token * stride_value_token
    value = tl.load(value_ptr + offset[:, None] + channel[None, :], mask=in_row, other=0.0)
    tl.store(value_residual_ptr + target, value.to(value_residual_ptr.dtype.element_ty), mask=in_row)
    if head == 0:
        real = tl.full([ROWS], 1, tl.uint8)
        if HAS_VALID:
            real = (tl.load(valid_ptr + batch * q_len + source, mask=live, other=0) != 0).to(tl.uint8)
        tl.store(residual_valid_ptr + batch * CAPACITY + row, real, mask=live)


def common_arguments(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    lengths: Tensor,
    key_residual: Tensor,
    residual_valid: Tensor,
    value_residual: Tensor,
) -> dict[str, Any]:
    """Return what both launches of an append take; keys and values have dense rows."""
    return {
        "key_ptr": key,
        "value_ptr": value,
        "valid_ptr": lengths if valid is None else valid.contiguous(),
        "lengths_ptr": lengths,
        "key_residual_ptr": key_residual,
        "value_residual_ptr": value_residual,
        "residual_valid_ptr": residual_valid,
        **row_strides(key=key, value=value),
        "q_len": key.shape[2],
        "NUM_KV_HEADS": key.shape[1],
        "HEAD_DIM": key.shape[3],
        "CAPACITY": key_residual.shape[2],
        "HAS_VALID": valid is not None,
    }


def pack_arguments(
    common: dict[str, Any], value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, value_bits: int,
    group_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Return those of the launch that packs what is due, but for the state of the keys: `items` are its programs."""
    most_due = -(-common["q_len"] // common["CAPACITY"]) * common["CAPACITY"]
    key_items = most_due // group_size
    return common | {
        "value_codes_ptr": value_codes,
        "value_scale_ptr": value_scale,
        "value_zero_point_ptr": value_zero_point,
        "pages": value_codes.shape[2],
        "key_items": key_items,
        "items": key_items + most_due // 16,
        "GROUP": group_size,
        "VALUE_BITS": value_bits,
        "VALUE_GROUPS": value_scale.shape[3],
        "BLOCK_HALF": next_power_of_2(common["HEAD_DIM"] // 2),
    }


def fill_window(common: dict[str, Any]) -> None:
    """Write the newest tokens into the window, after everything due was packed."""
    pairs = common["key_residual_ptr"].shape[0] * common["NUM_KV_HEADS"]
    blocks = -(-torch.sym_min(common["q_len"], common["CAPACITY"]) // RING_ROWS)
    arguments = common | {"blocks": blocks, "BLOCK_D": next_power_of_2(common["HEAD_DIM"]), "ROWS": RING_ROWS}
    launch(_fill_window_kernel, (pairs * blocks,), arguments, num_warps=4, num_stages=1)
