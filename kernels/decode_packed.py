"""Device function of decode attention: the softmax over a share of the packed tokens, for at most 16 query columns.

It runs at the speed of the memory because nothing but products happens to a code: codes go to the tensor cores as
subnormal float16, scales are folded into the queries and into the weights, zero points are a term of rank one, and the
next tile is loaded while this one is worked on. One warp a program; scores are kept transposed, tokens x columns.
"""

import triton
import triton.language as tl

from ottfx.kernels.decode_tile import by_row, lane_token, load_keys, load_query_lanes, load_values, row_token, spread
from ottfx.kernels.decode_window import NOTHING_SEEN, store_part
from ottfx.kernels.fragments import (
    LEAST_UNIT,
    SUBNORMAL,
    larger_unit,
    left_operand,
    lift_exponent,
    power_of_2,
    right_operand,
    subnormal_codes,
)
from ottfx.kernels.packing import PAGE

ZERO_DROP = tl.constexpr(256.0)
"""Zero points are used this much smaller, so that they fit float16 when they are lifted."""
WEIGHT_LIFT = tl.constexpr(15)
"""Weights times value scales, at most 1, are used as float16 larger by 2 to this power."""
LEAST_MARKED = tl.constexpr(-(2.0**-24))
"""The float16 scale of a token that is not to be seen: no larger unit follows from it."""
WEIGHT_UNIT = tl.constexpr(0.5**WEIGHT_LIFT.value)


@triton.jit
def _key_scores(
    words, plane, steep, scale, zero_point, folded_query, zero_lift,
    BITS: tl.constexpr, MIXED: tl.constexpr, NG: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    # [TILE / 16, 16, COLUMNS] scores / SUBNORMAL: codes x (query * scale) + zero point x query.
    keys = left_operand(subnormal_codes(words, plane, steep, BITS, MIXED), NG, K_WIDTH)
    # All 16 rows are the zero points, so the product is in place for every token. They are lifted against the query.
    if NG == 1:
        zeros = tl.reshape(zero_point * zero_lift[None, None, :, :], [4, 8, BLOCK_D // 8, 2])
        zeros = tl.reshape(tl.permute(zeros, [1, 2, 0, 3]), [1, 8, BLOCK_D])
        zeros = tl.reshape(tl.broadcast_to(zeros, [2, 8, BLOCK_D]), [16, BLOCK_D])
        plain = tl.permute(tl.reshape(folded_query, [4, COLUMNS, BLOCK_D // 8, 2]), [2, 0, 3, 1])
        offset = tl.dot(zeros, tl.reshape(plain, [BLOCK_D, COLUMNS])) * (ZERO_DROP / SUBNORMAL)
        offset = tl.broadcast_to(offset[None, :, :], [TILE // 16, 16, COLUMNS])
        queries = tl.reshape(folded_query, [4, COLUMNS // 8, 8, BLOCK_D // 32, 8]) * scale[:, None, :, :, :]
        queries = tl.reshape(queries, [4, COLUMNS, BLOCK_D // (4 * K_WIDTH), K_WIDTH])
        queries = tl.reshape(tl.permute(queries, [2, 0, 3, 1]), [BLOCK_D, COLUMNS])
        scores = tl.dot(keys, queries, tl.reshape(offset, [TILE, COLUMNS]))
    else:
        zeros = tl.reshape(zero_point * zero_lift[None, None, None, :, :], [4, 8, NG, BLOCK_D // 8, 2])
        zeros = tl.reshape(tl.permute(zeros, [2, 1, 3, 0, 4]), [NG, 1, 8, BLOCK_D])
        zeros = tl.reshape(tl.broadcast_to(zeros, [NG, 2, 8, BLOCK_D]), [NG, 16, BLOCK_D])
        plain = tl.permute(tl.reshape(folded_query, [4, COLUMNS, BLOCK_D // 8, 2]), [2, 0, 3, 1])
        plain = tl.broadcast_to(tl.reshape(plain, [1, BLOCK_D, COLUMNS]), [NG, BLOCK_D, COLUMNS])
        offset = tl.dot(zeros, plain) * (ZERO_DROP / SUBNORMAL)
        offset = tl.broadcast_to(offset[:, None, :, :], [NG, TILE // NG // 16, 16, COLUMNS])
        queries = tl.reshape(folded_query, [4, COLUMNS // 8, 8, 1, BLOCK_D // 32, 8]) * scale[:, None, :, :, :, :]
        queries = tl.reshape(queries, [4, COLUMNS, NG, BLOCK_D // (4 * K_WIDTH), K_WIDTH])
        queries = tl.reshape(tl.permute(queries, [2, 3, 0, 4, 1]), [NG, BLOCK_D, COLUMNS])
        scores = tl.dot(keys, queries, tl.reshape(offset, [NG, TILE // NG, COLUMNS]))
    return tl.reshape(scores, [TILE // 16, 16, COLUMNS])


@triton.jit
def _weights_operand(
    weight, NG: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, SINGLE: tl.constexpr, K_WIDTH: tl.constexpr
):
    # Float16 [TILE / 16, 16, columns], rows as the scores -> the right operand [TILE, COLUMNS].
    RUN: tl.constexpr = TILE // 8 // NG
    if SINGLE:
        # Every lane has the weights of its own tokens; a column takes those that its lane needs as contraction
        # elements, so nothing moves, and the sum over the columns is the sum over the tokens.
        SHARE: tl.constexpr = TILE // 4 // RUN
        weight = tl.reshape(weight, [TILE // 8, 8, 4])
        c = tl.arange(0, 4)
        if NG > 1:
            group = tl.arange(0, NG)[:, None, None, None]
            mine = group == (c // (4 // NG))[None, None, None, :]
            weight = tl.sum(tl.where(mine, tl.reshape(weight, [NG, RUN, 8, 4]), 0.0), axis=0).to(tl.float16)
        n = tl.arange(0, 8)[None, :, None, None]
        owner = (c % (4 // NG))[None, None, :, None] * SHARE + tl.arange(0, SHARE)[None, None, None, :]
        owned = tl.where(owner == n, tl.broadcast_to(tl.reshape(weight, [RUN, 8, 4, 1]), [RUN, 8, 4, SHARE]), 0.0)
        owned = tl.permute(tl.reshape(owned, [RUN // K_WIDTH, K_WIDTH, 8, 4, SHARE]), [4, 0, 3, 1, 2])
        return tl.reshape(owned, [TILE, 8])
    else:
        natural = tl.permute(tl.reshape(weight, [NG, RUN, 8, COLUMNS]), [0, 2, 1, 3])
        return right_operand(tl.reshape(natural, [TILE, COLUMNS]), K_WIDTH)


@triton.jit
def _mask_tile(
    scores, mask_ptr, first_token, packed, stride_mask_token, mask_offset,
    NG: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, SINGLE: tl.constexpr, ONE_MASK: tl.constexpr,
):  # fmt: skip
    # Bool mask over the tokens from `first_token` on; `mask_offset` [COLUMNS] is that of each column.
    if ONE_MASK:
        # Gathered as the bits of one number, of which every lane tests its own.
        tl.static_assert(TILE == 64)
        i = tl.arange(0, TILE).to(tl.int64)
        mask_ptr += tl.min(mask_offset, axis=0)
        entry = tl.load(mask_ptr + (first_token + i) * stride_mask_token, mask=first_token + i < packed, other=0)
        bits = tl.sum(entry.to(tl.int64) << i, axis=0)
        own_bits = (bits >> by_row(lane_token(NG, TILE), NG, TILE).to(tl.int64)).to(tl.int32) & 1
        allowed = spread(own_bits, SINGLE, COLUMNS) != 0
    else:
        token = first_token + row_token(NG, TILE)
        pointer = mask_ptr + (token.to(tl.int64) * stride_mask_token)[:, None] + mask_offset[None, :]
        entry = tl.load(pointer, mask=(token < packed)[:, None], other=0)
        allowed = tl.reshape(entry, [TILE // 16, 16, COLUMNS]) != 0
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def attend_packed(
    pair, head, first_tile, last_tile, packed, query_ptr, mask_ptr, score_factor, rows, slot,
    live_columns, mask_offset, key_channel, steep,
    key_codes_ptr, key_scale_ptr, key_zero_point_ptr, value_codes_ptr, value_scale_ptr, value_zero_point_ptr,
    partial_ptr, log_sum_ptr, stride_query_head, stride_query_token, stride_mask_token, pages,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    MIXED: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, ONE_MASK: tl.constexpr,
    SINGLE: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_TILES: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend over the tiles `first_tile .. last_tile - 1`, at least one, and store the part in `slot` [COLUMNS].

    `query_ptr` and `mask_ptr` are those of this sequence; `mask_offset` [COLUMNS] leads to the mask of each column,
    `key_channel` is that of `query_channels`, `steep` that of `is_steep`.
    """
    NG: tl.constexpr = TILE // GROUP if GROUP < TILE else 1
    key_codes_ptr += pair * pages * (4 * HEAD_DIM * KEY_BITS)
    key_scale_ptr += pair * pages * (PAGE // GROUP * HEAD_DIM)
    key_zero_point_ptr += pair * pages * (PAGE // GROUP * HEAD_DIM)
    value_codes_ptr += pair * pages * (4 * HEAD_DIM * VALUE_BITS)
    value_scale_ptr += pair * pages * PAGE
    value_zero_point_ptr += pair * pages * PAGE
    if BLOCK_D > 128:
        query, exponent = load_query_lanes(
            query_ptr, key_channel, head, rows, stride_query_head, stride_query_token,
            QUERIES_PER_KV, MIXED, SINGLE, COLUMNS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    key_words, key_plane, key_scale, key_zero_point = load_keys(
        first_tile, key_codes_ptr, key_scale_ptr, key_zero_point_ptr,
        KEY_BITS, GROUP, NG, HEAD_DIM, BLOCK_D, TILE,
    )  # fmt: skip
    value_words, value_plane, value_scale, value_zero_point = load_values(
        first_tile, value_codes_ptr, value_scale_ptr, value_zero_point_ptr,
        VALUE_BITS, SYMMETRIC, NG, HEAD_DIM, BLOCK_D, TILE,
    )  # fmt: skip
    # The first tile is under way while queries are brought into their form, where the registers hold both.
    if BLOCK_D <= 128:
        query, exponent = load_query_lanes(
            query_ptr, key_channel, head, rows, stride_query_head, stride_query_token,
            QUERIES_PER_KV, MIXED, SINGLE, COLUMNS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    own_channel = tl.arange(0, BLOCK_D // 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    lift = lift_exponent(own_channel, steep, KEY_BITS, MIXED)
    folded_query = (query * power_of_2(-exponent[None, :, None, None] - lift[None, None, :, :])).to(tl.float16)
    zero_lift = (power_of_2(lift) / ZERO_DROP).to(tl.float16)
    score_unit = power_of_2(exponent) * (score_factor * SUBNORMAL)
    if SINGLE:
        score_unit = tl.max(score_unit, axis=0) + tl.zeros([4], tl.float32)
    value_lift = by_row(
        power_of_2(-lift_exponent(lane_token(NG, TILE), False, VALUE_BITS, False) + WEIGHT_LIFT), NG, TILE
    )

    SEEN: tl.constexpr = 4 if SINGLE else COLUMNS
    row_max = tl.full([SEEN], NOTHING_SEEN, tl.float32)
    row_sum = tl.zeros([8, SEEN], tl.float32)
    zero_sum = tl.zeros([8, SEEN], tl.float32)
    acc = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    # `acc` counts in units of the largest value scale so far, rounded up to a power of two.
    unit = LEAST_UNIT
    for tile in tl.range(first_tile, last_tile):
        scores = _key_scores(
            key_words, key_plane, steep, key_scale, key_zero_point, folded_query, zero_lift,
            KEY_BITS, MIXED, NG, BLOCK_D, TILE, COLUMNS, K_WIDTH,
        )  # fmt: skip
        # Under way while this tile is worked on; the last one is loaded twice.
        next_tile = tl.minimum(tile + 1, last_tile - 1)
        key_words, key_plane, key_scale, key_zero_point = load_keys(
            next_tile, key_codes_ptr, key_scale_ptr, key_zero_point_ptr,
            KEY_BITS, GROUP, NG, HEAD_DIM, BLOCK_D, TILE,
        )  # fmt: skip
        if SINGLE:
            scores, _ = tl.split(tl.reshape(scores, [TILE // 16, 16, 4, 2]))

        if not WHOLE_TILES:
            # What lies behind the last token is not initialized: as marked, with the least scale there is. A compiled
            # constant of -0.0 has no sign.
            live = by_row(tile * TILE + lane_token(NG, TILE) < packed, NG, TILE)
            value_scale = tl.where(live, value_scale, LEAST_MARKED)
            if not SYMMETRIC:
                value_zero_point = tl.where(live, value_zero_point, 0.0)
        value_scale = value_scale.to(tl.float32)
        # The sign bit of a value scale marks a token that is in the pool.
        marked = spread(value_scale.to(tl.int32, bitcast=True), SINGLE, COLUMNS) < 0
        scores = tl.where(marked, float("-inf"), scores)
        if MASK:
            scores = _mask_tile(
                scores, mask_ptr, tile * TILE, packed, stride_mask_token, mask_offset,
                NG, TILE, COLUMNS, SINGLE, ONE_MASK,
            )  # fmt: skip
        value_scale = tl.abs(value_scale)
        unit_now, inverse_now = larger_unit(unit, value_scale)
        weight_scale = value_scale * (value_lift * inverse_now)

        new_max = tl.maximum(row_max, tl.max(tl.max(scores, axis=0), axis=0) * score_unit)
        decay = tl.exp2(row_max - new_max)
        weight = tl.exp2(scores * score_unit[None, None, :] - new_max[None, None, :])
        row_max = new_max
        # The value of code 0.
        if SYMMETRIC:
            lowest = value_scale * (-0.5 * ((1 << VALUE_BITS) - 1))
        else:
            lowest = value_zero_point.to(tl.float32)
        weight_zero = weight * spread(lowest, SINGLE, COLUMNS)
        row_sum = row_sum * decay[None, :] + tl.sum(tl.reshape(weight, [TILE // 8, 8, SEEN]), axis=0)
        zero_sum = zero_sum * decay[None, :] + tl.sum(tl.reshape(weight_zero, [TILE // 8, 8, SEEN]), axis=0)
        weight = (weight * spread(weight_scale, SINGLE, COLUMNS)).to(tl.float16)
        weights = _weights_operand(weight, NG, TILE, COLUMNS, SINGLE, K_WIDTH)
        values = left_operand(subnormal_codes(value_words, value_plane, False, VALUE_BITS, False), 1, K_WIDTH)
        decay = decay * (unit * inverse_now)
        unit = unit_now
        if SINGLE:
            acc = tl.dot(values, weights, acc * tl.max(decay, axis=0))
        else:
            acc = tl.dot(values, weights, acc * decay[None, :])
        value_words, value_plane, value_scale, value_zero_point = load_values(
            next_tile, value_codes_ptr, value_scale_ptr, value_zero_point_ptr,
            VALUE_BITS, SYMMETRIC, NG, HEAD_DIM, BLOCK_D, TILE,
        )  # fmt: skip

    # Row R * 8 + n of the product is channel 32 * (R / 4) + 4 * n + R % 4.
    r = tl.arange(0, BLOCK_D)
    channel = r // 32 * 32 + r % 8 * 4 + r // 8 % 4
    acc *= unit * (SUBNORMAL * WEIGHT_UNIT)
    if SINGLE:
        total = tl.sum(acc, axis=1) + tl.max(tl.sum(zero_sum, axis=0), axis=0)
        # In column 0; the other columns are not live.
        result = tl.broadcast_to(total[:, None], [BLOCK_D, COLUMNS])
        row_max = tl.zeros([COLUMNS], tl.float32) + tl.max(row_max, axis=0)
        row_sum = tl.zeros([COLUMNS], tl.float32) + tl.max(tl.sum(row_sum, axis=0), axis=0)
    else:
        result = acc + tl.sum(zero_sum, axis=0)[None, :]
        row_sum = tl.sum(row_sum, axis=0)
    store_part(result, row_max, row_sum, partial_ptr, log_sum_ptr, slot, channel, live_columns, HEAD_DIM)
