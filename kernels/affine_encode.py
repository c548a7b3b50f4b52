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
    bit_position,
    code_bits,
    code_excess,
    codes_of,
    group_constants,
    make_finite,
    pack_columns,
    pack_mixed,
    reciprocal,
    steps_of,
    symmetric_steps,
)
from ottfx.kernels.window import packed_end

VALUE_WARPS = 4
"""Warps of a program that encodes values; benchmarks/results/encode_kernels_h100.csv has what was tried."""


def key_tile(head_dim: int, range_search: bool) -> tuple[int, int]:
    """Return (channels of a page of keys that a program of the encoder holds at once, its warps).

    The table is in benchmarks/results/encode_kernels_h100.csv; a search keeps more of each element in registers.
    """
    return (min(head_dim, 32), 8) if range_search else (min(head_dim, 64), 4)


@triton.jit
def _third_bit_plane(bits):
    # int32 [2, words, 16] with a code in the low bits: bit 2 of each, as words.
    shift = bit_position(tl.arange(0, 16), 1)[None, None, :] + tl.arange(0, 2)[:, None, None] * 8
    return tl.sum(tl.sum(((bits >> 2) & 1) << shift, axis=2), axis=0)


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
        for start in tl.static_range(0, HEAD_DIM, CHUNK):
            channel = start + tl.arange(0, CHUNK)
            source = stored_channels(order_ptr + pair * HEAD_DIM, channel, MIXED)
            # Loaded as [CHUNK, PAGE]: the lanes of a warp lie along the first axis where addresses are gathered, and
            # a thread that holds many tokens of few channels makes few constants.
            x = tl.load(new_ptr + source[:, None] + row[None, :] * stride_key_token).to(tl.float32)
            # [PAGE, CHUNK]
            x = tl.trans(x)
            part = tl.sum(tl.abs(x) if NORM == 1 else x * x, axis=1)
            score += part
            # False for NaN. A sum within the bound has no term beyond it, and nothing is clamped.
            small = part <= (FINITE_MAX if NORM == 1 else FINITE_MAX * FINITE_MAX)
            easy = easy & tl.min(small.to(tl.int32), axis=0)
            if easy != 0:
                grouped = tl.reshape(x, [GROUPS, GROUP, CHUNK])
                # [GROUPS, CHUNK]
                levels = tl.broadcast_to(key_levels(channel, BITS, MIXED)[None, :], [GROUPS, CHUNK])
                low = tl.min(tl.where(free, grouped, FINITE_MAX), axis=1)
                high = tl.max(tl.where(free, grouped, -FINITE_MAX), axis=1)
                if SEARCH:
                    scale, zero_point = search_range(grouped, free, low, high, levels, GROUPS, GROUP, CHUNK)
                else:
                    scale, zero_point = group_constants(low, high, levels)
                steps = steps_of(
                    grouped,
                    tl.broadcast_to(zero_point.to(tl.float32)[:, None, :], [GROUPS, GROUP, CHUNK]),
                    tl.broadcast_to(reciprocal(scale)[:, None, :], [GROUPS, GROUP, CHUNK]),
                    tl.broadcast_to(levels[:, None, :], [GROUPS, GROUP, CHUNK]),
                )
                bits = codes_of(steps) if MIXED else code_bits(steps)
                offset = (slot * GROUPS + tl.arange(0, GROUPS)[:, None]) * HEAD_DIM + channel[None, :]
                tl.store(scale_ptr + offset, scale)
                tl.store(zero_point_ptr + offset, zero_point)
                page_ptr = codes_ptr + slot * (4 * HEAD_DIM * BITS)
                if BITS == 3:
                    plane = _third_bit_plane(tl.reshape(bits, [2, PAGE // 2 * (CHUNK // 16), 16]))
                    plane = tl.reshape(plane, [PAGE // 2, CHUNK // 16])
                    strip16 = start // 16 + tl.arange(0, CHUNK // 16)[None, :]
                    plane_row = tl.arange(0, PAGE // 2)[:, None]
                    tl.store(page_ptr + HEAD_DIM * 8 + strip16 * (PAGE // 2) + plane_row, plane)
                    bits = bits & 3
                if MIXED:
                    words = pack_mixed(tl.reshape(bits, [PAGE, CHUNK]), PAGE, CHUNK)
                else:
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
    LEVELS: tl.constexpr = (1 << BITS) - 1
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
        total = tl.zeros([STRIPS, HEAD_DIM], tl.float32)
        words = tl.zeros([STRIPS, HEAD_DIM], tl.int32)
        plane = tl.zeros([STRIPS, HEAD_DIM], tl.int32)
        # Token `member` of each of the 8 strips of 16 at a time: all codes of a word come to be in one lane.
        for member in tl.static_range(16):
            token = strip * 16 + member
            # [STRIPS, HEAD_DIM]
            x = tl.load(new_ptr + token[:, None] * stride_value_token + channel[None, :]).to(tl.float32)
            total += tl.abs(x)
            grouped = tl.reshape(x, [STRIPS, VALUE_GROUPS, MEMBERS])
            offset = (slot * VALUE_GROUPS + group[None, :]) * PAGE + token[:, None]
            # Constants are [STRIPS, VALUE_GROUPS].
            if SYMMETRIC:
                everyone = tl.full([STRIPS, VALUE_GROUPS, 1], 1, tl.int1)
                scale = symmetric_scale(grouped, everyone, tl.max(tl.abs(grouped), axis=2), LEVELS, SEARCH)
                per_step = tl.broadcast_to(reciprocal(scale)[:, :, None], [STRIPS, VALUE_GROUPS, MEMBERS])
                steps = symmetric_steps(grouped, per_step, LEVELS)
            else:
                low, high = tl.min(grouped, axis=2), tl.max(grouped, axis=2)
                if SEARCH:
                    # Every group is one of its own: [groups, members, 1].
                    levels = tl.full([STRIPS * VALUE_GROUPS, 1], LEVELS, tl.float32)
                    everyone = tl.full([STRIPS * VALUE_GROUPS, MEMBERS, 1], 1, tl.int1)
                    scale, zero_point = search_range(
                        tl.reshape(grouped, [STRIPS * VALUE_GROUPS, MEMBERS, 1]), everyone,
                        tl.reshape(low, [STRIPS * VALUE_GROUPS, 1]), tl.reshape(high, [STRIPS * VALUE_GROUPS, 1]),
                        levels, STRIPS * VALUE_GROUPS, MEMBERS, 1,
                    )  # fmt: skip
                    scale = tl.reshape(scale, [STRIPS, VALUE_GROUPS])
                    zero_point = tl.reshape(zero_point, [STRIPS, VALUE_GROUPS])
                else:
                    scale, zero_point = group_constants(low, high, LEVELS)
                steps = steps_of(
                    grouped,
                    tl.broadcast_to(zero_point.to(tl.float32)[:, :, None], [STRIPS, VALUE_GROUPS, MEMBERS]),
                    tl.broadcast_to(reciprocal(scale)[:, :, None], [STRIPS, VALUE_GROUPS, MEMBERS]),
                    LEVELS,
                )
                tl.store(zero_point_ptr + offset, zero_point)
            bits = code_bits(tl.reshape(steps, [STRIPS, HEAD_DIM]))
            if SEATED:
                seated = tl.load(replaced_ptr + pair * flags_per_head + (page * PAGE - packed) + token) != 0
                scale = tl.where(seated[:, None] & (group == 0)[None, :], marked(scale), scale)
            tl.store(scale_ptr + offset, scale)
            if BITS == 3:
                plane += ((bits >> 2) & 1) << bit_position(member, 1)
                bits = bits & 3
            words += bits << bit_position(member % PER_WORD, WIDTH)
            if member % PER_WORD == PER_WORD - 1:
                if BITS != 3:
                    words -= code_excess(WIDTH)
                word_row = strip * (16 // PER_WORD) + member // PER_WORD
                tl.store(page_ptr + word_row[:, None] * HEAD_DIM + channel[None, :], words)
                words = tl.zeros([STRIPS, HEAD_DIM], tl.int32)
        if BITS == 3:
            halves = tl.reshape(plane, [STRIPS, 2, HALF]) << (tl.arange(0, 2) * 8)[None, :, None]
            half_channel = tl.arange(0, HALF)
            tl.store(page_ptr + HEAD_DIM * 8 + strip[:, None] * HALF + half_channel[None, :], tl.sum(halves, axis=1))
        # As for the keys, but known only now: such a page is written anew.
        not_small = tl.max((total <= FINITE_MAX).to(tl.int32) ^ 1, axis=1)
        is_hard = tl.max(not_small, axis=0) > 0
        tl.store(hard_ptr + pair * most_pages + index, is_hard.to(tl.int8), mask=is_hard)
