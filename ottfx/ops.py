"""Binds the functions of a scheme as `torch.ops.ottfx.*`, and chooses where they run.

The body of such an op branches on the device: CUDA tensors go to the Triton launchers in `ottfx.kernels`, all others
to the plain-torch definition. `torch.compile` sees through it: on CUDA it sees the kernels, on the CPU the definition.
That makes much to compile, so an op can have an opaque twin as well (`outlined`), for the CPU and for CUDA graphs.
On the CPU the twin need not run the definition: it skips packing when nothing is due, and attends in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ottfx import affine_cache, affine_read, affine_schedule, cpu_attend
from ottfx.opaque_call import in_opaque_call, opaque_call
from ottfx.rotation import rotate, rotate_back


def bind(name: str, function: Callable[..., Any], mutates: Iterable[str] = (), *, outline: bool = False) -> Any:
    """Register `function` as the operator `torch.ops.ottfx.<name>` and return its overload.

    Args:
        name: unique among all schemes; `<scheme>_append` and `<scheme>_attend` by convention.
        function: fully annotated with types that an operator may have (Tensor, Tensor | None, int, float, bool, str).
            A graph that is printed names its parameters.
        mutates: the parameters that it writes to, exactly.
        outline: also register `ottfx::<name>_outlined`, the same operator as one opaque call. Inductor needs many
            seconds for the C++ of one affine op, so the CPU door calls the twin (`outlined`) unless told otherwise,
            and so do the graphs of a model whose steps are recorded, where a call costs the host nothing.
    """
    torch.library.triton_op(f"ottfx::{name}", function, mutates_args=set(mutates))
    op = getattr(torch.ops.ottfx, name).default
    if outline:
        _OUTLINED[op] = _bind_outlined(f"{name}_outlined", function, mutates)
    return op


_OUTLINED: dict[Any, Any] = {}


def outlined(op: Any) -> Any:
    """Return the twin of `op` that compilers call instead of seeing through it, or `op` itself if it has none."""
    return _OUTLINED.get(op, op)


def _bind_outlined(name: str, function: Callable[..., Any], mutates: Iterable[str]) -> Any:
    def body(*args: Any) -> Any:
        with opaque_call():
            if not args[0].is_cuda:
                return function(*args)
            from ottfx.kernels.launch import launching_at_once

            with launching_at_once():
                return function(*args)

    # Not `torch.library.custom_op`: each call would count versions of what it mutates, for autograd, which never sees a
    # quantized cache. On a CPU that takes several times as long as storing a token.
    schema = torch.library.infer_schema(function, mutates_args=set(mutates))
    returns_tensor = not schema.endswith("-> ()")
    torch.library.define(f"ottfx::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"ottfx::{name}", "default", body)
    torch.library.register_fake(
        f"ottfx::{name}",
        lambda first, *_: torch.empty_like(first, memory_format=torch.contiguous_format) if returns_tensor else None,
    )
    return getattr(torch.ops.ottfx, name).default


def affine_append(
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    *,
    rotate_values: bool = False,
    **state_and_constants: Any,
) -> None:
    """Store new tokens in affine storage; named operands as in `affine_cache.append`.

    `mask` is that of the attention, 4-D, or what `token_validity` makes of it. With `rotate_values` values are stored
    rotated (`ottfx/rotation.py`).
    """
    valid = mask
    if mask is None or mask.dim() == 4:
        valid = affine_cache.token_validity(mask, lengths, site, key.shape[2], key.shape[0])
    if key.is_cuda:
        from ottfx.kernels.affine_append import append as launch

        launch(key, value, valid, _row(lengths, site), 0, rotate_values=rotate_values, **state_and_constants)
        return
    value = rotate(value) if rotate_values else value
    if in_opaque_call() and not affine_schedule.anything_due(lengths, site, key.shape[2], state_and_constants):
        affine_cache.append_to_ring(key, value, valid, lengths, site, state_and_constants)
    else:
        affine_cache.append(key, value, valid, lengths, site, **state_and_constants)


def affine_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    past_length: int,
    softmax_scale: float,
    *,
    rotate_values: bool = False,
    **state_and_constants: Any,
) -> Tensor:
    """Attend over affine storage and the new tokens; named operands as in `affine_read.attend`.

    With `rotate_values` stored values are rotated; the result and those of new tokens are not.
    """
    if key.is_cuda:
        from ottfx.kernels.affine_attend import attend as launch

        return launch(
            query, key, value, mask, _row(lengths, site), 0, softmax_scale, rotate_values=rotate_values,
            **state_and_constants,
        )  # fmt: skip
    if rotate_values:
        value = rotate(value)
        state_and_constants["result_dtype"] = torch.float32
    if in_opaque_call() and cpu_attend.takes(query, key, mask, state_and_constants):
        result = cpu_attend.attend(query, key, value, mask, lengths, site, softmax_scale, **state_and_constants)
    else:
        result = affine_read.attend(
            query, key, value, mask, lengths, site, past_length, softmax_scale, **state_and_constants
        )
    return rotate_back(result, query.dtype) if rotate_values else result


def _token_validity(mask: Tensor, lengths: Tensor, site: int, key: Tensor) -> Tensor:
    valid = affine_cache.token_validity(mask, lengths, site, key.shape[2], key.shape[0])
    assert valid is not None
    return valid.contiguous()


token_validity = bind("token_validity", _token_validity)
"""Operator (4-D mask, lengths, site, new keys) -> bool [batch, q_len]: which of the new tokens are real."""


def _row(lengths: Tensor, site: int) -> Tensor:
    """The lengths of one site, `[1, 3]`: with a row number each layer would be a kernel of its own to Inductor."""
    return lengths.narrow(0, site, 1)
