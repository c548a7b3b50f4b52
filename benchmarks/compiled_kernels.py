"""ottfx's kernels: registers and spills of new ones, compiling many in parallel, the time of those that store."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

STORING = (
    "affine_append",
    "affine_encode",
    "affine_pack",
    "affine_select",
    "affine_store",
    "group_seats",
    "key_order",
    "rotate",
)
"""Modules of `ottfx.kernels` whose kernels store new tokens."""


class NewKernels:
    """The kernels that are compiled after this object is made."""

    def __init__(self) -> None:
        self._known = set(_compiled())

    def summary(self) -> str | None:
        """Name, registers and spilled registers of each; None if all had been compiled before."""
        new = [kernel for key, kernel in _compiled().items() if key not in self._known]
        return "; ".join(f"{name} {k.n_regs} registers {k.n_spills} spills" for name, k in new) or None


def _compiled() -> dict[int, tuple[str, Any]]:
    # Triton keeps what it compiled for a device in `JITFunction.device_caches`, not a documented attribute.
    found = {}
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("ottfx.kernels.")]:
        for name, function in vars(module).items():
            for cache in getattr(function, "device_caches", {}).values():
                found.update({id(kernel): (name, kernel) for kernel in cache[0].values()})
    return found


def storing_microseconds(kernels: Mapping[str, float]) -> float:
    """Return the time of those kernels of a profile that store tokens, out of name -> microseconds."""
    # A process that starts from Inductor's caches has not imported them.
    modules = [import_module(f"ottfx.kernels.{name}") for name in STORING] if kernels else []
    names = tuple(name for module in modules for name in vars(module) if name.endswith("_kernel"))
    # Inductor appends to the names of those that it launches.
    return sum(time for name, time in kernels.items() if name.startswith(names))


def compile_in_parallel(compile_one: Callable[[Any], None], settings: Sequence[Any], jobs: int) -> None:
    """Call `compile_one` for all settings in processes of their own, so that Triton's cache on disk holds the kernels.

    A setting that fails is told and left: measuring it will fail as well, and say why.
    """
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for setting, future in [(setting, pool.submit(compile_one, setting)) for setting in settings]:
            if (error := future.exception()) is not None:
                print(f"not compiled: {setting}: {error}")
    print(f"compiled {len(settings)} settings in {time.perf_counter() - began:.0f} s")
