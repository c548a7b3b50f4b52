"""Launchers of attention over storage by tokens (docs/storage.md).

Queries and values of new tokens are rotated first, and the result is rotated back as its parts are combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ottfx.kernels.affine_combine import combine
from ottfx.kernels.launch import at_most, dense_rows, launch, mask_strides, row_strides
from ottfx.kernels.polar_codes import level_constants, padded_blocks
from ottfx.kernels.rotate import rotate
from ottfx.kernels.table_codes import padded_channels, table_constants
from ottfx.kernels.token_split import _attend_tokens_kernel

SPLITS = 32
"""Most programs that share the stored tokens of one (sequence, kv head)."""
PROGRAMS = 256
"""Programs of one sequence that fill a GPU."""


def attend_turbo(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    softmax_scale: float,
    key_codes: Tensor,
    key_norm: Tensor,
    value_codes: Tensor,
    value_norm: Tensor,
    key_bits: int,
    value_bits: int,
    key_table: Sequence[float],
    value_table: Sequence[float],
    seed_offset: int,
) -> Tensor:
    """Attend as `ottfx::turbo_attend` does.

    Args:
        query: [batch, num_heads, q_len, head_dim], any strides.
        key: new tokens [batch, num_kv_heads, q_len, head_dim], any strides; `value` alike.
        value: see `key`.
        mask: as in `Scheme`, or None.
        lengths: int64 [1, 3]: those of this site.
        softmax_scale: factor on query @ key^T.
        key_codes: state, as the three that follow; shapes in docs/storage.md.
        key_norm: state.
        value_codes: state.
        value_norm: state.
        key_bits: width of a key code; `value_bits` of a value code.
        value_bits: see `key_bits`.
        key_table: ascending magnitudes of keys; `value_table` of values.
        value_table: see `key_table`.
        seed_offset: that of the rotation's seed.

    Returns:
        Shape and dtype of `query`, contiguous. A query that may attend to nothing gives 0.
    """
    arguments = {
        "key_codes_ptr": key_codes,
        "key_upper_ptr": key_codes,
        "key_scale_ptr": key_norm,
        "value_codes_ptr": value_codes,
        "value_upper_ptr": value_codes,
        "value_scale_ptr": value_norm,
        "POLAR": False,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "UPPER_BYTES": 0,
        "BLOCK_D": padded_channels(key.shape[-1]),
        **table_constants(0, 8, key_table),
        **table_constants(8, 8, value_table),
    }
    return _attend(query, key, value, mask, lengths, softmax_scale, arguments, seed_offset)


def attend_polar(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    softmax_scale: float,
    key_codes: Tensor,
    key_upper: Tensor,
    key_radius: Tensor,
    value_codes: Tensor,
    value_upper: Tensor,
    value_radius: Tensor,
    first_bits: int,
    cosines: Sequence[Sequence[float]],
    seed_offset: int,
) -> Tensor:
    """Attend as `ottfx::polar_attend` does.

    Args:
        query: as for `attend_turbo`, as are the five that follow.
        key: see `query`.
        value: see `query`.
        mask: see `query`.
        lengths: see `query`.
        softmax_scale: see `query`.
        key_codes: state, as the five that follow; shapes in docs/storage.md.
        key_upper: state.
        key_radius: state.
        value_codes: state.
        value_upper: state.
        value_radius: state.
        first_bits: bits of an angle of level 1.
        cosines: at each of the four levels, those of the angles of the first quadrant.
        seed_offset: that of the rotation's seed.

    Returns:
        As `attend_turbo`.
    """
    arguments = {
        "key_codes_ptr": key_codes,
        "key_upper_ptr": key_upper,
        "key_scale_ptr": key_radius,
        "value_codes_ptr": value_codes,
        "value_upper_ptr": value_upper,
        "value_scale_ptr": value_radius,
        "POLAR": True,
        "KEY_BITS": first_bits,
        "VALUE_BITS": first_bits,
        "UPPER_BYTES": key_upper.shape[4],
        "BLOCK_D": padded_blocks(key.shape[-1]),
        **level_constants(cosines),
    }
    return _attend(query, key, value, mask, lengths, softmax_scale, arguments, seed_offset)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, softmax_scale: float,
    storage: Mapping[str, Any], seed_offset: int,
) -> Tensor:  # fmt: skip
    # `storage` are the arguments of the kernel that are of the scheme.
    query, key = dense_rows(query), dense_rows(key)
    batch_size, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    queries_per_kv = num_heads // num_kv_heads
    rows = q_len * queries_per_kv
    bits = max(storage["KEY_BITS"], storage["VALUE_BITS"])
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, bits, query.dtype == torch.float32)
    row_blocks = -(-rows // block_m)
    most_splits = min(max(PROGRAMS // num_kv_heads, 4), SPLITS)
    # A long chunk has programs enough in its row blocks.
    splits = torch.sym_max(1, most_splits // row_blocks)
    all_rows = batch_size * num_kv_heads * rows
    partial = torch.empty((all_rows, splits + 1, head_dim), dtype=torch.float32, device=query.device)
    log_sum = torch.empty((all_rows, splits + 1), dtype=torch.float32, device=query.device)
    additive = mask is not None and mask.is_floating_point()
    arguments = {
        **storage,
        "query_ptr": query,
        "rotated_ptr": rotate(query, False, query.dtype, seed_offset),
        "key_ptr": key,
        "value_ptr": rotate(value, False, query.dtype, seed_offset),
        "mask_ptr": lengths if mask is None else mask,
        "lengths_ptr": lengths,
        "partial_ptr": partial,
        "log_sum_ptr": log_sum,
        **row_strides(query=query, key=key),
        **mask_strides(mask),
        "q_len": q_len,
        "pages": storage["key_codes_ptr"].shape[2],
        "splits": splits,
        "softmax_scale": softmax_scale,
        "NUM_KV_HEADS": num_kv_heads,
        "QUERIES_PER_KV": queries_per_kv,
        "HEAD_DIM": head_dim,
        "KEY_WORDS": storage["key_codes_ptr"].shape[4],
        "VALUE_WORDS": storage["value_codes_ptr"].shape[4],
        "MASK": 0 if mask is None else 2 if additive else 1,
        "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if mask is not None and additive else 0.0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = (batch_size * num_kv_heads, splits + 1, row_blocks)
    launch(_attend_tokens_kernel, grid, arguments, num_warps, num_stages=1)
    output = torch.empty((batch_size, num_heads, q_len, head_dim), dtype=query.dtype, device=query.device)
    combine(
        partial, log_sum, output, parts=splits + 1, most_parts=most_splits + 1, queries_per_kv=queries_per_kv,
        rotation=seed_offset,
    )  # fmt: skip
    return output


def tile_sizes(rows: Any, head_dim: int, bits: int, exact: bool) -> tuple[int, int, int]:
    """Return query rows and tokens of a tile, and warps: what compiles for Hopper without spills.

    Args:
        rows: query rows of one kv head: q_len times query heads; may be symbolic.
        head_dim: channels.
        bits: the widest code. Choosing from a larger table takes more registers.
        exact: whether products are in float32, which runs outside the tensor cores.
    """
    if exact:
        return 16, 32, 8
    if at_most(rows, 16):
        return 16, 32 if head_dim > 128 or bits > 3 else 64, 8 if head_dim > 128 or bits > 3 else 4
    return (16, 32, 8) if head_dim > 128 else (64, 32, 8)
