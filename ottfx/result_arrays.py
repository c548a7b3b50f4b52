"""The arrays of results, in one .npz file beside the JSON: the numbers of each scored position, layer and head."""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ottfx.artifacts.atomic_file import atomic_file
from ottfx.cache_fidelity import Fidelity
from ottfx.metrics import PositionMetrics

if TYPE_CHECKING:
    from ottfx.results import Result


def write_arrays(results: Sequence[Result], path: Path) -> Path:
    """Write the fields of each result's metrics and fidelity under the names `<label>/<field>`.

    Norms of the dense keys, the same for all, have the name `key_norms` alone.

    Args:
        results: of one text and model, with different labels.
        path: the file, which ends in .npz; its folder must exist.

    Returns:
        The file.
    """
    arrays = {
        f"{r.label}/{f.name}": getattr(r.metrics, f.name).numpy()
        for r in results
        for f in dataclasses.fields(PositionMetrics)
    }
    for r in results:
        if r.fidelity is not None:
            arrays |= {f"{r.label}/{name}": getattr(r.fidelity, name).numpy() for name in _OF_A_VARIANT}
            arrays["key_norms"] = r.fidelity.key_norms.numpy()
    with atomic_file(path) as unfinished:
        np.savez_compressed(unfinished, **arrays)
    return path


_OF_A_VARIANT = [f.name for f in dataclasses.fields(Fidelity) if f.name != "key_norms"]


class ArraysReader:
    """Reads what `write_arrays` wrote. KeyError: something is not there; a missing or damaged file holds nothing."""

    def __init__(self, path: Path) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile), np.load(path) as stored:
            self._arrays = {name: stored[name] for name in stored.files}

    def metrics(self, label: str) -> PositionMetrics:
        """Return the numbers of each position of one result."""
        names = [f.name for f in dataclasses.fields(PositionMetrics)]
        return PositionMetrics(**{name: torch.from_numpy(self._arrays[f"{label}/{name}"]) for name in names})

    def fidelity(self, label: str) -> Fidelity | None:
        """Return what was compared with the dense cache, or None if nothing was."""
        if f"{label}/{_OF_A_VARIANT[0]}" not in self._arrays:
            return None
        arrays = {name: torch.from_numpy(self._arrays[f"{label}/{name}"]) for name in _OF_A_VARIANT}
        return Fidelity(**arrays, key_norms=torch.from_numpy(self._arrays["key_norms"]))
