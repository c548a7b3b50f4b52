"""Device functions on planes of words (`ottfx/word_planes.py` defines them)."""

import triton
import triton.language as tl


@triton.jit
def load_plane(
    token_ptr, live, WORDS: tl.constexpr, WORD_BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Codes int32 [ROWS, COUNT] of planes of WORDS words, 0 behind them and for tokens that are not `live`.

    `token_ptr` [ROWS] points to the first word of a token's plane. COUNT is a power of two, and whole words.
    """
    PER_WORD: tl.constexpr = WORD_BITS // WIDTH
    word = tl.arange(0, COUNT // PER_WORD)
    # [ROWS, COUNT // PER_WORD]
    words = tl.load(token_ptr[:, None] + word[None, :], mask=live[:, None] & (word < WORDS)[None, :], other=0)
    shift = WIDTH * tl.arange(0, PER_WORD)
    codes = (words.to(tl.int32)[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, [ROWS, COUNT])


@triton.jit
def store_plane(
    token_ptr, codes, live, WORDS: tl.constexpr, WORD_BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_plane`; codes behind what the WORDS words hold must be 0."""
    PER_WORD: tl.constexpr = WORD_BITS // WIDTH
    shift = WIDTH * tl.arange(0, PER_WORD)
    neighbours = tl.reshape(codes, [ROWS, COUNT // PER_WORD, PER_WORD])
    words = tl.sum(neighbours << shift[None, None, :], axis=2).to(token_ptr.dtype.element_ty)
    word = tl.arange(0, COUNT // PER_WORD)
    tl.store(token_ptr[:, None] + word[None, :], words, mask=live[:, None] & (word < WORDS)[None, :])
