"""Rewritten programs as `torch.export` files, uncompiled: for other compilers, and to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes_config

from ottfx.artifacts.atomic_file import atomic_file
from ottfx.artifacts.export_graph import FlatProgram
from ottfx.artifacts.manifest import Manifest


def write_exported(folder: Path, programs: Mapping[str, FlatProgram], manifest: Manifest) -> None:
    """Write `<program>.pt2` for each program, and `ottfx.json`, into a folder.

    `torch.export.load` opens them where ottfx is imported: the scheme's ops are calls in them. `run_decompositions`
    sees through those that mutate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        exported = export_again(program)
        with atomic_file(folder / f"{name}.pt2") as temporary:
            torch.export.save(exported, temporary)
    with atomic_file(folder / "ottfx.json") as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")


def export_again(program: FlatProgram) -> ExportedProgram:
    """Return a rewritten program as an `ExportedProgram`, whose sizes may be 0 and 1 as well."""
    example = tuple(
        torch.zeros([_hint(size) for size in fake.shape], dtype=fake.dtype, device=fake.device)
        for fake in program.example
    )
    sizes = tuple({dim: Dim.AUTO for dim, size in enumerate(fake.shape) if _varies(size)} for fake in program.example)
    # By default a tracer takes every dynamic size for at least 2.
    with torch.no_grad(), symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        exported = torch.export.export(program.gm, example, dynamic_shapes=sizes, strict=False)
    # They would be saved as a pickle.
    exported.example_inputs = None
    return exported


def _hint(size: Any) -> int:
    return int(size.node.hint) if _varies(size) else int(size)


def _varies(size: Any) -> bool:
    return isinstance(size, torch.SymInt)
