"""Kernel and launcher that keep the tokens of least key norm of each due group apart (docs/storage.md, *Group seats*).

It runs before whatever packs the groups, writes the seats, and leaves flags of who is to be left out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.affine_select import token_scores
from ottfx.kernels.key_order import order_head
from ottfx.kernels.launch import launch, next_power_of_2
from ottfx.kernels.packing import PAGE
from ottfx.kernels.window import encode_rows, load_real, load_tokens, packed_end

MOST_PROGRAMS = 1056
"""Programs of the launch: a few rounds of what an H100 runs at once. Each takes several groups in turn."""
WIDEST = 64
"""Channels of the tokens of a group that are looked at together."""


@triton.jit
def _store_seats(
    codes_ptr, scale_ptr, row_ptr, first_seat, new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, token, past, live,
    SEATS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, BLOCK_SEATS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The rows of `token` [BLOCK_SEATS] as seats from `first_seat` on; those not `live` are free.
    seat = tl.arange(0, BLOCK_SEATS)
    channel = tl.arange(0, BLOCK_D)
    rows = load_tokens(
        new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, token, past, live, channel, channel < HEAD_DIM,
        CAPACITY, HEAD_DIM,
    )  # fmt: skip
    codes, scale = encode_rows(rows)
    target = (first_seat + seat)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(codes_ptr + target, codes, mask=(seat < SEATS)[:, None] & (channel < HEAD_DIM)[None, :])
    tl.store(scale_ptr + first_seat + seat, scale, mask=seat < SEATS)
    row = tl.where(live, token % PAGE, -1)
    tl.store(row_ptr + first_seat + seat, row.to(tl.int8), mask=seat < SEATS)


@triton.jit(do_not_specialize=["site", "q_len", "flags_per_head", "pages", "pairs"])
def _seat_tokens_kernel(
    key_ptr, value_ptr, valid_ptr, lengths_ptr, key_residual_ptr, key_row_scale_ptr, value_residual_ptr,
    value_row_scale_ptr, residual_valid_ptr, key_order_ptr, replaced_ptr,
    seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, seat_value_ptr, seat_value_scale_ptr, value_seat_row_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    site, q_len, flags_per_head, pages, pairs,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, SEATS: tl.constexpr, NORM: tl.constexpr, HAS_VALID: tl.constexpr,
    ORDERS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_SEATS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pages, pairs = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(pairs, tl.int32)
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    key_packed = tl.load(lengths_ptr + site * 3 + 1).to(tl.int32)
    key_end = packed_end(past + q_len, key_packed, WINDOW, STEP)
    # In most decode steps nothing is due.
    groups = (key_end - key_packed) // GROUP
    member = tl.arange(0, GROUP)
    seat = tl.arange(0, BLOCK_SEATS)
    for work in tl.range(tl.program_id(0), pairs * groups, tl.num_programs(0)):
        pair = (work // groups).to(tl.int64)
        first = key_packed + tl.cast(work, tl.int32) % groups * GROUP
        batch, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
        if ORDERS:
            if first == key_packed:
                order_head(
                    pair, batch, head, key_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr, residual_valid_ptr,
                    key_order_ptr, stride_key_batch, stride_key_head, stride_key_token, q_len, past, key_packed,
                    key_end, HEAD_DIM, CAPACITY, GROUP, WINDOW, HAS_VALID, BLOCK_D,
                )  # fmt: skip
        new_key_ptr = key_ptr + batch * stride_key_batch + head * stride_key_head
        new_value_ptr = value_ptr + batch * stride_value_batch + head * stride_value_head
        ring_key_ptr = key_residual_ptr + pair * CAPACITY * HEAD_DIM
        ring_value_ptr = value_residual_ptr + pair * CAPACITY * HEAD_DIM
        key_scales_ptr, value_scales_ptr = key_row_scale_ptr + pair * CAPACITY, value_row_scale_ptr + pair * CAPACITY
        token = first + member
        real = load_real(
            valid_ptr + batch * q_len, residual_valid_ptr + batch * CAPACITY, token, past, token >= 0, CAPACITY,
            HAS_VALID,
        )  # fmt: skip
        score = token_scores(
            new_key_ptr, stride_key_token, ring_key_ptr, key_scales_ptr, token, past, real,
            NORM, CAPACITY, HEAD_DIM, CHUNK, GROUP,
        )  # fmt: skip
        score = tl.where(real, score, float("inf"))
        flag = tl.zeros([GROUP], tl.int8)
        chosen = tl.full([BLOCK_SEATS], -1, tl.int32)
        for index in tl.range(0, SEATS):
            least = tl.min(score, axis=0)
            lowest = tl.min(tl.where(score == least, member, GROUP), axis=0)
            # A group of fewer real tokens leaves seats free.
            lowest = tl.where(least < float("inf"), lowest, -1)
            chosen = tl.where(seat == tl.cast(index, tl.int32), lowest, chosen)
            flag = tl.where(member == lowest, 1, flag).to(tl.int8)
            score = tl.where(member == lowest, float("inf"), score)
        tl.store(replaced_ptr + pair * flags_per_head + (token - key_packed), flag)
        group = pair * pages * (PAGE // GROUP) + first // GROUP
        _store_seats(
            seat_key_ptr, seat_key_scale_ptr, seat_row_ptr, group * SEATS, new_key_ptr, stride_key_token, ring_key_ptr,
            key_scales_ptr, first + chosen, past, chosen >= 0, SEATS, HEAD_DIM, CAPACITY, BLOCK_SEATS, BLOCK_D,
        )  # fmt: skip
        _store_seats(
            seat_value_ptr, seat_value_scale_ptr, value_seat_row_ptr, group * SEATS, new_value_ptr, stride_value_token,
            ring_value_ptr, value_scales_ptr, first + chosen, past, chosen >= 0, SEATS, HEAD_DIM, CAPACITY, BLOCK_SEATS,
            BLOCK_D,
        )  # fmt: skip


def seat_tokens(
    append: dict[str, Any], seats: dict[str, Tensor], key_order: Tensor | None, *,
    window: int, step: int, norm: int, orders: bool,
) -> None:  # fmt: skip
    """Keep tokens of the due groups apart.

    Args:
        append: arguments that the kernels of the append share; the flags `replaced_ptr` are written.
        seats: state of the seats by name; mutated.
        key_order: int16 [batch, num_kv_heads, head_dim], or None.
        window: newest tokens that stay in the ring.
        step: tokens that are packed together.
        norm: 1 or 2: the norm of a key that is its score.
        orders: whether to decide `key_order` of heads that have none yet; mutated then.
    """
    shared = (
        "key_ptr", "value_ptr", "valid_ptr", "lengths_ptr", "key_residual_ptr", "key_row_scale_ptr",
        "value_residual_ptr", "value_row_scale_ptr", "residual_valid_ptr", "replaced_ptr",
        "stride_key_batch", "stride_key_head", "stride_key_token",
        "stride_value_batch", "stride_value_head", "stride_value_token", "site", "q_len", "flags_per_head", "pairs",
        "NUM_KV_HEADS", "HEAD_DIM", "CAPACITY", "GROUP", "HAS_VALID",
    )  # fmt: skip
    pages, of_page = seats["seat_row"].shape[2:]
    of_group = of_page * append["GROUP"] // PAGE.value
    head_dim = append["HEAD_DIM"]
    arguments = {name: append[name] for name in shared} | {f"{name}_ptr": tensor for name, tensor in seats.items()}
    arguments |= {
        "key_order_ptr": append["lengths_ptr"] if key_order is None else key_order,
        "pages": pages,
        "WINDOW": window,
        "STEP": step,
        "SEATS": of_group,
        "NORM": norm,
        "ORDERS": orders,
        "CHUNK": min(next_power_of_2(head_dim), WIDEST),
        "BLOCK_SEATS": max(next_power_of_2(of_group), 4),
        "BLOCK_D": next_power_of_2(head_dim),
    }
    most_groups = append["flags_per_head"] // append["GROUP"]
    grid = (torch.sym_min(append["pairs"] * most_groups, MOST_PROGRAMS),)
    launch(_seat_tokens_kernel, grid, arguments, num_warps=4, num_stages=1)
