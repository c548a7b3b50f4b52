"""A hash of ottfx's own sources, for caches that know an op by its name only."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import ottfx


@functools.cache
def source_hash() -> str:
    """Return 12 hexadecimal digits that change with any Python file of this package, its passes and its kernels."""
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for root in map(Path, ottfx.__path__)
        for folder in ((root,) if root.name == "ottfx" else (root / "passes", root / "kernels"))
        for path in folder.rglob("*.py")
    )
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
