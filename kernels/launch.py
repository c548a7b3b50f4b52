"""How a launcher starts a kernel: traced by `torch.library.triton_op`, or at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

WIDEST_CHUNK = 32

_threads = threading.local()


@contextmanager
def launching_at_once() -> Iterator[None]:
    """Start kernels inside the block without asking for a tracer: nobody traces, and to ask takes longer than to start.

    An op that is called does the same by itself, but only after torch has gone through its schema, argument by
    argument.
    """
    _threads.at_once = True
    try:
        yield
    finally:
        _threads.at_once = False


def launch(
    kernel: Any,
    grid: tuple[Any, ...],
    arguments: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> None:
    """Start `kernel` on `grid` (ints or SymInts) with all its arguments by name.

    `max_registers` limits those of a thread where the kernel starts at once; a trace cannot carry it.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if isinstance(kernel, triton.JITFunction):
        traceable = kernel if getattr(_threads, "at_once", False) else torch.library.wrap_triton(kernel)
        if traceable is kernel and max_registers is not None:
            options["maxnreg"] = max_registers
        kernel = traceable
    kernel[grid](**arguments, **options)


def at_most(size: Any, bound: int) -> bool:
    """Whether `size <= bound` holds for every value it may take; adds no guard on a symbolic size."""
    return bool(statically_known_true(size <= bound))


def dense_rows(x: Tensor) -> Tensor:
    """Return `x`, or a copy of it if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_strides(**tensors: Tensor) -> dict[str, Any]:
    """Return the arguments `stride_NAME_batch`, `_head` and `_token` of tensors [batch, heads, tokens, channels]."""
    axes = ("batch", "head", "token")
    return {f"stride_{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


def mask_strides(mask: Tensor | None) -> dict[str, Any]:
    """Return the arguments `stride_mask_*` of a 4-D mask; where it has a size of 1 every row is that one."""
    axes = ("batch", "head", "query", "token")
    if mask is None:
        return {f"stride_mask_{axis}": 0 for axis in axes}
    # The last axis is never broadcast.
    return {f"stride_mask_{axis}": 0 if i < 3 and mask.shape[i] == 1 else mask.stride(i) for i, axis in enumerate(axes)}


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def channel_chunk(head_dim: int) -> int:
    """Return the largest power of two, at most 32, that divides `head_dim`: channels that one program packs."""
    return min(head_dim & -head_dim, WIDEST_CHUNK)
