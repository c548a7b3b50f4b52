"""The file of an exported model: torch's PT2 archive, with a manifest that lists every member and its SHA-256.

It is a zip with nothing compressed, which `torch._C._aoti.AOTIModelPackageLoader` opens as it is. Nothing is ever
unpickled. The hashes show damage, not who made the file: compiled programs are code.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ottfx.artifacts.atomic_file import atomic_file
from ottfx.artifacts.manifest import Manifest, PartEntry, WeightsEntry
from ottfx.artifacts.part_hash import hash_pieces, hash_stored
from ottfx.artifacts.tensor_file import StoredTensor, TensorWriter, read_header
from ottfx.artifacts.zip_members import (
    STEM,
    Span,
    file_blocks,
    find_members,
    is_plain,
    map_file,
    open_to_read,
    write_member,
)
from ottfx.errors import ArtifactError, ConfigError

MANIFEST = "extra/ottfx.json"
EXTRA = "extra/"
PROGRAMS = "data/aotinductor/"
WEIGHTS = "data/weights/weights.safetensors"
"""Not below `extra/`, which torch.export.pt2_archive reads as text."""
MARKERS = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"6\n"}
"""What torch's readers look for."""


class Archive:
    """An open archive; made by `read_archive`. Weights are mapped, not read: the files must not change in place.

    Attributes:
        path: of the archive.
        manifest: what it says of itself.
    """

    def __init__(
        self, path: Path, manifest: Manifest, memory: mmap.mmap, spans: Mapping[str, Span], weights: _Weights
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._memory = memory
        self._spans = spans
        self._weights = weights

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, on the CPU, over a private memory map: writing to them changes no file.

        Those that were not contiguous are copies with the strides that they had. Tied weights are one tensor.
        """
        entry = self.manifest.weights
        tensors = {}
        for name, stored in self._weights.table.items():
            tensor = stored.over(self._weights.memory)
            if name in entry.strides:
                tensor = torch.empty_strided(tensor.shape, entry.strides[name], dtype=tensor.dtype).copy_(tensor)
            tensors[name] = tensor
        return tensors | {alias: tensors[name] for alias, name in entry.aliases.items()}

    def names(self) -> list[str]:
        """Return the names in the `extra` of `write_archive`."""
        return [name.removeprefix(EXTRA) for name in self._spans if name.startswith(EXTRA)]

    def read(self, name: str) -> bytes:
        """Return the bytes of one part.

        Args:
            name: as in the `extra` of `write_archive`, or as in `manifest.parts`.

        Raises:
            ArtifactError: there is no such part.
        """
        span = self._spans.get(EXTRA + name) or self._spans.get(name)
        if span is None:
            raise ArtifactError(f"{self.path}: the part must be one of {sorted(self.manifest.parts)}. Got {name!r}.")
        return self._memory[span.offset : span.offset + span.bytes]


@dataclass(frozen=True)
class _Weights:
    memory: mmap.mmap
    table: dict[str, StoredTensor]


def write_archive(
    path: str | os.PathLike[str],
    manifest: Manifest,
    programs: Mapping[str, Sequence[str | os.PathLike[str]]],
    weights: Mapping[str, Tensor],
    extra: Mapping[str, bytes],
) -> Manifest:
    """Write an archive; `path` is replaced at the end, or stays as it was.

    External weights go to `<stem of path>.safetensors` beside it. A file of other weights that has this name stays, for
    another archive may need it; then the start of their SHA-256 is added to the name.

    Args:
        path: of the archive.
        manifest: its `parts`, and all of its `weights` but `location`, are filled in here.
        programs: name -> the files that `torch._inductor.aot_compile` returned.
        weights: name -> tensor; tensors that are one are written once.
        extra: name -> bytes of further parts.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: a file cannot be read or written.
        ConfigError: a weight or a name that cannot be written.
    """
    path = Path(path)
    tensors = TensorWriter(weights)
    try:
        inside = manifest.weights.location == "inside"
        external = None if inside else _write_external(path, tensors)
        with atomic_file(path) as temporary, open(temporary, "wb") as file, zipfile.ZipFile(file, "w") as package:
            parts: dict[str, PartEntry] = {}
            for name, size, pieces in _parts(programs, tensors if inside else None, extra):
                if name in (*parts, MANIFEST) or not is_plain(name):
                    raise ConfigError(f"ottfx.export: names of parts must be relative and differ. Got {name!r}.")
                parts[name] = write_member(package, file, name, size, pieces)
            entry = external or WeightsEntry(file=WEIGHTS, **dataclasses.asdict(parts[WEIGHTS]))
            entry = dataclasses.replace(entry, aliases=tensors.aliases, strides=tensors.strides)
            manifest = dataclasses.replace(manifest, weights=entry, parts=parts)
            text = manifest.to_json().encode()
            write_member(package, file, MANIFEST, len(text), [text])
    except OSError as error:
        raise ArtifactError(
            f"{path}: must be a place where a file can be written. Got: {error}. "
            "Look at the folder, and at the room on the disk."
        ) from error
    return manifest


def read_archive(path: str | os.PathLike[str], verify: bool = True) -> Archive:
    """Open an archive.

    Args:
        path: of the archive; external weights are looked for beside it.
        verify: compare the SHA-256 of every part, weights included, with the manifest. Reads all bytes once.

    Raises:
        ArtifactError: a file is not there, not such an archive, incomplete or altered, or holds what its manifest does
            not list.
    """
    path = Path(path)
    with open_to_read(path) as file:
        spans = find_members(path, file)
        memory = map_file(path, file)
        manifest = _read_manifest(path, memory, spans.pop(MANIFEST, None))
        _check_parts(path, file, manifest, spans, verify)
    weights = _map_weights(path, manifest, memory, spans, verify)
    _check_weights(path, manifest, weights.table)
    return Archive(path, manifest, memory, spans, weights)


def _parts(
    programs: Mapping[str, Sequence[str | os.PathLike[str]]], weights: TensorWriter | None, extra: Mapping[str, bytes]
) -> Iterator[tuple[str, int, Iterable[bytes | memoryview]]]:
    """Yield (name, bytes, pieces) of every part."""
    for name, content in MARKERS.items():
        yield name, len(content), [content]
    for program, files in programs.items():
        for source in map(Path, files):
            name = f"{PROGRAMS}{program}/{source.name}"
            if source.suffix == ".cpp":
                # Nobody reads the sources, but torch 2.11 finds a program's metadata by their names.
                yield name, 0, []
            else:
                yield name, source.stat().st_size, file_blocks(source)
    for name, content in extra.items():
        yield EXTRA + name, len(content), [content]
    if weights is not None:
        yield WEIGHTS, weights.bytes, weights.pieces()


def _write_external(path: Path, tensors: TensorWriter) -> WeightsEntry:
    # Hashed before they are written: the hash decides about the name.
    sha256 = hash_pieces(tensors.pieces())
    plain = path.with_name(f"{path.stem}.safetensors")
    named = path.with_name(f"{path.stem}-{sha256[:12]}.safetensors")
    target = next((file for file in (plain, named) if file.exists() and hash_pieces(file_blocks(file)) == sha256), None)
    if target is None:
        target = named if plain.exists() else plain
        with atomic_file(target) as temporary, open(temporary, "wb") as file:
            for piece in tensors.pieces():
                file.write(piece)
    return WeightsEntry(location="external", file=target.name, sha256=sha256, bytes=tensors.bytes)


def _read_manifest(path: Path, memory: mmap.mmap, span: Span | None) -> Manifest:
    if span is None:
        raise ArtifactError(
            f"{path}: must hold a manifest, {STEM + MANIFEST!r}. Got an archive without one. "
            "Export the model with ottfx.export."
        )
    text = memory[span.offset : span.offset + span.bytes]
    if zlib.crc32(text) != span.crc:
        raise ArtifactError(f"{path}: the manifest must have its CRC-32. Got another one. Copy the file again.")
    return Manifest.from_json(text, f"{path}: manifest")


def _check_parts(path: Path, file: BinaryIO, manifest: Manifest, spans: Mapping[str, Span], verify: bool) -> None:
    unlisted, missing = sorted(set(spans) - set(manifest.parts)), sorted(set(manifest.parts) - set(spans))
    if unlisted or missing:
        raise ArtifactError(
            f"{path}: must hold what its manifest lists, and nothing else. Got {unlisted} besides, and no {missing}. "
            "Somebody changed it after the export; do not use it."
        )
    for name, part in manifest.parts.items():
        span = spans[name]
        if span.bytes != part.bytes:
            raise ArtifactError(
                f"{path}: {name} must have {part.bytes} bytes. Got {span.bytes}. "
                "Copy the file again, or export the model again."
            )
        if verify:
            _require_hash(f"{path}: {name}", part.sha256, hash_stored(file, span.offset, span.bytes))


def _map_weights(
    path: Path, manifest: Manifest, memory: mmap.mmap, spans: Mapping[str, Span], verify: bool
) -> _Weights:
    entry = manifest.weights
    if entry.location == "inside":
        part, span = manifest.parts.get(entry.file), spans.get(entry.file)
        if span is None or part != PartEntry(sha256=entry.sha256, bytes=entry.bytes):
            raise ArtifactError(f"{path}: manifest, weights: must be one of the parts. Got {entry}.")
        return _Weights(memory, read_header(memory, span.offset, span.bytes, f"{path}: {entry.file}"))
    if not is_plain(entry.file) or "/" in entry.file:
        raise ArtifactError(f"{path}: manifest, weights: must be a file beside the archive. Got {entry.file!r}.")
    source = path.with_name(entry.file)
    with open_to_read(source) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes or not size:
            raise ArtifactError(
                f"{source}: must be the {entry.bytes} bytes of weights that {path.name} names. Got {size} bytes. "
                "Copy both files again, or export the model again."
            )
        if verify:
            _require_hash(str(source), entry.sha256, hash_stored(file, 0, size))
        memory = map_file(source, file)
    return _Weights(memory, read_header(memory, 0, size, str(source)))


def _check_weights(path: Path, manifest: Manifest, table: Mapping[str, StoredTensor]) -> None:
    entry = manifest.weights
    named = [*entry.aliases.values(), *entry.strides]
    taken = {name for program in manifest.programs.values() for name in program.constants.values()}
    unknown = sorted((set(named) - set(table)) | (taken - {*table, *entry.aliases}))
    if unknown:
        raise ArtifactError(
            f"{path}: the weights must include {unknown}, which the manifest names. Export the model again."
        )
    for name, strides in entry.strides.items():
        if len(strides) != len(table[name].shape) or any(stride < 1 for stride in strides):
            raise ArtifactError(f"{path}: manifest, strides of {name!r}: must fit {table[name].shape}. Got {strides}.")


def _require_hash(where: str, expected: str, got: str) -> None:
    if got != expected:
        raise ArtifactError(
            f"{where}: must have the SHA-256 {expected}. Got {got}: the file was altered. "
            "Copy it again, or export the model again."
        )
