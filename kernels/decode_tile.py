"""Device functions that load a tile of packed tokens in the layout of `ottfx/kernels/fragments.py`.

A lane `4 * n + c` of the one warp holds, of a tile of keys, TILE / 8 tokens of the channels of its c: token
`g * (TILE / NG) + n * RUN + r` for group g of NG and r of RUN = TILE / 8 / NG. Scores have these tokens as rows, in the
order `(g, r, n)`. Of a tile of values it holds the channels `32 * k + 4 * n + (0..3)` of the TILE / 4 tokens of its c.
All loads are over flat indices, which every version of Triton lays out alike: 16 bytes a lane.
"""

import triton
import triton.language as tl

from ottfx.kernels.fragments import halves
from ottfx.kernels.packing import PAGE, STEEP_MARK


@triton.jit
def _load_key_words(
    page_ptr, row, BITS: tl.constexpr, NG: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PLANE: tl.constexpr,
):  # fmt: skip
    # [4, 8, TILE / 8, W]: lane (n, c) gets TILE / 8 tokens, NG runs of them, of the channels of its c.
    PER_WORD: tl.constexpr = 16 if PLANE or BITS < 4 else 32 // BITS
    W: tl.constexpr = BLOCK_D // 4 // PER_WORD
    RUN: tl.constexpr = TILE // 8 // NG
    STRIDE: tl.constexpr = 64 if PLANE else PAGE
    # [W, NG, RUN / 4, n 8, c 4, 4 tokens], flat: the load is 16 bytes a lane in every version of Triton.
    i = tl.arange(0, TILE * BLOCK_D // PER_WORD)
    strip = i // 4 % 4 * W + i // (TILE * 4)
    offset = (
        strip * STRIDE + i // (32 * RUN) % NG * (TILE // NG) + i // 16 % 8 * RUN + i // 128 % (RUN // 4) * 4 + i % 4
    )
    if HEAD_DIM == BLOCK_D:
        words = tl.load(page_ptr + row + offset)
    else:
        words = tl.load(page_ptr + row + offset, mask=strip < HEAD_DIM // PER_WORD, other=0)
    words = tl.permute(tl.reshape(words, [W, NG, RUN // 4, 8, 4, 4]), [4, 3, 1, 2, 5, 0])
    return tl.reshape(words, [4, 8, TILE // 8, W])


@triton.jit
def _load_value_words(
    page_ptr, row, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PLANE: tl.constexpr,
):  # fmt: skip
    # [4, 8, BLOCK_D / 8, W]: lane (n, c) gets the channels 32 * k + 4 * n + (0..3) of TILE / 4 tokens.
    PER_WORD: tl.constexpr = 16 if PLANE or BITS < 4 else 32 // BITS
    W: tl.constexpr = TILE // 4 // PER_WORD
    # [W, BLOCK_D / 32, n 8, c 4, 4 channels]
    i = tl.arange(0, TILE * BLOCK_D // PER_WORD)
    block = i // 128 % (BLOCK_D // 32)
    channel = block * 32 + i // 16 % 8 * 4 + i % 4
    strip = i // 4 % 4 * W + i // (BLOCK_D * 4)
    if PLANE:
        # A word of the plane has channels r and r + HEAD_DIM / 2.
        HALF: tl.constexpr = HEAD_DIM // 2
        if HALF % 32 == 0:
            upper = block // (HALF // 32)
            offset = strip * HALF + block % (HALF // 32) * 32 + i // 16 % 8 * 4 + i % 4
        else:
            upper = channel // HALF
            offset = strip * HALF + channel % HALF
        page_ptr += row // PER_WORD * HALF
    else:
        offset = strip * HEAD_DIM + channel
        page_ptr += row // PER_WORD * HEAD_DIM
    if HEAD_DIM == BLOCK_D:
        words = tl.load(page_ptr + offset)
    else:
        words = tl.load(page_ptr + offset, mask=channel < HEAD_DIM, other=0)
    if PLANE:
        words = words >> (upper * 8)
    words = tl.permute(tl.reshape(words, [W, BLOCK_D // 32, 8, 4, 4]), [3, 2, 1, 4, 0])
    return tl.reshape(words, [4, 8, BLOCK_D // 8, W])


@triton.jit
def _as_words(pointer):
    # Float16 are loaded two at a time. Triton gives loads of equal sizes one layout: so all have 4 elements a lane.
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _load_key_constants(pointer, group, NG: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # [c 4, n 8, BLOCK_D / 32, 8], or with NG as third axis: the channels of c, the same for all n.
    OCTETS: tl.constexpr = BLOCK_D // 32
    i = tl.arange(0, NG * BLOCK_D * 4)
    pair = i // 4 % 4 * (BLOCK_D // 8) + i // 128 % OCTETS * 4 + i % 4
    offset = group * (HEAD_DIM // 2) + i // (BLOCK_D * 4) * (HEAD_DIM // 2) + pair
    if HEAD_DIM == BLOCK_D:
        constants = tl.load(_as_words(pointer) + offset)
    else:
        constants = tl.load(_as_words(pointer) + offset, mask=pair < HEAD_DIM // 2, other=0)
    if NG == 1:
        constants = tl.permute(tl.reshape(constants, [OCTETS, 8, 4, 4]), [2, 1, 0, 3])
        return tl.reshape(halves(constants), [4, 8, OCTETS, 8])
    else:
        constants = tl.permute(tl.reshape(constants, [NG, OCTETS, 8, 4, 4]), [3, 2, 0, 1, 4])
        return tl.reshape(halves(constants), [4, 8, NG, OCTETS, 8])


@triton.jit
def _query_places(MIXED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    # Places of a tile of queries, in the shape in which they are loaded: another one than loops load, because Triton
    # gives loads of equal sizes one layout.
    HALF: tl.constexpr = COLUMNS * BLOCK_D // 2
    if MIXED:
        # Gathered numbers are dealt to the lanes one by one: asked for in this order, a lane has its runs of 8 as well.
        j = tl.arange(0, 2 * HALF)
        return j // 256 * 256 + j % 32 * 8 + j // 32 % 8
    else:
        return tl.arange(0, 2)[:, None] * HALF + tl.arange(0, HALF)[None, :]


@triton.jit
def query_channels(
    key_order_ptr, MIXED: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The channel of each query that `load_query_lanes` loads; those of a lane are neighbours among those stored."""
    i = _query_places(MIXED, COLUMNS, BLOCK_D)
    channel = i // 8 % 4 * (BLOCK_D // 4) + i // (32 * COLUMNS) * 8 + i % 8
    if MIXED:
        ordered = tl.load(key_order_ptr + channel, mask=channel < HEAD_DIM, other=-1).to(tl.int32)
        # Nothing is packed so far where no order is decided.
        channel = tl.where(ordered < 0, channel, ordered % STEEP_MARK)
    return channel


@triton.jit
def load_query_lanes(
    query_ptr, channel, head, rows, stride_query_head, stride_query_token,
    QUERIES_PER_KV: tl.constexpr, MIXED: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries float32 in the lanes that need them, [c 4, COLUMNS, BLOCK_D / 32, 8], and exponents int32 [COLUMNS].

    `channel` is that of `query_channels`. 2 to the power of its exponent is more than all of a column.
    """
    i = _query_places(MIXED, COLUMNS, BLOCK_D)
    own_column = tl.program_id(2) * COLUMNS + i // 32 % COLUMNS
    if SINGLE:
        own_column = own_column * 0
    own_head = head * QUERIES_PER_KV + own_column % QUERIES_PER_KV
    own_offset = own_head * stride_query_head + own_column // QUERIES_PER_KV * stride_query_token
    in_query = (own_column < rows) & (channel < HEAD_DIM)
    query = tl.load(query_ptr + own_offset + channel, mask=in_query, other=0.0)
    # Whatever was loaded before is under way while queries are brought into their form.
    tl.debug_barrier()
    query = query.to(tl.float32)
    if MIXED:
        query = tl.permute(tl.reshape(query, [COLUMNS * BLOCK_D // 256, 8, 32]), [0, 2, 1])
    query = tl.permute(tl.reshape(query, [BLOCK_D // 32, COLUMNS, 4, 8]), [2, 1, 0, 3])
    # A power of two for each column brings its queries below 1: exact, and times any scale they fit float16.
    peak = tl.max(tl.max(tl.max(tl.abs(query), axis=3), axis=2), axis=0)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 126
    return query, tl.minimum(tl.maximum(exponent, -80), 80)


@triton.jit
def lane_token(NG: tl.constexpr, TILE: tl.constexpr):
    """Token of each entry of [NG, n 8, c 4, TILE / 8 / NG tokens], flat: those of the scores of lane (n, c)."""
    RUN: tl.constexpr = TILE // 8 // NG
    i = tl.arange(0, TILE * 4)
    return i // (32 * RUN) * (TILE // NG) + i // (4 * RUN) % 8 * RUN + i % RUN


@triton.jit
def by_row(x, NG: tl.constexpr, TILE: tl.constexpr):
    """Entries of `lane_token` -> [TILE, c 4], rows in the order of the scores."""
    return tl.reshape(tl.permute(tl.reshape(x, [NG, 8, 4, TILE // 8 // NG]), [0, 3, 1, 2]), [TILE, 4])


@triton.jit
def row_token(NG: tl.constexpr, TILE: tl.constexpr):
    """Token of each row of the scores."""
    RUN: tl.constexpr = TILE // 8 // NG
    r = tl.arange(0, TILE)
    return r // (8 * RUN) * (TILE // NG) + r % 8 * RUN + r // 8 % RUN


@triton.jit
def spread(x, SINGLE: tl.constexpr, COLUMNS: tl.constexpr):
    """[T, c 4] -> the shape of the scores: [T / 16, 16, COLUMNS], or [T / 16, 16, 4] if all columns are one."""
    T: tl.constexpr = x.shape[0]
    if SINGLE:
        return tl.reshape(x, [T // 16, 16, 4])
    else:
        wide = tl.broadcast_to(x[:, None, :, None], [T, COLUMNS // 8, 4, 2])
        return tl.reshape(wide, [T // 16, 16, COLUMNS])


@triton.jit
def _load_per_token(pointer, first, NG: tl.constexpr, TILE: tl.constexpr):
    # Float16 of the tokens from `first` on, [TILE, c 4] in the order of the scores.
    RUN: tl.constexpr = TILE // 16 // NG
    i = tl.arange(0, TILE * 2)
    pair = i // (32 * RUN) * (TILE // NG // 2) + i // (4 * RUN) % 8 * RUN + i % RUN
    words = tl.reshape(tl.load(_as_words(pointer) + first // 2 + pair), [NG, 8, 4, RUN])
    return by_row(tl.reshape(halves(words), [TILE * 4]), NG, TILE)


@triton.jit
def load_keys(
    tile, codes_ptr, scale_ptr, zero_point_ptr,
    BITS: tl.constexpr, GROUP: tl.constexpr, NG: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Words, words of the 1-bit plane (or 0), scales and zero points of the keys of a tile."""
    page = tile // (PAGE // TILE)
    row = tile % (PAGE // TILE) * TILE
    page_ptr = codes_ptr + page * (4 * HEAD_DIM * BITS)
    words = _load_key_words(page_ptr, row, BITS, NG, HEAD_DIM, BLOCK_D, TILE, False)
    plane = 0
    if BITS == 3:
        # A word of the plane has tokens r and r + 64: of the same place in both tiles of the page.
        tl.static_assert(TILE == 64)
        plane = _load_key_words(page_ptr + 8 * HEAD_DIM, 0, BITS, NG, HEAD_DIM, BLOCK_D, TILE, True)
        plane = plane >> (row // 64 * 8)
    group = page * (PAGE // GROUP) + row // GROUP
    scale = _load_key_constants(scale_ptr, group, NG, HEAD_DIM, BLOCK_D)
    zero_point = _load_key_constants(zero_point_ptr, group, NG, HEAD_DIM, BLOCK_D)
    return words, plane, scale, zero_point


@triton.jit
def load_values(
    tile, codes_ptr, scale_ptr, zero_point_ptr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, NG: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Words, words of the 1-bit plane (or 0), scales and zero points (or 0) of the values of a tile."""
    page = tile // (PAGE // TILE)
    row = tile % (PAGE // TILE) * TILE
    page_ptr = codes_ptr + page * (4 * HEAD_DIM * BITS)
    words = _load_value_words(page_ptr, row, BITS, HEAD_DIM, BLOCK_D, TILE, False)
    plane = 0
    if BITS == 3:
        plane = _load_value_words(page_ptr + 8 * HEAD_DIM, row, BITS, HEAD_DIM, BLOCK_D, TILE, True)
    scale = _load_per_token(scale_ptr, page * PAGE + row, NG, TILE)
    zero_point = 0
    if not SYMMETRIC:
        zero_point = _load_per_token(zero_point_ptr, page * PAGE + row, NG, TILE)
    return words, plane, scale, zero_point
