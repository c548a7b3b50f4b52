"""Device functions that quantize the tokens that became due and write their codes into pages.

What is stored is defined in docs/storage.md, `Codes`, `Scales` and `append`.
"""

import triton
import triton.language as tl

from ottfx.kernels.grid_search import search_range, symmetric_scale
from ottfx.kernels.packing import (
    FINITE_MAX,
    LOWER_ROW_BITS,
    PAGE,
    STEEP_MARK,
    UPPER_ROW_BITS,
    codes_of,
    group_constants,
    highest_codes,
    is_steep,
    make_finite,
    pack_columns,
    pack_mixed,
    pack_rows,
    reciprocal,
    steps_of,
    symmetric_steps,
)
from ottfx.kernels.window import load_real, load_tokens


@triton.jit
def _merge_words(pointer, words, touched, live):
    # Partial words keep the bits of tokens that are not due.
    old = tl.load(pointer, mask=live & (touched != -1), other=0)
    tl.store(pointer, (old & ~touched) | words, mask=live & (touched != 0))


@triton.jit
def _store_key_codes(
    page_ptr, codes, steep, due, channel_start, BITS: tl.constexpr, MIXED: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    # codes int32 [PAGE, CHUNK]: the channels from `channel_start` on of all tokens of a page.
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    row = tl.arange(0, PAGE)[:, None]
    strip = channel_start // PER_WORD + tl.arange(0, CHUNK // PER_WORD)[None, :]
    if MIXED:
        words = pack_mixed(codes, steep, PAGE, CHUNK)
    else:
        words = pack_columns(codes & ((1 << WIDTH) - 1), WIDTH, PER_WORD, PAGE, CHUNK)
    tl.store(page_ptr + strip * PAGE + row, words, mask=due[:, None] & (strip >= 0))
    if BITS == 3:
        HALF: tl.constexpr = PAGE // 2
        STRIPS: tl.constexpr = CHUNK // 16
        upper = tl.arange(0, 2)[:, None, None]
        plane = tl.reshape(pack_columns(codes >> 2, 1, 16, PAGE, CHUNK), [2, HALF, STRIPS])
        words = tl.sum(tl.where(due_halves(due, HALF, STRIPS), plane << (upper * 8), 0), axis=0)
        bits = tl.where(upper == 0, LOWER_ROW_BITS, UPPER_ROW_BITS)
        touched = tl.sum(tl.where(due_halves(due, HALF, STRIPS), bits, 0), axis=0)
        strip16 = channel_start // 16 + tl.arange(0, STRIPS)[None, :]
        plane_ptr = page_ptr + HEAD_DIM * 8 + strip16 * HALF + tl.arange(0, HALF)[:, None]
        _merge_words(plane_ptr, words, touched, strip16 >= 0)


@triton.jit
def due_halves(due, HALF: tl.constexpr, STRIPS: tl.constexpr):
    """Rows [2 * HALF] as [2, HALF, STRIPS]."""
    return tl.broadcast_to(tl.reshape(due, [2, HALF])[:, :, None], [2, HALF, STRIPS])


@triton.jit
def pack_key_page(
    pair, page, channel_start, key_ptr, stride_key_token, ring_ptr, ring_scale_ptr, valid_ptr, ring_valid_ptr,
    replaced_ptr, order_ptr, codes_ptr, scale_ptr, zero_point_ptr, past, packed, end, pages,
    BITS: tl.constexpr, MIXED: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr, HAS_OUTLIERS: tl.constexpr, SEATED: tl.constexpr,
    MEAN_OF_REST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Quantize the due tokens of one page of keys, CHUNK stored channels of them from `channel_start` on."""
    GROUPS: tl.constexpr = PAGE // GROUP
    token = page * PAGE + tl.arange(0, PAGE)
    due = (token >= packed) & (token < end)
    channel = channel_start + tl.arange(0, CHUNK)
    steep = is_steep(order_ptr + pair * HEAD_DIM, MIXED)
    source = stored_channels(order_ptr + pair * HEAD_DIM, channel, MIXED)
    levels = tl.broadcast_to(key_levels(channel, steep, BITS, MIXED)[None, :], [GROUPS, CHUNK])
    # [PAGE, CHUNK]
    x = load_tokens(
        key_ptr, stride_key_token, ring_ptr, ring_scale_ptr, token, past, due, source, channel < HEAD_DIM,
        CAPACITY, HEAD_DIM,
    )  # fmt: skip
    real = load_real(valid_ptr, ring_valid_ptr, token, past, due, CAPACITY, HAS_VALID)
    kept = real
    if HAS_OUTLIERS:
        kept = real & (tl.load(replaced_ptr + (token - packed), mask=due, other=0) == 0)
    members = kept
    if SEATED:
        # Coded like any other, in ranges that are those of the others.
        kept = real
    elif not MEAN_OF_REST:
        members = real

    # [GROUPS, GROUP, CHUNK]
    x = tl.reshape(make_finite(x), [GROUPS, GROUP, CHUNK])
    kept = tl.reshape(kept, [GROUPS, GROUP])[:, :, None]
    members = tl.reshape(members, [GROUPS, GROUP])
    count = tl.sum(members.to(tl.int32), axis=1)[:, None]
    members = members[:, :, None]
    total = tl.sum(tl.where(members, x, 0.0), axis=1)
    mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32) + tl.zeros([GROUPS, CHUNK], tl.float32))
    x = tl.where(kept, x, mean[:, None, :])
    low = tl.where(count > 0, tl.min(tl.where(members, x, FINITE_MAX), axis=1), 0.0)
    high = tl.where(count > 0, tl.max(tl.where(members, x, -FINITE_MAX), axis=1), 0.0)
    if SEARCH:
        scale, zero_point = search_range(
            x, members, low, high, levels, GROUPS, GROUP, CHUNK, 4 if MIXED else BITS, False
        )
    else:
        scale, zero_point = group_constants(low, high, levels)
    codes = codes_of(
        steps_of(
            x,
            tl.broadcast_to(zero_point.to(tl.float32)[:, None, :], [GROUPS, GROUP, CHUNK]),
            tl.broadcast_to(reciprocal(scale)[:, None, :], [GROUPS, GROUP, CHUNK]),
            tl.broadcast_to(levels[:, None, :], [GROUPS, GROUP, CHUNK]),
        )
    )

    slot = pair * pages + page
    group = tl.arange(0, GROUPS)[:, None]
    group_start = page * PAGE + group * GROUP
    group_due = (group_start >= packed) & (group_start < end) & (channel >= 0)[None, :]
    offset = slot * (GROUPS * HEAD_DIM) + group * HEAD_DIM + channel[None, :]
    tl.store(scale_ptr + offset, scale, mask=group_due)
    tl.store(zero_point_ptr + offset, zero_point, mask=group_due)
    page_ptr = codes_ptr + slot * (4 * HEAD_DIM * BITS)
    _store_key_codes(
        page_ptr, tl.reshape(codes, [PAGE, CHUNK]), steep, due, channel_start, BITS, MIXED, HEAD_DIM, CHUNK
    )


@triton.jit
def marked(scale):
    """Scales float16 of tokens that are kept apart: with the sign bit, not negated, so that one of 0 is marked too."""
    return (scale.to(tl.int16, bitcast=True) | -32768).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def stored_channels(order_ptr, channel, MIXED: tl.constexpr):
    """Which channel of a key is stored at `channel`; `order_ptr` is that of this (sequence, kv head)."""
    if MIXED:
        ordered = tl.load(order_ptr + channel).to(tl.int32)
        # Nothing but padding was packed so far.
        channel = tl.where(ordered < 0, channel, ordered % STEEP_MARK)
    return channel


@triton.jit
def key_levels(channel, steep, BITS: tl.constexpr, MIXED: tl.constexpr):
    """Float32: the highest code of stored channels."""
    if MIXED:
        return highest_codes(channel, steep)
    else:
        return tl.full(channel.shape, (1 << BITS) - 1, tl.float32)


@triton.jit
def store_value_codes(
    page_ptr, codes, due, strip, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Write codes int32 [16, 2 * BLOCK_HALF] of 16 tokens; the columns are two halves of the channels, each padded."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    HALF: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = 2 * BLOCK_HALF
    column = tl.arange(0, COLUMNS)
    channel = column // BLOCK_HALF * HALF + column % BLOCK_HALF
    live = (column % BLOCK_HALF < HALF)[None, :]
    is_due = tl.broadcast_to(due[:, None], [16, COLUMNS])
    mask: tl.constexpr = (1 << WIDTH) - 1
    words = pack_rows(tl.where(is_due, codes & mask, 0), WIDTH, PER_WORD, 16, COLUMNS)
    touched = pack_rows(tl.where(is_due, mask, 0), WIDTH, PER_WORD, 16, COLUMNS)
    word_row = strip * (16 // PER_WORD) + tl.arange(0, 16 // PER_WORD)[:, None]
    _merge_words(page_ptr + word_row * HEAD_DIM + channel[None, :], words, touched, live)
    if BITS == 3:
        upper = tl.arange(0, 2)[:, None]
        plane = tl.reshape(pack_rows(tl.where(is_due, codes >> 2, 0), 1, 16, 16, COLUMNS), [2, BLOCK_HALF])
        plane_touched = tl.reshape(pack_rows(tl.where(is_due, 1, 0), 1, 16, 16, COLUMNS), [2, BLOCK_HALF])
        words = tl.sum(plane << (upper * 8), axis=0)
        touched = tl.sum(plane_touched << (upper * 8), axis=0)
        half_column = tl.arange(0, BLOCK_HALF)
        plane_ptr = page_ptr + HEAD_DIM * 8 + strip * HALF + half_column
        _merge_words(plane_ptr, words, touched, half_column < HALF)


@triton.jit
def pack_value_strip(
    pair, page, strip, value_ptr, stride_value_token, ring_ptr, ring_scale_ptr, valid_ptr, ring_valid_ptr, replaced_ptr,
    codes_ptr, scale_ptr, zero_point_ptr, past, packed, end, pages,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, SEATED: tl.constexpr, MEAN_OF_REST: tl.constexpr, MARK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Quantize the due tokens among the 16 of one strip of a page of values."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    HALF: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = 2 * BLOCK_HALF
    column = tl.arange(0, COLUMNS)
    in_row = column % BLOCK_HALF < HALF
    channel = column // BLOCK_HALF * HALF + column % BLOCK_HALF
    row = strip * 16 + tl.arange(0, 16)
    token = page * PAGE + row
    due = (token >= packed) & (token < end)
    # [16, COLUMNS]
    x = load_tokens(
        value_ptr, stride_value_token, ring_ptr, ring_scale_ptr, token, past, due, channel, in_row, CAPACITY, HEAD_DIM
    )
    x = make_finite(x)
    real = load_real(valid_ptr, ring_valid_ptr, token, past, due, CAPACITY, HAS_VALID)
    if HAS_OUTLIERS:
        # Offsets from `packed` are those of the keys: both halves have one schedule where tokens are kept apart.
        replaced = tl.load(replaced_ptr + (token - packed), mask=due, other=0) != 0
    # A token with a seat is coded like any other.
    if HAS_OUTLIERS and not SEATED:
        if tl.max(replaced.to(tl.int32), axis=0) > 0:
            total = tl.zeros([COLUMNS], tl.float32)
            count = 0
            group_start = (page * PAGE + strip * 16) // GROUP * GROUP
            for start in tl.range(group_start, group_start + GROUP, 16):
                other = start + tl.arange(0, 16)
                member = load_real(valid_ptr, ring_valid_ptr, other, past, other < end, CAPACITY, HAS_VALID)
                if MEAN_OF_REST:
                    member = member & (tl.load(replaced_ptr + (other - packed), mask=member, other=0) == 0)
                rows = load_tokens(
                    value_ptr, stride_value_token, ring_ptr, ring_scale_ptr, other, past, member, channel, in_row,
                    CAPACITY, HEAD_DIM,
                )  # fmt: skip
                total += tl.sum(make_finite(rows), axis=0)
                count += tl.sum(member.to(tl.int32), axis=0)
            mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32) + tl.zeros([COLUMNS], tl.float32))
            x = tl.where(replaced[:, None], mean[None, :], x)

    slot = pair * pages + page
    per_step_tile = tl.zeros([16, COLUMNS], tl.float32)
    zero_point_tile = tl.zeros([16, COLUMNS], tl.float32)
    for group in tl.static_range(VALUE_GROUPS):
        in_group = (in_row & (channel // (HEAD_DIM // VALUE_GROUPS) == group))[None, :]
        if SYMMETRIC:
            mine = in_group & real[:, None]
            largest = tl.max(tl.abs(tl.where(mine, x, 0.0)), axis=1)[:, None]
            scale = tl.reshape(symmetric_scale(x[:, None, :], mine[:, None, :], largest, BITS, SEARCH), [16])
        else:
            low = tl.where(real, tl.min(tl.where(in_group, x, FINITE_MAX), axis=1), 0.0)
            high = tl.where(real, tl.max(tl.where(in_group, x, -FINITE_MAX), axis=1), 0.0)
            if SEARCH:
                # One group of each token: [tokens, channels, 1].
                levels = tl.full([16, 1], LEVELS, tl.float32)
                scale, zero_point = search_range(
                    x[:, :, None], (in_group & real[:, None])[:, :, None], low[:, None], high[:, None], levels,
                    16, COLUMNS, 1, BITS, False,
                )  # fmt: skip
                scale, zero_point = tl.reshape(scale, [16]), tl.reshape(zero_point, [16])
            else:
                scale, zero_point = group_constants(low, high, LEVELS)
            zero_point_tile = tl.where(in_group, zero_point.to(tl.float32)[:, None], zero_point_tile)
        per_step_tile = tl.where(in_group, reciprocal(scale)[:, None], per_step_tile)
        if HAS_OUTLIERS and MARK and group == 0:
            scale = tl.where(replaced, marked(scale), scale)
        offset = (slot * VALUE_GROUPS + group) * PAGE + row
        tl.store(scale_ptr + offset, scale, mask=due)
        if not SYMMETRIC:
            tl.store(zero_point_ptr + offset, zero_point, mask=due)
    if SYMMETRIC:
        codes = codes_of(symmetric_steps(tl.where(real[:, None], x, 0.0), per_step_tile, LEVELS))
    else:
        codes = codes_of(steps_of(x, zero_point_tile, per_step_tile, LEVELS))
    store_value_codes(codes_ptr + slot * (4 * HEAD_DIM * BITS), codes, due, strip, BITS, HEAD_DIM, BLOCK_HALF)
