"""`save_cache` and `load_cache`: a cache in one safetensors file, packed as it is in memory.

Tensors are named "layers.<index>.<key or value>" with the state tensor's name behind it. The file's metadata holds one
JSON object, under `METADATA_KEY`: versions, what kind of cache it was, and an entry for each half of each layer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ottfx.artifacts.atomic_file import atomic_file
from ottfx.artifacts.cache_kinds import LAYER_CLASSES, CacheLayer, SlidingAttributes, put_together, take_apart
from ottfx.artifacts.json_fields import read_fields
from ottfx.artifacts.stored_half import (
    PackedHalf,
    StoredHalf,
    damaged,
    half_from_json,
    half_to_json,
    store_half,
    store_tensor,
)
from ottfx.cache_state import CacheHalf, pages_to_allocate
from ottfx.errors import ArtifactError
from ottfx.schemes.base import ROLES
from ottfx.versions import installed_version

FORMAT_VERSION = 1
METADATA_KEY = "ottfx_cache"


@dataclass(frozen=True, kw_only=True)
class _LayerEntry:
    """One layer in the metadata: a `CacheLayer` in JSON."""

    layer_class: str
    attributes: dict[str, Any]
    halves: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class _CacheEntry:
    """What the metadata of a file says."""

    format_version: int
    ottfx_version: str
    cache_class: str
    grows: bool
    """Whether a DynamicCache makes new layers as a model asks for them."""
    device: str
    layers: tuple[Any, ...]


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache to a file; `load_cache` continues from it with the same tokens.

    Packed storage is written as it is, without spare capacity. The cache itself does not change. A file of that name
    is replaced as a whole, or, if writing fails, left as it was.

    Args:
        cache: a transformers `DynamicCache` of full-attention and sliding-window layers, quantized or not; a tuple or
            list of (key, value) pairs, one a layer; or the `ProgramCache` of a loaded program.
        path: the safetensors file to write, for instance "prompt.safetensors".

    Raises:
        ArtifactError: a cache of another kind; the text says what can be saved.
        OSError: the file cannot be written.
    """
    cache_class, grows, layers = take_apart(cache)
    tensors: dict[str, Tensor] = {}
    entries = []
    devices = {"cpu"}
    for index, layer in enumerate(layers):
        stored = []
        for role, half in zip(ROLES, layer.halves, strict=False):
            half_entry, parts = store_half(half) if isinstance(half, CacheHalf) else store_tensor(half)
            stored.append(half_entry)
            tensors.update({f"layers.{index}.{role}{name}": tensor for name, tensor in parts.items()})
            devices.add((half.shape if isinstance(half, CacheHalf) else half).device.type)
        problem = _layer_problem(stored)
        if problem is not None:
            raise ArtifactError(
                f"ottfx.save_cache: layer {index}: {problem}. Pass a cache as the model returned it, with keys and "
                "values [batch, num_kv_heads, length, head_dim] in each layer."
            )
        halves = [half_to_json(half_entry) for half_entry in stored]
        attributes = dataclasses.asdict(layer.attributes)
        entries.append(_LayerEntry(layer_class=layer.layer_class, attributes=attributes, halves=tuple(halves)))
    entry = _CacheEntry(
        format_version=FORMAT_VERSION,
        ottfx_version=_ottfx_version(),
        cache_class=cache_class,
        grows=grows,
        device="cuda" if "cuda" in devices else "cpu",
        layers=tuple(entries),
    )
    try:
        metadata = {METADATA_KEY: json.dumps(dataclasses.asdict(entry))}
    except TypeError as error:
        raise ArtifactError(
            "ottfx.save_cache: options of a scheme must be numbers, strings, None or tuples of them, to be written as "
            f"JSON. Got: {error}. Change the scheme's config class."
        ) from error
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a cache that `save_cache` wrote.

    Every call returns a cache of its own: load a prompt once for each continuation, or load it once and
    `copy.deepcopy` it.

    Args:
        path: the file.
        device: where the tensors go. None: to the GPU if they were saved from one and CUDA is available, otherwise
            to the CPU.

    Returns:
        A cache of the kind that was saved.

    Raises:
        ArtifactError: there is no such file, `save_cache` did not write it, it is damaged, or it needs a scheme that is
            not here. Nothing of such a file is used.
    """
    where = f"ottfx.load_cache: {os.fspath(path)}"
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(
            f"{where}: expected a safetensors file written by ottfx.save_cache. Got: {error}. "
            "Check the path; if the file was cut short, copy or save it again."
        ) from error
    entry = _read_entry(metadata, where)
    layers = [_read_layer(raw, entry.cache_class, f"{where}: layer {i}") for i, raw in enumerate(entry.layers)]
    if entry.cache_class == "ProgramCache":
        _check_program_cache(layers, where)
    _check_tensors(tensors, layers, where)

    if device is None:
        device = "cuda" if entry.device == "cuda" and torch.cuda.is_available() else "cpu"
    # "cuda" becomes the device that tensors name.
    device = torch.empty(0, device=device).device
    pages = pages_to_allocate(max((half.pages_needed() for layer in layers for half in layer.halves), default=0), 0)
    # Buffers made in inference mode could not be written to later outside it.
    with torch.inference_mode(False), torch.no_grad():
        for index, layer in enumerate(layers):
            halves = []
            for role, half in zip(ROLES, layer.halves, strict=False):
                parts = {key: tensors[f"layers.{index}.{role}{key}"] for key in half.layout()}
                restore = half.restore_half if entry.cache_class == "ProgramCache" else half.restore
                halves.append(restore(parts, pages, device))
            layers[index] = dataclasses.replace(layer, halves=halves)
    return put_together(entry.cache_class, entry.grows, layers)


def _layer_problem(halves: Sequence[StoredHalf]) -> str | None:
    """Say why these cannot be the keys and values of one layer, or None."""
    for role, half in zip(ROLES, halves, strict=False):
        problem = half.problem(role)
        if problem is not None:
            return f"{role}s: {problem}"
    sizes = [(half.batch_size, half.tokens) for half in halves]
    if len(set(sizes)) > 1:
        return f"keys and values must have the same (batch size, length), got {sizes[0]} and {sizes[1]}"
    return None


def _read_entry(metadata: Mapping[str, str], where: str) -> _CacheEntry:
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{where}: expected a file written by ottfx.save_cache. Got a safetensors file whose "
            f"metadata has {sorted(metadata)} and no {METADATA_KEY!r}. Check the path."
        )
    try:
        raw = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise damaged(f"{where}: its metadata must be JSON, got: {error}") from error
    version, writer = (raw.get("format_version"), raw.get("ottfx_version")) if isinstance(raw, dict) else (None, None)
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: expected format version {FORMAT_VERSION}. Got {version!r}, written by ottfx "
            f"{writer}; here is ottfx {_ottfx_version()}. Load it with that version, or save the cache again."
        )
    entry: _CacheEntry = read_fields(_CacheEntry, raw, where)
    if entry.cache_class not in LAYER_CLASSES:
        raise damaged(f"{where}: cache_class must be one of {list(LAYER_CLASSES)}, got {entry.cache_class!r}")
    return entry


def _read_layer(raw: Any, cache_class: str, where: str) -> CacheLayer:
    layer: _LayerEntry = read_fields(_LayerEntry, raw, where)
    classes = LAYER_CLASSES[cache_class]
    if layer.layer_class not in classes:
        raise damaged(f"{where}: layer_class must be one of {list(classes)}, got {layer.layer_class!r}")
    attributes = read_fields(classes[layer.layer_class], layer.attributes, f"{where}, attributes")
    counts = (0, 2) if cache_class == "DynamicCache" else (2,)
    if len(layer.halves) not in counts:
        raise damaged(f"{where}: must have one of {list(counts)} entries of keys and values, got {len(layer.halves)}")
    halves = [half_from_json(half, f"{where}: {role}s") for role, half in zip(ROLES, layer.halves, strict=False)]
    problem = _layer_problem(halves)
    if problem is not None:
        raise damaged(f"{where}: {problem}")
    tokens = halves[0].tokens if halves else 0
    if isinstance(attributes, SlidingAttributes) and (
        attributes.sliding_window < 1 or attributes.cumulative_length < tokens
    ):
        raise damaged(f"{where}: must have a window of 1 or more, and seen its {tokens} tokens, got {attributes}")
    return CacheLayer(layer_class=layer.layer_class, attributes=attributes, halves=halves)


def _check_program_cache(layers: Sequence[CacheLayer], where: str) -> None:
    halves = [half for layer in layers for half in layer.halves]
    packed = [half for half in halves if isinstance(half, PackedHalf) and half.tail == 0]
    if len({(half.batch_size, half.length) for half in packed}) != 1 or len(packed) != len(halves):
        raise damaged(f"{where}: the layers of a ProgramCache must be packed, of one batch size and length")


def _check_tensors(tensors: Mapping[str, Tensor], layers: Sequence[CacheLayer], where: str) -> None:
    expected = {
        f"layers.{index}.{role}{key}": what
        for index, layer in enumerate(layers)
        for role, half in zip(ROLES, layer.halves, strict=False)
        for key, what in half.layout().items()
    }
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise damaged(f"{where}: tensors must be those of its entries, got {missing} missing and {unknown} unknown")
    for key, (shape, dtype) in expected.items():
        tensor = tensors[key]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            got = f"{list(tensor.shape)} {tensor.dtype}"
            raise damaged(f"{where}: tensor {key} must be {list(shape)} {dtype} by its length and scheme, got {got}")


def _ottfx_version() -> str:
    return installed_version("ottfx") or "not installed"
