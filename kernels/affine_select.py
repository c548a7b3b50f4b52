"""Kernel that picks outlier tokens (OTT): which of the tokens about to be packed go to the pool in full precision.

The rules are in docs/storage.md, `Outlier pool`.
"""

import triton
import triton.language as tl

from ottfx.kernels.key_order import order_head
from ottfx.kernels.packing import PAGE, make_finite
from ottfx.kernels.window import load_real, load_tokens, packed_end


@triton.jit
def token_scores(
    key_ptr, stride_key_token, ring_ptr, ring_scale_ptr, token, past, live,
    NORM: tl.constexpr, CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Norms float32 [TOKENS] of the keys of `token`; arguments as those of `load_tokens`."""
    total = tl.zeros([TOKENS], tl.float32)
    for start in tl.range(0, HEAD_DIM, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        x = load_tokens(
            key_ptr, stride_key_token, ring_ptr, ring_scale_ptr, token, past, live, channel, channel < HEAD_DIM,
            CAPACITY, HEAD_DIM,
        )  # fmt: skip
        x = make_finite(x)
        if NORM == 1:
            total += tl.sum(tl.abs(x), axis=1)
        else:
            total += tl.sum(x * x, axis=1)
    if NORM == 2:
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def _load_seats(
    pool_ptr, new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, position, origin, live, past, channel, in_row,
    CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    # A seat's row is still where its token came from: old seat `origin`, or, where that is -1, the window.
    fresh = load_tokens(
        new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, position, past, live & (origin < 0), channel, in_row,
        CAPACITY, HEAD_DIM,
    )  # fmt: skip
    # [SEATS, CHUNK]
    stored = tl.load(
        pool_ptr + origin[:, None] * HEAD_DIM + channel[None, :],
        mask=(live & (origin >= 0))[:, None] & in_row[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.where((origin < 0)[:, None], fresh, stored)


@triton.jit
def _copy_seats(
    pool_ptr, new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, position, origin, live, row, past,
    CAPACITY: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, HEAD_DIM, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        in_row = channel < HEAD_DIM
        rows = _load_seats(
            pool_ptr, new_ptr, stride_new_token, ring_ptr, ring_scale_ptr, position, origin, live, past, channel,
            in_row, CAPACITY, HEAD_DIM,
        )  # fmt: skip
        # The rows read above may be the rows written below.
        tl.debug_barrier()
        target = pool_ptr + row[:, None] * HEAD_DIM + channel[None, :]
        tl.store(target, rows.to(pool_ptr.dtype.element_ty), mask=live[:, None] & in_row[None, :])


@triton.jit
def _select_in_head(
    pair, key_ptr, value_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr, value_residual_ptr, value_row_scale_ptr,
    residual_valid_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, value_outlier_position_ptr, spill_count_ptr, replaced_ptr,
    score_ptr, hard_ptr, stride_key_token, stride_value_token, past, key_packed, key_end,
    HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr, SEATS: tl.constexpr, SPILL: tl.constexpr,
    BLOCK_SEATS: tl.constexpr, NORM: tl.constexpr, HAS_VALID: tl.constexpr, ENCODED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # All groups that are due of one (sequence, kv head), in order. The pointers are its own, the spill count's is not.
    LIMIT: tl.constexpr = SPILL if SPILL > 1 else 1
    # Groups whose lowest scores are looked at together.
    BATCH: tl.constexpr = 2048 // GROUP if ENCODED else 1
    seat = tl.arange(0, BLOCK_SEATS)
    member = tl.arange(0, GROUP)
    position = tl.load(outlier_position_ptr + seat, mask=seat < SEATS, other=-1)
    origin = seat
    # With past = 0 and the seat numbers as tokens the pool itself is read as if it were new tokens.
    pool_score = token_scores(
        outlier_key_ptr, HEAD_DIM, outlier_key_ptr, key_row_scale_ptr, seat, 0, position >= 0,
        NORM, CAPACITY, HEAD_DIM, CHUNK, BLOCK_SEATS,
    )  # fmt: skip
    spilled = tl.load(spill_count_ptr + pair)
    changed = 0
    # Tokens of which there are scores: those of pages of only new tokens.
    scored_start = tl.cdiv(past, PAGE) * PAGE
    scored_end = key_end // PAGE * PAGE if ENCODED else scored_start

    for index in tl.range(key_packed, key_end, GROUP * BATCH):
        first = tl.cast(index, tl.int32)
        lowest = tl.full([BATCH], float("-inf"), tl.float32)
        if ENCODED:
            ahead = first + tl.arange(0, BATCH)[:, None] * GROUP + member[None, :]
            is_scored = (ahead >= scored_start) & (ahead < scored_end)
            lowest = tl.min(tl.load(score_ptr + (ahead - key_packed), mask=is_scored, other=float("-inf")), axis=1)
        for start in tl.range(first, tl.minimum(first + GROUP * BATCH, key_end), GROUP):
            start = tl.cast(start, tl.int32)
            token = start + member
            flag = tl.zeros([GROUP], tl.int8)
            # A group without a score below the pool's worst changes nothing.
            worst = tl.max(tl.where(seat < SEATS, tl.where(position >= 0, pool_score, float("inf")), 0.0), axis=0)
            its_lowest = tl.sum(tl.where(tl.arange(0, BATCH) == (start - first) // GROUP, lowest, 0.0), axis=0)
            if (spilled < LIMIT) & (its_lowest < worst):
                if (start >= scored_start) & (start < scored_end):
                    # Never without the encoder; `score_ptr` points to other numbers then.
                    score = tl.load(score_ptr + (token - key_packed)).to(tl.float32)
                    real = score < float("inf")
                else:
                    real = load_real(valid_ptr, residual_valid_ptr, token, past, token >= 0, CAPACITY, HAS_VALID)
                    score = token_scores(
                        key_ptr, stride_key_token, key_residual_ptr, key_row_scale_ptr, token, past, real,
                        NORM, CAPACITY, HEAD_DIM, CHUNK, GROUP,
                    )  # fmt: skip
                seated = position >= 0
                # Rank among group and pool together: lower score first, then the pool, then the earlier one.
                pool_first = seated[:, None] & (pool_score[:, None] <= score[None, :])
                group_first = real[None, :] & (score[None, :] < pool_score[:, None])
                earlier = (score[:, None] == score[None, :]) & (member[:, None] < member[None, :])
                before = real[:, None] & ((score[:, None] < score[None, :]) | earlier)
                rank = tl.sum(pool_first.to(tl.int32), axis=0) + tl.sum(before.to(tl.int32), axis=0)
                tied = (pool_score[:, None] == pool_score[None, :]) & (seat[:, None] < seat[None, :])
                pool_before = seated[:, None] & ((pool_score[:, None] < pool_score[None, :]) | tied)
                pool_rank = tl.sum(group_first.to(tl.int32), axis=1) + tl.sum(pool_before.to(tl.int32), axis=0)

                winner = real & (rank < SEATS)
                displaced = seated & (pool_rank >= SEATS)
                displaced_count = tl.sum(displaced.to(tl.int32), axis=0)
                if spilled + displaced_count > SPILL:
                    spilled = LIMIT + spilled * 0
                else:
                    if displaced_count > 0:
                        # The row comes from memory, not from `spilled`: what a store's address depends on through a
                        # call counts as mutated when the kernel is traced.
                        first_row = SEATS + tl.load(spill_count_ptr + pair)
                        order = tl.cumsum(displaced.to(tl.int32), axis=0) - 1
                        # [row from first_row on, seat]
                        moves = displaced[None, :] & (order[None, :] == seat[:, None])
                        moved = tl.sum(moves.to(tl.int32), axis=1) > 0
                        moved_position = tl.sum(tl.where(moves, position[None, :], 0), axis=1)
                        moved_origin = tl.sum(tl.where(moves, origin[None, :], 0), axis=1)
                        row = first_row + seat
                        _copy_seats(
                            outlier_key_ptr, key_ptr, stride_key_token, key_residual_ptr, key_row_scale_ptr,
                            moved_position, moved_origin, moved, row, past, CAPACITY, HEAD_DIM, CHUNK,
                        )  # fmt: skip
                        _copy_seats(
                            outlier_value_ptr, value_ptr, stride_value_token, value_residual_ptr, value_row_scale_ptr,
                            moved_position, moved_origin, moved, row, past, CAPACITY, HEAD_DIM, CHUNK,
                        )  # fmt: skip
                        tl.store(outlier_position_ptr + row, moved_position, mask=moved)
                        tl.store(value_outlier_position_ptr + row, moved_position, mask=moved)
                        tl.store(spill_count_ptr + pair, spilled + displaced_count)
                        tl.debug_barrier()
                    # [new seat, candidate]
                    from_group = winner[None, :] & (rank[None, :] == seat[:, None])
                    from_pool = (seated & (pool_rank < SEATS))[None, :] & (pool_rank[None, :] == seat[:, None])
                    taken = tl.sum(from_group.to(tl.int32), axis=1)
                    kept = tl.sum(from_pool.to(tl.int32), axis=1)
                    pool_score = tl.sum(tl.where(from_group, score[None, :], 0.0), axis=1) + tl.sum(
                        tl.where(from_pool, pool_score[None, :], 0.0), axis=1
                    )
                    origin = tl.sum(tl.where(from_pool, origin[None, :], 0), axis=1) - taken
                    position = (
                        tl.sum(tl.where(from_group, token[None, :], 0), axis=1)
                        + tl.sum(tl.where(from_pool, position[None, :], 0), axis=1)
                        - (1 - taken - kept)
                    )
                    spilled += displaced_count
                    changed += tl.sum(taken, axis=0)
                    flag = winner.to(tl.int8)
                    if ENCODED:
                        # The encoder packed the page with these tokens in its ranges.
                        is_hard = (tl.sum(taken, axis=0) > 0) & (start >= scored_start) & (start < scored_end)
                        tl.store(hard_ptr + (start - scored_start) // PAGE, is_hard.to(tl.int8), mask=is_hard)
            tl.store(replaced_ptr + (token - key_packed), flag)

    tl.store(spill_count_ptr + pair, spilled)
    if changed > 0:
        live = (seat < SEATS) & (position >= 0)
        _copy_seats(
            outlier_key_ptr, key_ptr, stride_key_token, key_residual_ptr, key_row_scale_ptr, position, origin, live,
            seat, past, CAPACITY, HEAD_DIM, CHUNK,
        )  # fmt: skip
        _copy_seats(
            outlier_value_ptr, value_ptr, stride_value_token, value_residual_ptr, value_row_scale_ptr, position, origin,
            live, seat, past, CAPACITY, HEAD_DIM, CHUNK,
        )  # fmt: skip
        tl.store(outlier_position_ptr + seat, position, mask=seat < SEATS)
        tl.store(value_outlier_position_ptr + seat, position, mask=seat < SEATS)


@triton.jit(do_not_specialize=["site", "q_len", "flags_per_head", "most_pages", "pairs"])
def _select_outliers_kernel(
    key_ptr, value_ptr, valid_ptr, lengths_ptr, key_residual_ptr, key_row_scale_ptr, value_residual_ptr,
    value_row_scale_ptr, residual_valid_ptr,
    outlier_key_ptr, outlier_position_ptr, outlier_value_ptr, value_outlier_position_ptr, spill_count_ptr, replaced_ptr,
    score_ptr, hard_ptr, key_order_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    site, q_len, flags_per_head, most_pages, pairs,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, SEATS: tl.constexpr, SPILL: tl.constexpr, BLOCK_SEATS: tl.constexpr,
    NORM: tl.constexpr, HAS_VALID: tl.constexpr, ENCODED: tl.constexpr, ORDERS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pairs = tl.cast(q_len, tl.int32), tl.cast(pairs, tl.int32)
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    key_packed = tl.load(lengths_ptr + site * 3 + 1).to(tl.int32)
    key_end = packed_end(past + q_len, key_packed, WINDOW, STEP)
    # In most decode steps nothing is due.
    end = pairs * (key_end > key_packed).to(tl.int32)
    for index in tl.range(tl.program_id(0), end, tl.num_programs(0)):
        pair = tl.cast(index, tl.int64)
        batch = pair // NUM_KV_HEADS
        head = pair % NUM_KV_HEADS
        if ORDERS:
            order_head(
                pair, batch, head, key_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr, residual_valid_ptr,
                key_order_ptr, stride_key_batch, stride_key_head, stride_key_token, q_len, past, key_packed, key_end,
                HEAD_DIM, CAPACITY, GROUP, WINDOW, HAS_VALID, BLOCK_D,
            )  # fmt: skip
        _select_in_head(
            pair,
            key_ptr + batch * stride_key_batch + head * stride_key_head,
            value_ptr + batch * stride_value_batch + head * stride_value_head,
            valid_ptr + batch * q_len,
            key_residual_ptr + pair * CAPACITY * HEAD_DIM,
            key_row_scale_ptr + pair * CAPACITY,
            value_residual_ptr + pair * CAPACITY * HEAD_DIM,
            value_row_scale_ptr + pair * CAPACITY,
            residual_valid_ptr + batch * CAPACITY,
            outlier_key_ptr + pair * (SEATS + SPILL) * HEAD_DIM,
            outlier_position_ptr + pair * (SEATS + SPILL),
            outlier_value_ptr + pair * (SEATS + SPILL) * HEAD_DIM,
            value_outlier_position_ptr + pair * (SEATS + SPILL),
            spill_count_ptr,
            replaced_ptr + pair * flags_per_head,
            score_ptr + pair * flags_per_head,
            hard_ptr + pair * most_pages,
            stride_key_token, stride_value_token, past, key_packed, key_end,
            HEAD_DIM, CAPACITY, GROUP, SEATS, SPILL, BLOCK_SEATS, NORM, HAS_VALID, ENCODED, CHUNK,
        )  # fmt: skip
