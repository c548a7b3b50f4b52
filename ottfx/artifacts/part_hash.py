"""The SHA-256 of a part of an archive, made so that several threads can check a large one.

A part of at most `BLOCK` bytes has its SHA-256. A larger one has the SHA-256 of those of its blocks, one after the
other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

BLOCK = 64 << 20
"""Bytes that are hashed on their own."""

READ = 4 << 20
"""Bytes that a thread reads at once."""


def hash_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the hash, in hexadecimal, of a part whose bytes come in pieces of any size."""
    part = PartHash()
    for piece in pieces:
        part.update(piece)
    return part.hexdigest()


def hash_stored(file: BinaryIO, offset: int, size: int) -> str:
    """Return the hash, in hexadecimal, of `size` bytes of a file from `offset` on.

    Each thread reads and hashes one block at a time: a large part takes about as long as reading it.
    """
    end = offset + size
    starts = range(offset, end, BLOCK)

    def digest(start: int) -> bytes:
        stop = min(start + BLOCK, end)
        buffer = memoryview(bytearray(min(READ, stop - start)))
        block = hashlib.sha256()
        while start < stop:
            count = os.preadv(file.fileno(), [buffer[: stop - start]], start)
            if not count:
                break
            block.update(buffer[:count])
            start += count
        return block.digest()

    if len(starts) <= 1:
        return digest(offset).hex()
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, starts))).hexdigest()


class PartHash:
    """The hash of a part that is written piece by piece."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._block = hashlib.sha256()
        self._room = BLOCK

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        rest = memoryview(piece).cast("B")
        while len(rest) > self._room:
            self._block.update(rest[: self._room])
            self._digests.append(self._block.digest())
            rest = rest[self._room :]
            self._block, self._room = hashlib.sha256(), BLOCK
        self._block.update(rest)
        self._room -= len(rest)

    def hexdigest(self) -> str:
        """Return the hash of what was taken so far."""
        if not self._digests:
            return self._block.hexdigest()
        return hashlib.sha256(b"".join((*self._digests, self._block.digest()))).hexdigest()
