"""The arrays of results, in one .npz file beside the JSON: the numbers of each scored position of each variant."""

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
from ottfx.metrics import PositionMetrics

if TYPE_CHECKING:
    from ottfx.results import Result


def write_arrays(results: Sequence[Result], path: Path) -> Path:
    """Write `<label>/kl`, `<label>/agrees`, `<label>/nll` and `<label>/reference_nll` of each result.

    Args:
        results: with different labels.
        path: the file, which ends in .npz; its folder must exist.

    Returns:
        The file.
    """
    arrays = {
        f"{r.label}/{f.name}": getattr(r.metrics, f.name).numpy()
        for r in results
        for f in dataclasses.fields(PositionMetrics)
    }
    with atomic_file(path) as unfinished:
        np.savez_compressed(unfinished, **arrays)
    return path


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
