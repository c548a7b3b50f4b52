"""Packing: a whole prompt, and the append of a decode step, beside a plain read and a plain copy of the same tokens.

`python -m benchmarks.append` on a GPU. Case names: KIND/BATCHxHEADSxTOKENS/SCHEME.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled_kernels import NewKernels
from benchmarks.packed_state import Halves, lengths, operands, random_halves
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.timing import device_microseconds, kernel_microseconds, read_microseconds
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import SchemeConfig

SCHEMES: dict[str, SchemeConfig] = {
    "ott-2bit-pool3+3": make_config("ott", 2, spill_capacity=3, exempt_layers=()),
    "ott-2bit-pool3+32": make_config("ott", 2, exempt_layers=()),
    "kivi-2bit": make_config("kivi", 2),
    "ott-2bit-g32-pool3+3": make_config("ott", 2, group_size=32, spill_capacity=3, exempt_layers=()),
    "ott+-2bit": make_config("ott+", 2),
    "ott-4bit-pool3+3": make_config("ott", 4, spill_capacity=3, exempt_layers=()),
}
QUICK_SCHEMES = ("ott-2bit-pool3+3", "ott+-2bit", "kivi-2bit")
# (batch, kv heads, tokens)
ENCODE = ((8, 8, 32768), (1, 8, 32768), (1, 32, 32768), (64, 8, 128), (1, 8, 128))
DECODE = ((64, 8, 4096), (64, 32, 4096), (1, 8, 4096))
HEAD_DIM = 128
TINY = (2, 2, 300)


def encode(config: SchemeConfig, size: tuple[int, int, int], head_dim: int, device: str) -> dict[str, Any]:
    """Time the append of a whole prompt to an empty cache, and a read and a copy of its keys and values."""
    batch_size, num_kv_heads, tokens = size
    halves = _halves(config, batch_size, num_kv_heads, 0, head_dim, device, room=tokens)
    new = _tokens(batch_size, num_kv_heads, tokens, head_dim, device)
    compiled = NewKernels()
    call, restore = _append(halves, new), _restore(halves)
    microseconds = device_microseconds(call, device, reset=restore)
    kernels = kernel_microseconds(call, device, reset=restore)
    target = torch.empty_like(new)
    read, copy = read_microseconds(new, device), device_microseconds(lambda: target.copy_(new), device)
    return {
        "us": microseconds,
        "GB_s": new.nbytes / microseconds / 1e3,
        "read_us": read,
        "copy_us": copy,
        "times_read": microseconds / read,
        "times_copy": microseconds / copy,
        "kernels": "; ".join(f"{name} {time:.0f}" for name, time in kernels.items()),
        "compiled": compiled.summary(),
    }


def decode(config: SchemeConfig, size: tuple[int, int, int], head_dim: int, device: str) -> dict[str, Any]:
    """Time the append of one token where keys become due and where they do not, and their mean over many steps."""
    batch_size, num_kv_heads, tokens = size
    compiled = NewKernels()
    scheme = get_scheme(config.scheme)
    due = [_keys_due(scheme, config, past) for past in range(tokens, tokens + 512)]
    period = 512 // sum(due)
    times = []
    for is_due in (False, True):
        past = tokens + due.index(is_due)
        halves = _halves(config, batch_size, num_kv_heads, past, head_dim, device, room=1)
        new = _tokens(batch_size, num_kv_heads, 1, head_dim, device)
        times.append(device_microseconds(_append(halves, new), device, reset=_restore(halves)))
    step, flush = times
    return {
        "us": (step * (period - 1) + flush) / period,
        "step_us": step,
        "flush_us": flush,
        "steps_a_flush": period,
        "compiled": compiled.summary(),
    }


def _keys_due(scheme: Any, config: SchemeConfig, past: int) -> bool:
    before, after = (scheme.packed_length(config, "key", length, 0) for length in (past, past + 1))
    return bool(after > before)


def _halves(
    config: SchemeConfig, batch_size: int, num_kv_heads: int, length: int, head_dim: int, device: str, *, room: int
) -> Halves:
    return random_halves(
        config,
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        length=length,
        dtype=_dtype(device),
        device=device,
        room=room,
    )


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _tokens(batch_size: int, num_kv_heads: int, tokens: int, head_dim: int, device: str) -> Tensor:
    # Keys and values in one tensor, so that one read or copy is that of both.
    return torch.randn(2, batch_size, num_kv_heads, tokens, head_dim, dtype=_dtype(device), device=device)


def _append(halves: Halves, new: Tensor) -> Callable[[], None]:
    append_op = halves[0].scheme.append_op
    where, last = lengths(halves), operands(halves)
    key, value = new.unbind()
    return lambda: append_op(key, value, None, where, 0, *last)


def _restore(halves: Halves) -> Callable[[], None]:
    """Return a function that puts window and pool back: an append that runs twice would find the pool changed."""
    kept = [
        (half.tensors[name], half.tensors[name].clone())
        for half in halves
        for name, spec in half.specs.items()
        if spec.paged_dim is None
    ]

    def restore() -> None:
        for tensor, copy in kept:
            tensor.copy_(copy)

    return restore


def plan(device: str, tiny: bool) -> Iterator[Case]:
    """Yield all cases."""
    head_dim = 16 if tiny else HEAD_DIM
    for kind, measure, sizes in (("encode", encode, ENCODE), ("decode", decode, DECODE)):
        for size in (TINY,) if tiny else sizes:
            for name, config in SCHEMES.items():
                yield Case(
                    labels={"kind": kind, "tokens": "x".join(map(str, size)), "scheme": name},
                    measure=partial(measure, config, size, head_dim, device),
                    quick=name in QUICK_SCHEMES and (tiny or size == sizes[0]),
                    default=name in QUICK_SCHEMES or size in (sizes[0], TINY),
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = command_line(__doc__, "append").parse_args(arguments)
    return run_cases(plan(options.device, options.tiny), options)


if __name__ == "__main__":
    sys.exit(main())
