"""What our Triton kernels write to, found out once for each kernel instead of four times for each launch of a layer.

Torch compiles a kernel to Triton's IR and walks it for every launch in a graph, each time the graph changes its form;
with many layers that is most of the time that lowering takes. The result depends on the kernel, on the types of
its arguments and on its constants, which all layers share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor

_ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")
"""Its name in torch up to 2.11 and from 2.12 on. A version that has neither just takes longer."""


@contextmanager
def kernel_writes_remembered() -> Iterator[None]:
    """While this is active, torch analyzes each of our kernels once; the kernels of others as ever."""
    try:
        from torch._higher_order_ops import triton_kernel_wrap
    except ImportError:
        yield
        return
    name = next((name for name in _ANALYSES if hasattr(triton_kernel_wrap, name)), None)
    if name is None:
        yield
        return
    with mock.patch.object(triton_kernel_wrap, name, _remembering(getattr(triton_kernel_wrap, name))):
        yield


@functools.cache
def _remembering(analyze: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Hashable, Any] = {}

    @functools.wraps(analyze)
    def remembered(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        key = None if tma_descriptor_metadata else _key(kernel, kwargs)
        if key is None:
            return analyze(kernel, kwargs, tma_descriptor_metadata)
        if key not in known:
            known[key] = analyze(kernel, kwargs, tma_descriptor_metadata)
        # Up to torch 2.11 a list, which is then its caller's.
        return list(known[key]) if isinstance(known[key], list) else known[key]

    return remembered


def _key(kernel: Any, arguments: Mapping[str, Any]) -> Hashable | None:
    """What the analysis of one of our kernels depends on; None if this cannot tell."""
    # Options of a launch, such as the number of warps, come as an `Autotuner` with one configuration.
    configurations = getattr(kernel, "configs", ())
    function = kernel.fn if configurations else kernel
    is_ours = getattr(function, "__module__", "").startswith("ottfx.kernels.")
    if not is_ours or any(configuration.kwargs for configuration in configurations):
        return None
    kinds = tuple((name, _kind(argument)) for name, argument in arguments.items())
    try:
        hash(kinds)
    except TypeError:
        return None
    return function, kinds


def _kind(argument: Any) -> Any:
    from torch._inductor.ir import TensorBox

    if isinstance(argument, (Tensor, TensorBox)):
        return "tensor", argument.dtype
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)):
        return "symbol"
    return type(argument), argument
