"""A zip whose members are stored as they are, each at a multiple of 64 bytes, so that it can be mapped."""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ottfx.artifacts.manifest import PartEntry
from ottfx.artifacts.part_hash import PartHash
from ottfx.errors import ArtifactError

STEM = "model/"
"""Folder of all members. torch takes whatever the first member begins with, so a file may be renamed."""

ALIGNMENT = 64
"""Bytes."""

BLOCK = 16 << 20
"""Bytes read at once."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, length of the name, length of the extra field."""

DAMAGES = (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, OverflowError, struct.error)


@dataclass(frozen=True)
class Span:
    """Where the bytes of a member are in the archive."""

    offset: int
    bytes: int
    crc: int


def write_member(
    package: zipfile.ZipFile, file: BinaryIO, name: str, size: int, pieces: Iterable[bytes | memoryview]
) -> PartEntry:
    """Write one member.

    Args:
        package: the zip.
        file: what `package` writes to.
        name: without the stem.
        size: of the pieces together, bytes.
        pieces: its bytes in order.

    Returns:
        What the manifest says of it.
    """
    info = zipfile.ZipInfo(STEM + name)
    info.file_size = size
    # Before the data: 30 bytes, the name, 4 bytes that begin the extra field, padding, 20 bytes of large sizes.
    padding = -(file.tell() + 30 + len(info.filename.encode()) + 4 + 20) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    digest = PartHash()
    written = 0
    with package.open(info, "w", force_zip64=True) as member:
        for piece in pieces:
            digest.update(piece)
            written += member.write(piece)
    return PartEntry(sha256=digest.hexdigest(), bytes=written)


def find_members(path: Path, file: BinaryIO) -> dict[str, Span]:
    """Return name -> place of every member, names without the stem.

    Raises:
        ArtifactError: it is no zip, its directory does not fit it, or a member is none that `write_member` writes.
    """
    spans: dict[str, Span] = {}
    size = os.fstat(file.fileno()).st_size
    # What zipfile raises on a damaged directory is not documented.
    try:
        with zipfile.ZipFile(file) as package:
            for info in package.infolist():
                name = info.filename.removeprefix(STEM)
                if info.filename != info.orig_filename or name == info.filename or not is_plain(name):
                    raise ValueError(f"member {info.orig_filename!r}, which is not a plain path below {STEM!r}")
                if name in spans:
                    raise ValueError(f"two members {name!r}")
                # Bit 3: sizes follow the data, and are in the directory as well. Bit 11: the name is UTF-8.
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~0x808:
                    raise ValueError(f"member {name!r}, which is compressed or encrypted")
                file.seek(info.header_offset)
                signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
                if signature != b"PK\3\4" or info.compress_size != info.file_size or offset + info.file_size > size:
                    raise ValueError(f"member {name!r}, whose bytes are not where the directory has them")
                spans[name] = Span(offset, info.file_size, info.CRC)
    except DAMAGES as error:
        raise ArtifactError(
            f"{path}: must be a file that ottfx.export wrote, complete and unaltered. Got: {error}. "
            "Copy it again, or export the model again."
        ) from error
    return spans


def open_to_read(path: Path) -> BinaryIO:
    """Open a file, or raise ArtifactError."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise ArtifactError(
            f"{path}: must be a file that can be read. Got: {error.strerror}. Look at the path."
        ) from error


def map_file(path: Path, file: BinaryIO) -> mmap.mmap:
    """Map a file, or raise ArtifactError. What is written to the memory goes to no file."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ArtifactError(
            f"{path}: must be a file that can be mapped into memory. Got: {error}. Free memory, or allow more of it."
        ) from error


def file_blocks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes; each block is overwritten by the next."""
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb") as file:
        while count := file.readinto(block):
            yield block[:count]


def is_plain(name: str) -> bool:
    """Whether a name is a relative path that stays below its folder, on any system."""
    parts = name.split("/")
    return bool(name) and not any(part in ("", ".", "..") for part in parts) and not set(name) & {"\\", ":", "\0"}
