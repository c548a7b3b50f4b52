"""Kernels that encode whole pages of a prompt: pages of which every token is new and due, in one pass over the input.

They take the pages that need no care. A page with padding, or with numbers that are not small, is left to
`ottfx/kernels/affine_store.py`, which also writes a page anew when `ottfx/kernels/affine_select.py` finds an outlier in
it: `hard` says which. What is stored is defined in docs/storage.md, `Codes`, `Scales` and `append`.
"""

import triton
import triton.language as tl

from ottfx.kernels.affine_pack import key_levels, marked, stored_channels
from ottfx.kernels.grid_search import search_range, symmetric_scale
from ottfx.kernels.packing import (
    FINITE_MAX,
    PAGE,
    ROUND_MAGIC,
    bit_position,
    code_bits,
    code_excess,
    group_constants,
    is_steep,
    make_finite,
    mixed_position,
    pack_columns,
    reciprocal,
    steps_of,
    symmetric_steps,
)
from ottfx.kernels.window import packed_end

KEY_CHANNELS = 64
"""Channels of a page of keys that a program holds at once; benchmarks/results/encode_kernels_h100.csv has others."""
KEY_WARPS = 4
CHANNELS_OF_A_WARP = 128
"""Channels of eight tokens that a warp of a program that encodes values holds: 32 a lane, of one token."""


def value_warps(head_dim: int) -> int:
    """Return the warps of a program that encodes values."""
    return max(head_dim // CHANNELS_OF_A_WARP, 1)


@triton.jit
def _load_strip_tokens(pointer, stride_token, member, STRIPS: tl.constexpr, HEAD_DIM: tl.constexpr):
    # [STRIPS, HEAD_DIM]: token `member` of each strip. 16 bytes a lane, and few lanes to a token, as each of them makes
    # the token's constants. They are neighbours: sums over other lanes come out wrong with Triton 3.6.
    RUN: tl.constexpr = HEAD_DIM // 4 if HEAD_DIM > 128 else 32 if HEAD_DIM > 32 else HEAD_DIM
    i = tl.arange(0, STRIPS * HEAD_DIM)
    token = i // RUN % STRIPS * 16 + member
    x = tl.load(pointer + token * stride_token + i // (RUN * STRIPS) * RUN + i % RUN)
    x = tl.permute(tl.reshape(x, [HEAD_DIM // RUN, STRIPS, RUN]), [1, 0, 2])
    return tl.reshape(x, [STRIPS, HEAD_DIM])


@triton.jit
def _third_bit_plane(bits):
    # int32 [2, words, 16] with a code in the low bits: bit 2 of each, as words.
    shift = bit_position(tl.arange(0, 16), 1)[None, None, :] + tl.arange(0, 2)[:, None, None] * 8
    return tl.sum(tl.sum(((bits >> 2) & 1) << shift, axis=2), axis=0)


@triton.jit
def _store_mixed(page_ptr, steps, steep, start, CHUNK: tl.constexpr):
    # Round steps float32 [PAGE, CHUNK] of the channels from `start` on, and write words of mixed widths. A half of a
    # word is the sum of codes times powers of two, which a product of the tensor cores gives exactly.
    COLUMNS: tl.constexpr = CHUNK // 8 if CHUNK > 64 else 8
    channel = tl.arange(0, CHUNK)
    column = tl.arange(0, COLUMNS)
    position = mixed_position(channel % 16, steep)
    of_column = (channel // 16 * 2 + position // 16)[:, None] == column[None, :]
    weight = tl.where(of_column, (1 << position % 16)[:, None], 0).to(tl.float16)
    halves = tl.dot((steps + ROUND_MAGIC - ROUND_MAGIC).to(tl.float16), weight).to(tl.int32)
    low, high = tl.split(tl.reshape(halves, [PAGE, COLUMNS // 2, 2]))
    strip = tl.arange(0, COLUMNS // 2)[None, :]
    row = tl.arange(0, PAGE)[:, None]
    tl.store(page_ptr + (start // 16 + strip) * PAGE + row, low | (high << 16), mask=strip < CHUNK // 16)


@triton.jit(do_not_specialize=["site", "q_len", "pages", "most_pages", "flags_per_head"])
def _encode_key_pages_kernel(
    key_ptr, valid_ptr, lengths_ptr, order_ptr, codes_ptr, scale_ptr, zero_point_ptr, score_ptr, hard_ptr,
    replaced_ptr, stride_key_batch, stride_key_head, stride_key_token,
    site, q_len, pages, most_pages, flags_per_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, MIXED: tl.constexpr,
    SEARCH: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_OUTLIERS: tl.constexpr, SEATED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pages, most_pages = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(most_pages, tl.int32)
    GROUPS: tl.constexpr = PAGE // GROUP
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    pair = (tl.program_id(0) // most_pages).to(tl.int64)
    index = tl.program_id(0) % most_pages
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    packed = tl.load(lengths_ptr + site * 3 + 1).to(tl.int32)
    page = tl.cdiv(past, PAGE) + index
    is_whole = (page + 1) * PAGE <= packed_end(past + q_len, packed, WINDOW, STEP)
    if is_whole:
        row = tl.arange(0, PAGE)
        first = page * PAGE - past
        easy = is_whole.to(tl.int32)
        if HAS_VALID:
            valid = tl.load(valid_ptr + pair // NUM_KV_HEADS * q_len + first + row)
            easy = tl.min((valid != 0).to(tl.int32), axis=0)
        free = tl.full([GROUPS, GROUP, 1], 1, tl.int1)
        if SEATED:
            seated = tl.load(replaced_ptr + pair * flags_per_head + (page * PAGE - packed) + row)
            free = tl.reshape(seated == 0, [GROUPS, GROUP])[:, :, None]
        score = tl.zeros([PAGE], tl.float32)
        new_ptr = key_ptr + pair // NUM_KV_HEADS * stride_key_batch + pair % NUM_KV_HEADS * stride_key_head
        new_ptr += first.to(tl.int64) * stride_key_token
        slot = pair * pages + page
        steep = is_steep(order_ptr + pair * HEAD_DIM, MIXED)
        for start in tl.static_range(0, HEAD_DIM, CHUNK):
            channel = start + tl.arange(0, CHUNK)
            source = stored_channels(order_ptr + pair * HEAD_DIM, channel, MIXED)
            # Loaded as [CHUNK, PAGE]: the lanes of a warp lie along the first axis where addresses are gathered, and
            # a thread that holds many tokens of few channels makes few constants.
            x = tl.load(new_ptr + source[:, None] + row[None, :] * stride_key_token).to(tl.float32)
            # [PAGE, CHUNK]
            x = tl.trans(x)
            # False for NaN. Of what is small nothing is clamped.
            if SEARCH and not HAS_OUTLIERS:
                # Along tokens, of which a lane has many. A maximum passes NaN over, a sum does not.
                total = tl.sum(x, axis=0)
                small = (total == total) & (tl.max(tl.abs(x), axis=0) <= FINITE_MAX)
            else:
                part = tl.sum(tl.abs(x) if NORM == 1 else x * x, axis=1)
                score += part
                # A sum within the bound has no term beyond it.
                small = part <= (FINITE_MAX if NORM == 1 else FINITE_MAX * FINITE_MAX)
            easy = easy & tl.min(small.to(tl.int32), axis=0)
            if easy != 0:
                grouped = tl.reshape(x, [GROUPS, GROUP, CHUNK])
                # [GROUPS, CHUNK]
                levels = tl.broadcast_to(key_levels(channel, steep, BITS, MIXED)[None, :], [GROUPS, CHUNK])
                low = tl.min(tl.where(free, grouped, FINITE_MAX), axis=1)
                high = tl.max(tl.where(free, grouped, -FINITE_MAX), axis=1)
                if SEARCH:
                    scale, zero_point = search_range(
                        grouped, free, low, high, levels, GROUPS, GROUP, CHUNK, 4 if MIXED else BITS, SEATED
                    )
                else:
                    scale, zero_point = group_constants(low, high, levels)
                steps = steps_of(
                    grouped,
                    tl.broadcast_to(zero_point.to(tl.float32)[:, None, :], [GROUPS, GROUP, CHUNK]),
                    tl.broadcast_to(reciprocal(scale)[:, None, :], [GROUPS, GROUP, CHUNK]),
                    tl.broadcast_to(levels[:, None, :], [GROUPS, GROUP, CHUNK]),
                )
                offset = (slot * GROUPS + tl.arange(0, GROUPS)[:, None]) * HEAD_DIM + channel[None, :]
                tl.store(scale_ptr + offset, scale)
                tl.store(zero_point_ptr + offset, zero_point)
                page_ptr = codes_ptr + slot * (4 * HEAD_DIM * BITS)
                if MIXED:
                    _store_mixed(page_ptr, tl.reshape(steps, [PAGE, CHUNK]), steep, start, CHUNK)
                else:
                    bits = code_bits(steps)
                    if BITS == 3:
                        plane = _third_bit_plane(tl.reshape(bits, [2, PAGE // 2 * (CHUNK // 16), 16]))
                        plane = tl.reshape(plane, [PAGE // 2, CHUNK // 16])
                        strip16 = start // 16 + tl.arange(0, CHUNK // 16)[None, :]
                        plane_row = tl.arange(0, PAGE // 2)[:, None]
                        tl.store(page_ptr + HEAD_DIM * 8 + strip16 * (PAGE // 2) + plane_row, plane)
                        bits = bits & 3
                    words = pack_columns(bits, WIDTH, PER_WORD, PAGE, CHUNK)
                    if BITS != 3:
                        words -= code_excess(WIDTH)
                    strip = start // PER_WORD + tl.arange(0, CHUNK // PER_WORD)
                    tl.store(page_ptr + strip[None, :] * PAGE + row[:, None], words)
        if HAS_OUTLIERS:
            if easy == 0:
                score = tl.zeros([PAGE], tl.float32)
                for chunk in tl.range(0, HEAD_DIM, CHUNK):
                    column = chunk + tl.arange(0, CHUNK)
                    y = make_finite(tl.load(new_ptr + row[:, None] * stride_key_token + column[None, :]))
                    score += tl.sum(tl.abs(y) if NORM == 1 else y * y, axis=1)
            if NORM == 2:
                score = tl.sqrt_rn(score)
            if HAS_VALID:
                score = tl.where(valid != 0, score, float("inf"))
            tl.store(score_ptr + pair * flags_per_head + (page * PAGE - packed) + row, score)
        tl.store(hard_ptr + pair * most_pages + index, (easy == 0).to(tl.int8))


@triton.jit
def _value_steps(
    x, STRIPS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    # Of values float32 [STRIPS, GROUPS, MEMBERS]: scales and zero points (or 0) float16 [STRIPS, GROUPS], and how many
    # steps they are from code 0.
    LEVELS: tl.constexpr = (1 << BITS) - 1
    zero_point = 0
    if SYMMETRIC:
        everyone = tl.full([STRIPS, GROUPS, 1], 1, tl.int1)
        scale = symmetric_scale(x, everyone, tl.max(tl.abs(x), axis=2), BITS, SEARCH)
        steps = symmetric_steps(x, tl.broadcast_to(reciprocal(scale)[:, :, None], x.shape), LEVELS)
    else:
        low, high = tl.min(x, axis=2), tl.max(x, axis=2)
        if SEARCH:
            # Every group is one of its own: [groups, members, 1].
            levels = tl.full([STRIPS * GROUPS, 1], LEVELS, tl.float32)
            everyone = tl.full([STRIPS * GROUPS, MEMBERS, 1], 1, tl.int1)
            scale, zero_point = search_range(
                tl.reshape(x, [STRIPS * GROUPS, MEMBERS, 1]), everyone, tl.reshape(low, [STRIPS * GROUPS, 1]),
                tl.reshape(high, [STRIPS * GROUPS, 1]), levels, STRIPS * GROUPS, MEMBERS, 1, BITS, False,
            )  # fmt: skip
            scale, zero_point = tl.reshape(scale, [STRIPS, GROUPS]), tl.reshape(zero_point, [STRIPS, GROUPS])
        else:
            scale, zero_point = group_constants(low, high, LEVELS)
        from_zero = tl.broadcast_to(zero_point.to(tl.float32)[:, :, None], x.shape)
        steps = steps_of(x, from_zero, tl.broadcast_to(reciprocal(scale)[:, :, None], x.shape), LEVELS)
    return scale, zero_point, steps


@triton.jit(do_not_specialize=["site", "q_len", "pages", "most_pages", "flags_per_head"])
def _encode_value_pages_kernel(
    value_ptr, valid_ptr, lengths_ptr, codes_ptr, scale_ptr, zero_point_ptr, hard_ptr, replaced_ptr,
    stride_value_batch, stride_value_head, stride_value_token,
    site, q_len, pages, most_pages, flags_per_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SEARCH: tl.constexpr, VALUE_GROUPS: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    HAS_VALID: tl.constexpr, SEATED: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pages, most_pages = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(most_pages, tl.int32)
    STRIPS: tl.constexpr = PAGE // 16
    MEMBERS: tl.constexpr = HEAD_DIM // VALUE_GROUPS
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = (tl.program_id(0) // most_pages).to(tl.int64)
    index = tl.program_id(0) % most_pages
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    packed = tl.load(lengths_ptr + site * 3 + 2).to(tl.int32)
    page = tl.cdiv(past, PAGE) + index
    is_whole = (page + 1) * PAGE <= packed_end(past + q_len, packed, WINDOW, STEP)
    easy = is_whole.to(tl.int32)
    if HAS_VALID:
        row = tl.arange(0, PAGE)
        new_valid_ptr = valid_ptr + pair // NUM_KV_HEADS * q_len + (page * PAGE - past)
        valid = tl.load(new_valid_ptr + row, mask=tl.where(is_whole, row, -1) >= 0, other=0)
        easy = tl.min((valid != 0).to(tl.int32), axis=0)
    if easy != 0:
        strip = tl.arange(0, STRIPS)
        channel = tl.arange(0, HEAD_DIM)
        group = tl.arange(0, VALUE_GROUPS)
        new_ptr = value_ptr + pair // NUM_KV_HEADS * stride_value_batch + pair % NUM_KV_HEADS * stride_value_head
        new_ptr += (page * PAGE - past).to(tl.int64) * stride_value_token
        slot = pair * pages + page
        page_ptr = codes_ptr + slot * (4 * HEAD_DIM * BITS)
        small = tl.full([STRIPS], 1, tl.int32)
        plane = tl.zeros([STRIPS, HEAD_DIM], tl.int32)
        later = _load_strip_tokens(new_ptr, stride_value_token, 0, STRIPS, HEAD_DIM)
        for first in tl.range(0, 16, PER_WORD):
            words = tl.zeros([STRIPS, HEAD_DIM], tl.int32)
            # Token `member` of each of the 8 strips of 16 at a time: all codes of a word come to be in one lane.
            for member in tl.range(first, first + PER_WORD):
                member = tl.cast(member, tl.int32)
                x = later.to(tl.float32)
                # Under way while this token is worked on; the last one is loaded twice.
                later = _load_strip_tokens(new_ptr, stride_value_token, tl.minimum(member + 1, 15), STRIPS, HEAD_DIM)
                # False for NaN. A sum within the bound has no term beyond it.
                small = small & (tl.sum(tl.abs(x), axis=1) <= FINITE_MAX).to(tl.int32)
                scale, zero_point, steps = _value_steps(
                    tl.reshape(x, [STRIPS, VALUE_GROUPS, MEMBERS]), STRIPS, VALUE_GROUPS, MEMBERS, BITS, SYMMETRIC,
                    SEARCH,
                )  # fmt: skip
                token = strip * 16 + member
                if SEATED:
                    seated = tl.load(replaced_ptr + pair * flags_per_head + (page * PAGE - packed) + token) != 0
                    scale = tl.where(seated[:, None] & (group == 0)[None, :], marked(scale), scale)
                offset = (slot * VALUE_GROUPS + group[None, :]) * PAGE + token[:, None]
                tl.store(scale_ptr + offset, scale)
                if not SYMMETRIC:
                    tl.store(zero_point_ptr + offset, zero_point)
                bits = code_bits(tl.reshape(steps, [STRIPS, HEAD_DIM]))
                if BITS == 3:
                    plane += ((bits >> 2) & 1) << bit_position(member, 1)
                    bits = bits & 3
                words += bits << bit_position(member % PER_WORD, WIDTH)
            if BITS != 3:
                words -= code_excess(WIDTH)
            word_row = strip * (16 // PER_WORD) + tl.cast(first, tl.int32) // PER_WORD
            tl.store(page_ptr + word_row[:, None] * HEAD_DIM + channel[None, :], words)
        if BITS == 3:
            lower, upper = tl.split(tl.permute(tl.reshape(plane, [STRIPS, 2, HALF]), [0, 2, 1]))
            half_channel = tl.arange(0, HALF)
            tl.store(page_ptr + HEAD_DIM * 8 + strip[:, None] * HALF + half_channel[None, :], lower | (upper << 8))
        # As for the keys, but known only now: such a page is written anew.
        is_hard = tl.min(small, axis=0) == 0
        tl.store(hard_ptr + pair * most_pages + index, is_hard.to(tl.int8), mask=is_hard)
