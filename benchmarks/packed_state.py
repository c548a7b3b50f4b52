"""Packed storage with random content: a cache of any length without the prompt that would fill it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf, pages_to_allocate
from ottfx.registry import get_scheme
from ottfx.schemes.base import PAGE, ROLES, CacheShape, SchemeConfig

Halves = tuple[CacheHalf, CacheHalf]


def empty_halves(
    config: SchemeConfig,
    *,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    room: int,
    dtype: torch.dtype,
    device: str,
) -> Halves:
    """Make keys and values of one layer that hold nothing, with room for `room` tokens; else as `random_halves`."""
    scheme = get_scheme(config.scheme)
    shape = CacheShape(
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        pages=pages_to_allocate(scheme.pages_needed(config, room), 0),
        dtype=dtype,
        device=torch.device(device),
    )
    key, value = (CacheHalf.allocate(scheme, config, role, shape) for role in ROLES)
    return key, value


def random_halves(
    config: SchemeConfig,
    *,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    dtype: torch.dtype,
    device: str,
    room: int = 1,
) -> Halves:
    """Make keys and values of one layer as if `length` tokens had been stored.

    Codes are random words, scales small and positive, zero points negative, so that dequantized keys and values are
    around 0. All seats of an outlier pool are taken, by the first tokens, whose slots are marked; half of the spill
    pool is in use, so outliers are still traced. Seats of groups are those of the first tokens of each.

    Args:
        config: of one layer (`at_layer` resolved).
        batch_size: sequences.
        num_kv_heads: of the layer.
        head_dim: of the layer.
        length: tokens of each sequence; those of the schedule's window are in full precision.
        dtype: the logical dtype.
        device: where.
        room: tokens that may be appended.
    """
    key, value = empty_halves(
        config, batch_size=batch_size, num_kv_heads=num_kv_heads, head_dim=head_dim, room=length + room, dtype=dtype,
        device=device,
    )  # fmt: skip
    for half in (key, value):
        for name, tensor in half.tensors.items():
            _fill(name, tensor)
        half.advance(length)
    if "spill_count" in key.tensors:
        _take_seats(key, value)
    if "seat_row" in key.tensors:
        _take_group_seats(key, value)
    return key, value


def _fill(name: str, tensor: Tensor) -> None:
    if name.endswith("_codes"):
        tensor.random_(-(2**31), 2**31 - 1)
    elif tensor.dtype == torch.int8:
        tensor.random_(-127, 128)
    elif name.endswith("_residual_scale"):
        tensor.uniform_(0.005, 0.03)
    elif name.endswith("_scale"):
        tensor.uniform_(0.1, 0.6)
    elif name.endswith("_zero_point"):
        tensor.uniform_(-1.5, -0.5)
    elif name == "residual_valid":
        tensor.fill_(1)
    elif tensor.is_floating_point():
        tensor.normal_()


def _take_seats(key: CacheHalf, value: CacheHalf) -> None:
    positions = key.tensors["outlier_position"]
    seats, spill = key.scheme.pool_rows(key.config)  # type: ignore[attr-defined]
    taken = min(seats + spill // 2, key.packed)
    order = torch.arange(taken, dtype=torch.int32, device=positions.device)
    for half, name in ((key, "outlier_position"), (value, "value_outlier_position")):
        half.tensors[name][:, :, :taken] = order
    key.tensors["spill_count"].fill_(max(0, taken - seats))
    value.tensors["value_scale"][:, :, 0, 0, :taken].neg_()


def _take_group_seats(key: CacheHalf, value: CacheHalf) -> None:
    groups = key.tensors["key_scale"].shape[3]
    rows = key.tensors["seat_row"].unflatten(3, (groups, -1))
    first = PAGE // groups * torch.arange(groups, dtype=rows.dtype, device=rows.device).unsqueeze(-1)
    rows.copy_(first + torch.arange(rows.shape[4], dtype=rows.dtype, device=rows.device))
    value.tensors["value_seat_row"].copy_(key.tensors["seat_row"])
    slots = value.tensors["value_scale"][:, :, :, 0].unflatten(3, (groups, -1))
    slots[..., : rows.shape[4]].neg_()


def operands(halves: Halves) -> tuple[Any, ...]:
    """Return what both ops take at the end: the state of keys and values, and the scheme's constants."""
    state = [tensor for half in halves for tensor in half.tensors.values()]
    return (*state, *halves[0].scheme.constants(halves[0].config))


def lengths(halves: Halves) -> Tensor:
    """Return the ops' operand `lengths` for one site: int64 [1, 3]."""
    key, value = halves
    return torch.tensor([[key.high, key.packed, value.packed]], device=key.shape.device)


def append_tokens(halves: Halves, key: Tensor, value: Tensor) -> None:
    """Store new tokens, [batch, num_kv_heads, tokens, head_dim] each, as the scheme's op does, and count them."""
    halves[0].scheme.append_op(key, value, None, lengths(halves), 0, *operands(halves))
    for half in halves:
        half.advance(half.high + key.shape[2])


def bytes_read(halves: Halves) -> int:
    """Return the bytes of state that attention over these halves reads.

    Codes, scales and zero points of the packed tokens, the tokens of the window, the pool's rows or the seats.
    """
    key, value = halves
    packed = value.packed
    total = 0
    for half in halves:
        parts = half.bytes_by_part()
        of_pages = [name for name, spec in half.specs.items() if spec.paged_dim is not None and spec.part != "tables"]
        paged = sum(half.tensors[name].nbytes for name in of_pages)
        total += paged * packed // (half.shape.pages * PAGE)
        rows = max(half.tensors[f"{half.role}_residual"].shape[2], 1)
        total += parts["residual"] // rows * (half.high - packed)
        pool = half.tensors.get(f"outlier_{half.role}")
        total += 0 if pool is None else pool.nbytes
    return total
