"""Device functions of decode attention: rows of 8 bits, on the tensor cores in the layout of `fragments.py`.

They are those of the window and of the seats of groups; `decode_coded_window.py` has the programs that read them.

An int8 plus 128 is a code of 8 bits, a subnormal float16 as it is; the 128 times what it is multiplied by is taken off
again. Scales of keys are factors of scores, those of values of weights. So a byte costs less than one instruction.

Lane `4 * n + c` holds, of a tile of 16 tokens, of the keys of `n` and `n + 8` the channels of its c, which are
neighbours, and of the values of the tokens `4 * c .. 4 * c + 3` the channels of its n, which are neighbours too.
"""

import triton
import triton.language as tl

from ottfx.kernels.decode_packed import WEIGHT_UNIT
from ottfx.kernels.decode_tile import load_query_lanes, query_channels, spread
from ottfx.kernels.decode_window import DENSE_TILE
from ottfx.kernels.fragments import (
    SUBNORMAL,
    byte_halves,
    halves,
    larger_unit,
    left_operand,
    pair_halves,
    power_of_2,
    right_operand,
    subnormal_codes,
)
from ottfx.kernels.packing import PAGE

_SIGNS = tl.constexpr(0x80808080 - (1 << 32))
"""The highest bits of four bytes: what turns int8 into numbers 0 .. 255."""


@triton.jit
def _place(row, first_place, SIZE: tl.constexpr):
    # Where a row is in a ring of SIZE whose row 0 is at `first_place`; SIZE 0: in no ring, but where it says.
    if SIZE == 0:
        return row
    else:
        place = (row + first_place).to(tl.uint32, bitcast=True)
        return tl.minimum(place, place - SIZE).to(tl.int32, bitcast=True)


@triton.jit
def _load_words(
    rows_ptr, row, last, first_place, word, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    # Int32 words of four channels each; `rows_ptr` is int8 and that of this (sequence, kv head).
    live = row < last
    if HEAD_DIM != BLOCK_D:
        live = live & (word < HEAD_DIM // 4)
    words_ptr = rows_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words_ptr + _place(row, first_place, SIZE) * (HEAD_DIM // 4) + word, mask=live, other=0)


@triton.jit
def _load_key_rows(
    rows_ptr, first, last, first_place, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    # [c 4, n 8, 2, W]
    W: tl.constexpr = BLOCK_D // 16
    # [2, W / 4, n 8, c 4, 4 words], flat: the load is 16 bytes a lane.
    i = tl.arange(0, 4 * BLOCK_D)
    word = i // 4 % 4 * W + i // 128 % (W // 4) * 4 + i % 4
    row = first + i // (32 * W) * 8 + i // 16 % 8
    words = _load_words(rows_ptr, row, last, first_place, word, SIZE, HEAD_DIM, BLOCK_D)
    words = tl.permute(tl.reshape(words, [2, W // 4, 8, 4, 4]), [3, 2, 0, 1, 4])
    return tl.reshape(words, [4, 8, 2, W])


@triton.jit
def _load_value_rows(
    rows_ptr, first, last, first_place, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    # [c 4, n 8, W, 4 tokens]
    W: tl.constexpr = BLOCK_D // 32
    V: tl.constexpr = 4 if W > 4 else W
    # [4 tokens, W / V, n 8, c 4, V words], but for V = 2 with two of the tokens before the words: 4 words a lane.
    i = tl.arange(0, 4 * BLOCK_D)
    if V == 4:
        member = i // (32 * W)
        word = i // 128 % (W // 4) * 4 + i % 4
    else:
        member = i // 128 * 2 + i // 2 % 2
        word = i % 2
    row = first + i // 4 % 4 * 4 + member
    word += i // 16 % 8 * W
    words = _load_words(rows_ptr, row, last, first_place, word, SIZE, HEAD_DIM, BLOCK_D)
    if V == 4:
        words = tl.permute(tl.reshape(words, [4, W // 4, 8, 4, 4]), [3, 2, 1, 4, 0])
    else:
        words = tl.permute(tl.reshape(words, [2, 8, 4, 2, 2]), [2, 1, 4, 0, 3])
    return tl.reshape(words, [4, 8, W, 4])


@triton.jit
def _value_codes(words):
    # Words [4, 8, W, 4 tokens] of four channels -> float16 [4, 8, 4 * W channels, 1, 4 tokens].
    W: tl.constexpr = words.shape[2]
    even, odd = tl.split(tl.reshape(words ^ _SIGNS, [4, 8, W, 2, 2]))
    lower, upper = pair_halves(even, odd, False), pair_halves(even, odd, True)
    first = tl.join(halves(byte_halves(lower, False)), halves(byte_halves(lower, True)))
    second = tl.join(halves(byte_halves(upper, False)), halves(byte_halves(upper, True)))
    # [4, 8, W, pair of tokens, token of the pair, lower half of the channels' index, upper]
    run = tl.permute(tl.join(first, second), [0, 1, 2, 6, 5, 3, 4])
    return tl.reshape(run, [4, 8, 4 * W, 1, 4])


@triton.jit
def key_operands(
    query_ptr, head, rows, stride_query_head, stride_query_token, QUERIES_PER_KV: tl.constexpr,
    SINGLE: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    """Queries as the right operand of codes of bytes, what 128 times them adds to scores, and their exponents."""
    query, exponent = load_query_lanes(
        query_ptr, query_channels(query_ptr, False, COLUMNS, HEAD_DIM, BLOCK_D), head, rows,
        stride_query_head, stride_query_token, QUERIES_PER_KV, False, SINGLE, COLUMNS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    query = (query * power_of_2(-exponent)[None, :, None, None]).to(tl.float16)
    # Codes of a word come as those of its bytes 0, 2, 1 and 3.
    query = tl.permute(tl.reshape(query, [4, COLUMNS, BLOCK_D // 16, 2, 2]), [0, 1, 2, 4, 3])
    query = tl.reshape(query, [4, COLUMNS, BLOCK_D // (4 * K_WIDTH), K_WIDTH])
    query = tl.reshape(tl.permute(query, [2, 0, 3, 1]), [BLOCK_D, COLUMNS])
    zero = tl.full([DENSE_TILE, BLOCK_D], -128 / SUBNORMAL, tl.float32).to(tl.float16)
    return query, tl.dot(zero, query), exponent


@triton.jit
def _load_steps(scale_ptr, row, last, first_place, SIZE: tl.constexpr):
    # Scales of `row` int32 [64], 4 times each -> [16, c 4].
    scale = tl.load(scale_ptr + _place(row, first_place, SIZE), mask=row < last, other=0.0)
    return tl.reshape(scale, [DENSE_TILE, 4])


@triton.jit
def _load_positions(seat_row_ptr, row, last, packed, PAGE_SEATS: tl.constexpr):
    # The token of each row, -1 where there is none; with PAGE_SEATS rows are seats.
    if PAGE_SEATS == 0:
        return tl.where(row < last, packed + row, -1)
    else:
        in_page = tl.load(seat_row_ptr + row, mask=row < last, other=-1).to(tl.int32)
        token = row // PAGE_SEATS * PAGE + in_page
        return tl.where((in_page >= 0) & (token < packed), token, -1)


@triton.jit
def attend_rows(
    first, last, first_place, packed, keys_ptr, key_scale_ptr, values_ptr, value_scale_ptr, seat_row_ptr,
    queries, zero_scores, score_unit, mask_ptr, mask_offset, live_columns, stride_mask_token,
    unit, row_max, row_sum, weight_sum, acc,
    SIZE: tl.constexpr, PAGE_SEATS: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr, ONE_MASK: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, K_WIDTH: tl.constexpr,
):  # fmt: skip
    """Take the rows `first .. last - 1` of a ring of SIZE, or of seats, into the running softmax.

    Sums are in units of the largest value scale so far, rounded up to a power of two, as in `attend_packed`.
    """
    own_row = tl.arange(0, 4 * DENSE_TILE) // 4
    key_words = _load_key_rows(keys_ptr, first, last, first_place, SIZE, HEAD_DIM, BLOCK_D)
    key_step = _load_steps(key_scale_ptr, first + own_row, last, first_place, SIZE)
    position = _load_positions(seat_row_ptr, first + own_row, last, packed, PAGE_SEATS)
    value_words = _load_value_rows(values_ptr, first, last, first_place, SIZE, HEAD_DIM, BLOCK_D)
    value_step = _load_steps(value_scale_ptr, first + own_row, last, first_place, SIZE)
    for start in tl.range(first, last, DENSE_TILE):
        keys = left_operand(subnormal_codes(key_words ^ _SIGNS, 0, False, 8, False), 1, K_WIDTH)
        scores = tl.dot(keys, queries, zero_scores)
        scores = tl.reshape(scores, [1, DENSE_TILE, COLUMNS]) * spread(key_step.to(tl.float32), False, COLUMNS)
        seen = position >= 0
        if MASK and ONE_MASK:
            column = mask_ptr + tl.min(mask_offset, axis=0) + position.to(tl.int64) * stride_mask_token
            seen = seen & (tl.load(column, mask=seen, other=0) != 0)
        seen = spread(tl.reshape(seen, [DENSE_TILE, 4]), False, COLUMNS)
        if MASK and not ONE_MASK:
            row = tl.cast(start, tl.int32) + tl.arange(0, DENSE_TILE)
            token = _load_positions(seat_row_ptr, row, last, packed, PAGE_SEATS)
            entry = mask_ptr + (token.to(tl.int64) * stride_mask_token)[:, None] + mask_offset[None, :]
            entry = tl.load(entry, mask=(token >= 0)[:, None] & live_columns[None, :], other=0)
            seen = seen & (tl.reshape(entry, [1, DENSE_TILE, COLUMNS]) != 0)
        # Under way while this tile is worked on.
        later = tl.cast(start, tl.int32) + DENSE_TILE
        key_words = _load_key_rows(keys_ptr, later, last, first_place, SIZE, HEAD_DIM, BLOCK_D)
        key_step = _load_steps(key_scale_ptr, later + own_row, last, first_place, SIZE)
        position = _load_positions(seat_row_ptr, later + own_row, last, packed, PAGE_SEATS)
        scores = tl.where(seen, scores * score_unit[None, None, :], float("-inf"))
        value_scale = value_step.to(tl.float32)
        unit_now, inverse_now = larger_unit(unit, value_scale)
        new_max = tl.maximum(row_max, tl.max(tl.max(scores, axis=0), axis=0))
        decay = tl.exp2(row_max - new_max)
        row_max = new_max
        weight = tl.exp2(scores - new_max[None, None, :])
        row_sum = row_sum * decay[None, :] + tl.sum(tl.reshape(weight, [2, 8, COLUMNS]), axis=0)
        lifted = spread(value_scale * (inverse_now * (1.0 / WEIGHT_UNIT)), False, COLUMNS)
        weight = (weight * lifted).to(tl.float16)
        decay = decay * (unit * inverse_now)
        unit = unit_now
        # Of the rounded weights, so that what 128 adds is taken off exactly.
        total = tl.sum(tl.reshape(weight.to(tl.float32), [2, 8, COLUMNS]), axis=0)
        weight_sum = weight_sum * decay[None, :] + total
        weights = right_operand(tl.reshape(weight, [DENSE_TILE, COLUMNS]), K_WIDTH)
        values = left_operand(_value_codes(value_words), 1, K_WIDTH)
        acc = tl.dot(values, weights, acc * decay[None, :])
        value_words = _load_value_rows(values_ptr, later, last, first_place, SIZE, HEAD_DIM, BLOCK_D)
        value_step = _load_steps(value_scale_ptr, later + own_row, last, first_place, SIZE)
    return unit, row_max, row_sum, weight_sum, acc
