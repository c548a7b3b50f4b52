"""Kernel of the append: due tokens become codes, new tokens go into the ring (docs/storage.md, *append*)."""

import triton
import triton.language as tl

from ottfx.kernels.affine_pack import pack_key_page, pack_value_strip
from ottfx.kernels.packing import PAGE, load_key_code
from ottfx.kernels.rotate import NO_SEED, rotate_rows
from ottfx.kernels.window import encode_rows, packed_end


@triton.jit
def _write_ring_rows(
    batch, head, pair, item, key_ptr, value_ptr, valid_ptr, stride_key_token, stride_value_token,
    key_residual_ptr, key_row_scale_ptr, value_residual_ptr, value_row_scale_ptr, residual_valid_ptr,
    key_codes_ptr, key_scale_ptr, key_zero_point_ptr, past, q_len, pages, decoded_start, decoded_end,
    KEY_BITS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    HAS_VALID: tl.constexpr, WRITE_BACK: tl.constexpr, BLOCK_D: tl.constexpr, RING_ROWS: tl.constexpr,
):  # fmt: skip
    # The newest tokens, RING_ROWS of them a program; with write-back also those that the ring holds already.
    length = past + q_len
    first = tl.maximum(length - CAPACITY, 0)
    if not WRITE_BACK:
        first = tl.maximum(first, past)
    first += item * RING_ROWS
    wanted = (first + RING_ROWS > past) & (first < length)
    if WRITE_BACK:
        wanted = wanted | ((first + RING_ROWS > decoded_start) & (first < decoded_end))
    if wanted:
        token = first + tl.arange(0, RING_ROWS)
        is_new = (token >= past) & (token < length)
        channel = tl.arange(0, BLOCK_D)[None, :]
        live = is_new[:, None] & (channel < HEAD_DIM)
        ring_row = token % CAPACITY
        source = (token - past).to(tl.int64)[:, None]
        target = ring_row[:, None] * HEAD_DIM + channel
        # [RING_ROWS, BLOCK_D]
        key = tl.load(key_ptr + source * stride_key_token + channel, mask=live, other=0.0)
        value = tl.load(value_ptr + source * stride_value_token + channel, mask=live, other=0.0)
        if key_residual_ptr.dtype.element_ty == tl.int8:
            key, key_row_scale = encode_rows(key)
            value, value_row_scale = encode_rows(value)
            tl.store(key_row_scale_ptr + ring_row, key_row_scale, mask=is_new)
            tl.store(value_row_scale_ptr + ring_row, value_row_scale, mask=is_new)
        else:
            key = key.to(key_residual_ptr.dtype.element_ty)
            value = value.to(value_residual_ptr.dtype.element_ty)
        tl.store(value_residual_ptr + target, value, mask=live)
        if WRITE_BACK:
            decoded = (token >= decoded_start) & (token < decoded_end)
            live_decoded = decoded[:, None] & (channel < HEAD_DIM)
            slot = pair * pages + token // PAGE
            page_row = (token % PAGE)[:, None]
            code = load_key_code(
                key_codes_ptr + slot[:, None] * (4 * HEAD_DIM * KEY_BITS), page_row, channel, live_decoded,
                KEY_BITS, HEAD_DIM,
            )  # fmt: skip
            offset = (slot[:, None] * (PAGE // GROUP) + page_row // GROUP) * HEAD_DIM + channel
            scale = tl.load(key_scale_ptr + offset, mask=live_decoded, other=0.0).to(tl.float32)
            zero_point = tl.load(key_zero_point_ptr + offset, mask=live_decoded, other=0.0).to(tl.float32)
            restored = (code.to(tl.float32) * scale + zero_point).to(key_residual_ptr.dtype.element_ty)
            key = tl.where(live_decoded, restored, key)
            live = live | live_decoded
        tl.store(key_residual_ptr + target, key, mask=live)
        if head == 0:
            real = tl.full([RING_ROWS], 1, tl.uint8)
            if HAS_VALID:
                real = (tl.load(valid_ptr + (token - past), mask=is_new, other=0) != 0).to(tl.uint8)
            tl.store(residual_valid_ptr + ring_row, real, mask=is_new)


@triton.jit
def _write_ring_row(
    block, pairs, past, key_ptr, value_ptr, valid_ptr, key_residual_ptr, key_row_scale_ptr, value_residual_ptr,
    value_row_scale_ptr, residual_valid_ptr,
    stride_key_batch, stride_key_head, stride_value_batch, stride_value_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK_D: tl.constexpr, RING_ROWS: tl.constexpr,
):  # fmt: skip
    # The one new token of RING_ROWS (sequence, kv head)s.
    pair = block.to(tl.int64) * RING_ROWS + tl.arange(0, RING_ROWS)
    exists = pair < pairs
    batch, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    channel = tl.arange(0, BLOCK_D)[None, :]
    live = exists[:, None] & (channel < HEAD_DIM)
    # [RING_ROWS, BLOCK_D]
    key = tl.load(key_ptr + (batch * stride_key_batch + head * stride_key_head)[:, None] + channel, mask=live, other=0)
    offset = (batch * stride_value_batch + head * stride_value_head)[:, None] + channel
    value = tl.load(value_ptr + offset, mask=live, other=0)
    if ROTATED > 1:
        value = rotate_rows(value.to(tl.float32), ROTATED, NO_SEED, RING_ROWS, BLOCK_D).to(value.dtype)
    row = pair * CAPACITY + past % CAPACITY
    if key_residual_ptr.dtype.element_ty == tl.int8:
        key, key_row_scale = encode_rows(key)
        value, value_row_scale = encode_rows(value)
        tl.store(key_row_scale_ptr + row, key_row_scale, mask=exists)
        tl.store(value_row_scale_ptr + row, value_row_scale, mask=exists)
    target = row[:, None] * HEAD_DIM + channel
    tl.store(key_residual_ptr + target, key.to(key_residual_ptr.dtype.element_ty), mask=live)
    tl.store(value_residual_ptr + target, value.to(value_residual_ptr.dtype.element_ty), mask=live)
    first_head = exists & (head == 0)
    real = tl.full([RING_ROWS], 1, tl.uint8)
    if HAS_VALID:
        real = (tl.load(valid_ptr + batch, mask=first_head, other=0) != 0).to(tl.uint8)
    tl.store(residual_valid_ptr + batch * CAPACITY + past % CAPACITY, real, mask=first_head)


@triton.jit
def _is_left(hard_ptr, page, past, end, ENCODED: tl.constexpr):
    # Whether a page is still to be packed; `hard_ptr` points to the flags of this pair.
    left = page * PAGE < end
    if ENCODED:
        index = page - tl.cdiv(past, PAGE)
        is_whole = (index >= 0) & (page * PAGE + PAGE <= end)
        left = left & (tl.load(hard_ptr + index, mask=is_whole, other=1) != 0)
    return left


@triton.jit(
    do_not_specialize=[
        "site", "q_len", "flags_per_head", "most_pages", "pages", "pairs", "key_items", "value_items", "ring_items",
    ]
)  # fmt: skip
def _store_tokens_kernel(
    key_ptr, value_ptr, valid_ptr, lengths_ptr, replaced_ptr, hard_ptr,
    key_codes_ptr, key_scale_ptr, key_zero_point_ptr, key_residual_ptr, key_row_scale_ptr, residual_valid_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_point_ptr, value_residual_ptr, value_row_scale_ptr, key_order_ptr,
    stride_key_batch, stride_key_head, stride_key_token, stride_value_batch, stride_value_head, stride_value_token,
    site, q_len, flags_per_head, most_pages, pages, pairs, key_items, value_items, ring_items,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    MIXED: tl.constexpr, SYMMETRIC: tl.constexpr, SEARCH: tl.constexpr,
    KEY_WINDOW: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_WINDOW: tl.constexpr, VALUE_STEP: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_OUTLIERS: tl.constexpr, SEATED: tl.constexpr,
    MEAN_OF_REST: tl.constexpr, MARK: tl.constexpr,
    WRITE_BACK: tl.constexpr, ONE_TOKEN: tl.constexpr, ENCODED: tl.constexpr,
    KEY_PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    CHUNK: tl.constexpr, ROTATED: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    RING_ROWS: tl.constexpr,
):  # fmt: skip
    # Inductor passes an integer without a known bound as int64.
    q_len, pages, pairs = tl.cast(q_len, tl.int32), tl.cast(pages, tl.int32), tl.cast(pairs, tl.int32)
    key_items, value_items = tl.cast(key_items, tl.int32), tl.cast(value_items, tl.int32)
    ring_items = tl.cast(ring_items, tl.int32)
    most_pages = tl.cast(most_pages, tl.int32)
    # For each (sequence, kv head): key_items x KEY_PARTS chunks of channels of a page, value_items x VALUE_PARTS strips
    # of 16 tokens, ring_items.
    past = tl.load(lengths_ptr + site * 3).to(tl.int32)
    key_packed = tl.load(lengths_ptr + site * 3 + 1).to(tl.int32)
    value_packed = tl.load(lengths_ptr + site * 3 + 2).to(tl.int32)
    key_end = packed_end(past + q_len, key_packed, KEY_WINDOW, KEY_STEP)
    value_end = packed_end(past + q_len, value_packed, VALUE_WINDOW, VALUE_STEP)
    # In most decode steps nothing is due, for all sequences alike.
    idle = (key_end <= key_packed) & (value_end <= value_packed)
    first_item = idle.to(tl.int32) * (key_items + value_items)
    items = key_items + value_items + ring_items - first_item
    if ONE_TOKEN:
        for block in tl.range(tl.program_id(0), tl.cdiv(pairs, RING_ROWS), tl.num_programs(0)):
            _write_ring_row(
                tl.cast(block, tl.int32), pairs, past, key_ptr, value_ptr, valid_ptr, key_residual_ptr,
                key_row_scale_ptr, value_residual_ptr, value_row_scale_ptr, residual_valid_ptr,
                stride_key_batch, stride_key_head, stride_value_batch, stride_value_head,
                NUM_KV_HEADS, HEAD_DIM, CAPACITY, HAS_VALID, ROTATED, BLOCK_D, RING_ROWS,
            )  # fmt: skip
    for work in tl.range(tl.program_id(0), pairs * items, tl.num_programs(0)):
        pair = (work // items).to(tl.int64)
        item = first_item + work % items
        batch = pair // NUM_KV_HEADS
        head = pair % NUM_KV_HEADS
        new_key_ptr = key_ptr + batch * stride_key_batch + head * stride_key_head
        new_value_ptr = value_ptr + batch * stride_value_batch + head * stride_value_head
        new_valid_ptr = valid_ptr + batch * q_len
        ring_valid_ptr = residual_valid_ptr + batch * CAPACITY
        ring_key_ptr = key_residual_ptr + pair * CAPACITY * HEAD_DIM
        ring_value_ptr = value_residual_ptr + pair * CAPACITY * HEAD_DIM
        key_scales_ptr = key_row_scale_ptr + pair * CAPACITY
        value_scales_ptr = value_row_scale_ptr + pair * CAPACITY
        flags_ptr = replaced_ptr + pair * flags_per_head
        pair_hard_ptr = hard_ptr + pair * most_pages
        if item < key_items:
            page = key_packed // PAGE + item * KEY_PARTS // (HEAD_DIM // CHUNK)
            if (key_end > key_packed) & _is_left(pair_hard_ptr, page, past, key_end, ENCODED):
                for index in tl.range(item * KEY_PARTS, item * KEY_PARTS + KEY_PARTS):
                    channel_start = tl.cast(index, tl.int32) % (HEAD_DIM // CHUNK) * CHUNK
                    pack_key_page(
                        pair, page, channel_start, new_key_ptr, stride_key_token, ring_key_ptr, key_scales_ptr,
                        new_valid_ptr, ring_valid_ptr, flags_ptr, key_order_ptr, key_codes_ptr, key_scale_ptr,
                        key_zero_point_ptr, past, key_packed, key_end, pages,
                        KEY_BITS, MIXED, SEARCH, GROUP, HEAD_DIM, CAPACITY, HAS_VALID, HAS_OUTLIERS, SEATED,
                        MEAN_OF_REST, CHUNK,
                    )  # fmt: skip
        elif item < key_items + value_items:
            first_strip = value_packed // 16 // VALUE_PARTS * VALUE_PARTS + (item - key_items) * VALUE_PARTS
            page = first_strip // (PAGE // 16)
            if (value_end > value_packed) & _is_left(pair_hard_ptr, page, past, value_end, ENCODED):
                for index in tl.range(first_strip, first_strip + VALUE_PARTS):
                    strip = tl.cast(index, tl.int32)
                    if (strip * 16 < value_end) & (strip * 16 + 16 > value_packed):
                        pack_value_strip(
                            pair, page, strip % (PAGE // 16), new_value_ptr, stride_value_token, ring_value_ptr,
                            value_scales_ptr, new_valid_ptr, ring_valid_ptr, flags_ptr, value_codes_ptr,
                            value_scale_ptr, value_zero_point_ptr, past, value_packed, value_end, pages,
                            VALUE_BITS, SYMMETRIC, SEARCH, GROUP, VALUE_GROUPS,
                            HEAD_DIM, CAPACITY, HAS_VALID, HAS_OUTLIERS, SEATED, MEAN_OF_REST, MARK, BLOCK_HALF,
                        )  # fmt: skip
        else:
            _write_ring_rows(
                batch, head, pair, item - key_items - value_items, new_key_ptr, new_value_ptr, new_valid_ptr,
                stride_key_token, stride_value_token, ring_key_ptr, key_scales_ptr, ring_value_ptr, value_scales_ptr,
                ring_valid_ptr,
                key_codes_ptr, key_scale_ptr, key_zero_point_ptr, past, q_len, pages,
                tl.maximum(key_packed, value_end), key_end,
                KEY_BITS, GROUP, HEAD_DIM, CAPACITY, HAS_VALID, WRITE_BACK, BLOCK_D, RING_ROWS,
            )  # fmt: skip
