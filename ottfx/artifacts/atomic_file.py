"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block ends well, that file takes the name `path`.

    The new file is on the disk before it takes the name. If the block raises, `path` stays as it was, and nothing is
    left beside it.

    Args:
        path: the file to make or replace; its folder must exist. The temporary path has its suffix.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(8)}{final.suffix}")
    try:
        temporary.open("xb").close()
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, final)
        _to_disk(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
