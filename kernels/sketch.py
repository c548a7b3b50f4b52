"""Device functions and launcher of the sketch of keys (`ottfx/sketch_codes.py` defines it)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ottfx.kernels.launch import launch
from ottfx.kernels.packing import FINITE_MAX, PAGE, make_finite
from ottfx.kernels.rotate import BLOCK, rotate_rows
from ottfx.kernels.window import load_real, load_tokens

HALF_PI_ROOT = tl.constexpr(math.sqrt(math.pi / 2))
_SEED_STEP = tl.constexpr(0x9E3779B9)
_OFFSETS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _sketch_kernel(output_ptr, BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr):
    # ROWS rows of every block: those of the identity, rotated three times.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    identity = tl.where(row[:, None] == channel[None, :], 1.0, 0.0)
    for block in tl.static_range(BLOCKS):
        x = rotate_rows(identity, HEAD_DIM, (OFFSET + 3 * block * _SEED_STEP) & _OFFSETS, ROWS, HEAD_DIM)
        x = rotate_rows(x, HEAD_DIM, (OFFSET + (3 * block + 1) * _SEED_STEP) & _OFFSETS, ROWS, HEAD_DIM)
        x = rotate_rows(x, HEAD_DIM, (OFFSET + (3 * block + 2) * _SEED_STEP) & _OFFSETS, ROWS, HEAD_DIM)
        x *= tl.sqrt(tl.full([1, 1], HEAD_DIM, tl.float32))
        target = output_ptr + (block * HEAD_DIM + row)[:, None] * HEAD_DIM + channel[None, :]
        tl.store(target, x.to(output_ptr.dtype.element_ty))


def sketch(head_dim: int, key_bits: int, dtype: torch.dtype, device: torch.device, seed_offset: int) -> Tensor:
    """Return the sketch [head_dim * key_bits, head_dim]; `seed_offset` is that of its first rotation."""
    output = torch.empty((head_dim * key_bits, head_dim), dtype=dtype, device=device)
    rows = min(max(BLOCK // head_dim, 1), head_dim)
    arguments = {
        "output_ptr": output,
        "BLOCKS": key_bits,
        "HEAD_DIM": head_dim,
        "OFFSET": seed_offset,
        "ROWS": rows,
    }
    launch(_sketch_kernel, (head_dim // rows,), arguments, num_warps=1, num_stages=1)
    return output


@triton.jit
def _load_keys(
    key_ptr, stride_key_token, ring_ptr, valid_ptr, ring_valid_ptr, token, past, channel,
    HEAD_DIM: tl.constexpr, CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    # Float32 [16, HEAD_DIM], 0 for padding.
    real = load_real(valid_ptr, ring_valid_ptr, token, past, token >= 0, CAPACITY, HAS_VALID)
    x = load_tokens(
        key_ptr, stride_key_token, ring_ptr, ring_ptr, token, past, real, channel, channel < HEAD_DIM,
        CAPACITY, HEAD_DIM,
    )  # fmt: skip
    return make_finite(x)


@triton.jit
def _store_signs(x, sketch_ptr, words_ptr, channel, M: tl.constexpr, HEAD_DIM: tl.constexpr):
    # The signs of the products of x [16, HEAD_DIM] with the first M rows; `words_ptr` [16] is that of the tokens.
    lane = tl.arange(0, 32)
    for start in tl.range(0, M, 32):
        row = start + lane
        # [HEAD_DIM, 32]
        rows = tl.load(sketch_ptr + row[None, :] * HEAD_DIM + channel[:, None], mask=(row < M)[None, :], other=0.0)
        # Three products of the tensor cores are nearly as exact as float32, and take few registers.
        sign = (tl.dot(x, rows, input_precision="tf32x3") < 0.0).to(tl.int32)
        tl.store(words_ptr + start // 32, tl.sum(sign << lane[None, :], axis=1))


@triton.jit
def store_sketch(
    pair, start, key_ptr, stride_key_token, ring_ptr, valid_ptr, ring_valid_ptr, past, pages,
    sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr,
    KEY_BITS: tl.constexpr, OUTLIERS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAPACITY: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Sketch and store the keys of one group, which begins at token `start`; `pair` is (sequence, kv head)."""
    M: tl.constexpr = HEAD_DIM * KEY_BITS
    channel = tl.arange(0, HEAD_DIM)
    step = tl.arange(0, 16)
    energy = tl.zeros([HEAD_DIM], tl.float32)
    for offset in tl.range(0, GROUP, 16):
        x = _load_keys(
            key_ptr, stride_key_token, ring_ptr, valid_ptr, ring_valid_ptr, start + offset + step, past, channel,
            HEAD_DIM, CAPACITY, HAS_VALID,
        )  # fmt: skip
        energy += tl.sum(x * x, axis=0)
    first = pair * pages * PAGE + start
    is_outlier = channel < 0
    for index in tl.static_range(OUTLIERS):
        largest = tl.max(energy, axis=0)
        # Of equals the first.
        outlier = tl.min(tl.where(energy == largest, channel, HEAD_DIM), axis=0)
        tl.store(outliers_ptr + first // GROUP * OUTLIERS + index, outlier.to(tl.uint8))
        is_outlier = is_outlier | (channel == outlier)
        energy = tl.where(channel == outlier, -1.0, energy)
    for offset in tl.range(0, GROUP, 16):
        x = _load_keys(
            key_ptr, stride_key_token, ring_ptr, valid_ptr, ring_valid_ptr, start + offset + step, past, channel,
            HEAD_DIM, CAPACITY, HAS_VALID,
        )  # fmt: skip
        outer = tl.where(is_outlier[None, :], x, 0.0)
        token = first + offset + step
        norm = tl.minimum(tl.sqrt_rn(tl.sum(x * x, axis=1)), FINITE_MAX)
        tl.store(norms_ptr + token * 2, norm.to(tl.float16))
        norm = tl.minimum(tl.sqrt_rn(tl.sum(outer * outer, axis=1)), FINITE_MAX)
        tl.store(norms_ptr + token * 2 + 1, norm.to(tl.float16))
        inner = tl.where(is_outlier[None, :], 0.0, x)
        _store_signs(inner, sketch_ptr, signs_ptr + token * ((M + 31) // 32), channel, M, HEAD_DIM)
        _store_signs(outer, sketch_ptr, outlier_signs_ptr + token * ((M // 2 + 31) // 32), channel, M // 2, HEAD_DIM)


@triton.jit
def _sum_of_rows(
    sketch_ptr, words_ptr, live, channel, M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Float32 [BLOCK_N, HEAD_DIM]: the first M rows, each with the sign that a token has for it.
    lane = tl.arange(0, 32)
    total = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in tl.range(0, M, 32):
        row = start + lane
        words = tl.load(words_ptr + start // 32, mask=live, other=0)
        sign = 1.0 - 2.0 * ((words[:, None] >> lane[None, :]) & 1).to(tl.float32)
        # [32, HEAD_DIM]
        rows = tl.load(sketch_ptr + row[:, None] * HEAD_DIM + channel[None, :], mask=(row < M)[:, None], other=0.0)
        total = tl.dot(sign.to(rows.dtype), rows, total, input_precision=PRECISION)
    return total


@triton.jit
def load_sketched(
    slot, page_row, live, sketch_ptr, signs_ptr, outlier_signs_ptr, norms_ptr, outliers_ptr,
    KEY_BITS: tl.constexpr, OUTLIERS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a query sees as keys, float32 [BLOCK_N, HEAD_DIM], of tokens of one group, from a row of page `slot` on."""
    M: tl.constexpr = HEAD_DIM * KEY_BITS
    channel = tl.arange(0, HEAD_DIM)
    token = slot * PAGE + page_row + tl.arange(0, BLOCK_N)
    whole = tl.load(norms_ptr + token * 2, mask=live, other=0.0).to(tl.float32)
    outer = tl.load(norms_ptr + token * 2 + 1, mask=live, other=0.0).to(tl.float32)
    inner = tl.sqrt(tl.maximum(whole * whole - outer * outer, 0.0))
    is_outlier = channel < 0
    for index in tl.static_range(OUTLIERS):
        place = (slot * (PAGE // GROUP) + page_row // GROUP) * OUTLIERS + index
        is_outlier = is_outlier | (channel == tl.load(outliers_ptr + place).to(tl.int32))
    key = _sum_of_rows(sketch_ptr, signs_ptr + token * ((M + 31) // 32), live, channel, M, HEAD_DIM, BLOCK_N, PRECISION)
    key *= (inner * (HALF_PI_ROOT / M))[:, None]
    of_outliers = _sum_of_rows(
        sketch_ptr, outlier_signs_ptr + token * ((M // 2 + 31) // 32), live, channel, M // 2, HEAD_DIM, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    return tl.where(is_outlier[None, :], of_outliers * (outer * (HALF_PI_ROOT / (M // 2)))[:, None], key)
