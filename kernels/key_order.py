"""Kernel and launcher that order the channels of keys by their range (docs/storage.md, `Mixed words`).

Where outliers are selected without an encoder, that kernel does it on the way (`order_head`).
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import launch, next_power_of_2
from ottfx.kernels.packing import STEEP_MARK, make_finite
from ottfx.kernels.window import load_real, load_tokens, packed_end

MOST_PROGRAMS = 264
"""Programs of the launch: two rounds of what an H100 runs at once. Each takes several heads in turn."""
TOKENS = tl.constexpr(16)
"""Tokens that are looked at together."""
# Nibble i is the i-th element of a word, the widest first.
WIDEST_FIRST = tl.constexpr(0xFEDC76BA54983210 - (1 << 64))


# What codes of 3, 2 and 1 bits lose more than those of one bit more (`ottfx/mixed_words.py`, `ERRORS`).
OF_3_BITS = tl.constexpr(0.0355 - 0.0091)
OF_2_BITS = tl.constexpr(0.130 - 0.0355)
OF_1_BIT = tl.constexpr(0.410 - 0.130)


@triton.jit
def _suits_steep(ranges, eighth):
    # Whether a head loses less in steep widths. `ranges` float32 [BLOCK_D] descend; `eighth` is which of all it is in.
    gain = tl.where(eighth == 1, OF_3_BITS, tl.where(eighth == 2, OF_2_BITS, 0.0))
    gain = tl.where((eighth == 3) | (eighth == 4), -OF_1_BIT, gain)
    return tl.sum(ranges * ranges * gain, axis=0) > 0


@triton.jit
def order_head(
    pair, batch, head, key_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr, residual_valid_ptr, key_order_ptr,
    stride_key_batch, stride_key_head, stride_key_token, q_len, past, packed, end,
    HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Decide the order of the channels of one (sequence, kv head) that has none yet, if a real token is due."""
    STRIPS: tl.constexpr = HEAD_DIM // 16
    order_ptr = key_order_ptr + pair * HEAD_DIM
    if tl.load(order_ptr).to(tl.int32) < 0:
        new_valid_ptr = valid_ptr + batch * q_len
        ring_valid_ptr = residual_valid_ptr + batch * CAPACITY
        # The first due group with a real token.
        first = packed
        found = first >= end
        while (first < end) & (found == 0):
            token = first + tl.arange(0, GROUP)
            real = load_real(new_valid_ptr, ring_valid_ptr, token, past, token >= 0, CAPACITY, HAS_VALID)
            found = tl.max(real.to(tl.int32), axis=0) > 0
            first = tl.where(found, first, first + GROUP)
        if first < end:
            channel = tl.arange(0, BLOCK_D)
            low = tl.full([BLOCK_D], float("inf"), tl.float32)
            high = tl.full([BLOCK_D], float("-inf"), tl.float32)
            for start in tl.range(first, first + GROUP + WINDOW, TOKENS):
                token = tl.cast(start, tl.int32) + tl.arange(0, TOKENS)
                live = (token < past + q_len) & (token < first + GROUP + WINDOW)
                real = load_real(new_valid_ptr, ring_valid_ptr, token, past, live, CAPACITY, HAS_VALID)
                # [TOKENS, BLOCK_D]
                x = load_tokens(
                    key_ptr + batch * stride_key_batch + head * stride_key_head, stride_key_token,
                    key_residual_ptr + pair * CAPACITY * HEAD_DIM, key_row_scale_ptr + pair * CAPACITY,
                    token, past, real, channel, channel < HEAD_DIM, CAPACITY, HEAD_DIM,
                )  # fmt: skip
                x = make_finite(x)
                low = tl.minimum(low, tl.min(tl.where(real[:, None], x, float("inf")), axis=0))
                high = tl.maximum(high, tl.max(tl.where(real[:, None], x, float("-inf")), axis=0))
            # Numbers that are not negative are ordered as their bits are; behind those, the lower channel first.
            spread = (high - low).to(tl.int32, bitcast=True).to(tl.int64)
            rank_key = (spread << 16) | (65535 - channel)
            ranked = tl.sort(tl.where(channel < HEAD_DIM, rank_key, -1), descending=True)
            rank = channel
            wide_rank = rank.to(tl.int64)
            element = ((wide_rank * 0 + WIDEST_FIRST) >> (tl.minimum(wide_rank // STRIPS, 15) * 4)) & 15
            stored = rank % STRIPS * 16 + element.to(tl.int32)
            ranges = (ranked >> 16).to(tl.int32).to(tl.float32, bitcast=True)
            steep = _suits_steep(tl.where(rank < HEAD_DIM, ranges, 0.0), rank // (2 * STRIPS))
            ranked = 65535 - (ranked & 65535) + tl.where(steep, STEEP_MARK, 0)
            tl.store(order_ptr + stored, ranked.to(tl.int16), mask=rank < HEAD_DIM)


@triton.jit(do_not_specialize=["site", "q_len", "pairs"])
def _order_channels_kernel(
    key_ptr, valid_ptr, lengths_ptr, key_residual_ptr, key_row_scale_ptr, residual_valid_ptr, key_order_ptr,
    stride_key_batch, stride_key_head, stride_key_token, site, q_len, pairs,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pairs = tl.cast(q_len, tl.int32), tl.cast(pairs, tl.int32)
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    packed = tl.load(lengths_ptr + site * 3 + 1).to(tl.int32)
    end = packed_end(past + q_len, packed, WINDOW, STEP)
    # In most decode steps nothing is due.
    last = pairs * (end > packed).to(tl.int32)
    for index in tl.range(tl.program_id(0), last, tl.num_programs(0)):
        pair = tl.cast(index, tl.int64)
        order_head(
            pair, pair // NUM_KV_HEADS, pair % NUM_KV_HEADS, key_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr,
            residual_valid_ptr, key_order_ptr, stride_key_batch, stride_key_head, stride_key_token, q_len, past, packed,
            end, HEAD_DIM, CAPACITY, GROUP, WINDOW, HAS_VALID, BLOCK_D,
        )  # fmt: skip


def order_channels(append: Mapping[str, Any], key_order: Tensor, window: int, step: int) -> None:
    """Decide the order of the channels of heads that have none yet, if this call packs a real token of theirs.

    Args:
        append: arguments that the kernels of the append share.
        key_order: int16 [batch, num_kv_heads, head_dim], -1 where nothing is decided; mutated.
        window: newest tokens that stay in full precision.
        step: tokens that are packed together.
    """
    names = (
        "key_ptr", "valid_ptr", "lengths_ptr", "key_residual_ptr", "key_row_scale_ptr", "residual_valid_ptr",
        "stride_key_batch", "stride_key_head", "stride_key_token", "site", "q_len", "pairs",
        "NUM_KV_HEADS", "HEAD_DIM", "CAPACITY", "GROUP", "HAS_VALID",
    )  # fmt: skip
    arguments = {name: append[name] for name in names} | {
        "key_order_ptr": key_order,
        "WINDOW": window,
        "STEP": step,
        "BLOCK_D": next_power_of_2(append["HEAD_DIM"]),
    }
    grid = (torch.sym_min(append["pairs"], MOST_PROGRAMS),)
    launch(_order_channels_kernel, grid, arguments, num_warps=4, num_stages=1)
