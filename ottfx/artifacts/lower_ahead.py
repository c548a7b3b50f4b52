"""Compile one rewritten program with AOTInductor, its weights left outside."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottfx.artifacts.export_graph import FlatProgram
from ottfx.inductor_options import REWRITTEN_GRAPH, workarounds


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What AOTInductor made of a `FlatProgram`."""

    files: Sequence[Path]
    constants: dict[str, Tensor]
    """The weights that it takes, by the names under which it asks for them."""


def compile_ahead(program: FlatProgram, folder: Path) -> CompiledProgram:
    """Compile a program.

    Args:
        program: from `flat_program`.
        folder: where a trial package may be written.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    options = {
        **REWRITTEN_GRAPH,
        **workarounds(program.example),
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
    }
    with warnings.catch_warnings():
        # Inductor copies a tree of its own in a way that torch has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        files: Any = aot_compile(program.gm, program.example, options=options)
    package = folder / f"{program.kind.name}.pt2"
    package_aoti(str(package), {"model": files})
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    tensors = {
        **dict(program.gm.named_buffers(remove_duplicate=False)),
        **dict(program.gm.named_parameters(remove_duplicate=False)),
    }
    return CompiledProgram(
        files=[Path(file) for file in files],
        constants={name: tensors[name].detach() for name in loader.get_constant_fqns()},
    )
