"""What a file of compiled programs holds, for a reader; from its manifest alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Group
from rich.table import Table

from ottfx.command_output import size_text
from ottfx.errors import ArtifactError
from ottfx.report import LENGTHS
from ottfx.schemes.base import PAGE

if TYPE_CHECKING:
    from ottfx.artifacts.manifest import Manifest, SiteEntry, TensorEntry


def bytes_per_token(manifest: Manifest) -> dict[int, float]:
    """Return length in tokens -> bytes of the cache by its length, for one sequence with no page to spare.

    Raises:
        ArtifactError: the layout of a tensor says nothing.
    """
    return {
        length: sum(_tensor_bytes(tensor, max(1, -(-length // PAGE))) for tensor in manifest.state) / length
        for length in LENGTHS
    }


def dense_bytes_per_token(manifest: Manifest) -> int:
    """Return bytes of one token's keys and values in the model's own dtype."""
    return sum(2 * site.num_kv_heads * site.head_dim * _item_size(site.dtype) for site in manifest.sites)


def describe(manifest: Manifest, name: str) -> Group:
    """Return the manifest as tables.

    Args:
        manifest: of the file.
        name: what the tables call the file.

    Raises:
        ArtifactError: the layout of a tensor says nothing.
    """
    return Group(
        _overview(manifest, name), _layers(manifest), _memory(manifest), _state(manifest), _programs(manifest),
        _parts(manifest),
    )  # fmt: skip


def _overview(manifest: Manifest, name: str) -> Table:
    table = Table("", "", title=name, show_header=False)
    model, weights = manifest.model, manifest.weights
    machine = [manifest.device_type, manifest.compute_capability, manifest.cpu_isa]
    table.add_row("model", f"{model.class_name}, {manifest.dtype}")
    table.add_row("built for", ", ".join(part for part in machine if part))
    table.add_row("built with", ", ".join(f"{package} {version}" for package, version in manifest.versions.items()))
    where = weights.file if weights.location == "external" else "the file"
    table.add_row("weights", f"{size_text(weights.bytes)} in {where}")
    table.add_row("padding", "by attention mask" if model.takes_mask else "none: the model takes no mask")
    table.add_row("format version", str(manifest.format_version))
    return table


def _layers(manifest: Manifest) -> Table:
    table = Table("layers", "kv heads", "head dim", "dtype", "scheme", "options", title="cache")
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, site in enumerate(manifest.sites):
        groups.setdefault(_site_row(site), []).append(index)
    for row, indices in groups.items():
        table.add_row(_ranges(indices), *row)
    return table


def _site_row(site: SiteEntry) -> tuple[str, ...]:
    options = ", ".join(f"{name}={value!r}" for name, value in site.options.items())
    return str(site.num_kv_heads), str(site.head_dim), site.dtype, site.scheme, options


def _memory(manifest: Manifest) -> Table:
    table = Table("length", "bytes per token", "dense", "smaller by", title="memory of one sequence")
    dense = dense_bytes_per_token(manifest)
    for length, count in bytes_per_token(manifest).items():
        table.add_row(f"{length // 1024}k", f"{count:.1f}", str(dense), f"{dense / count:.2f}x")
    return table


def _state(manifest: Manifest) -> Table:
    last = len(manifest.sites) - 1  # the first ones may be exempt from something
    table = Table("tensor", "dtype", "shape", "part", title=f"state of layer {last}")
    prefix = f"layers.{last}."
    for tensor in manifest.state:
        if tensor.name.startswith(prefix):
            shape = ", ".join(map(str, tensor.shape))
            table.add_row(tensor.name.removeprefix(prefix), tensor.dtype, f"({shape})", tensor.part)
    return table


def _programs(manifest: Manifest) -> Table:
    table = Table("program", "inputs", "outputs", "constants", title="programs")
    state = {tensor.name for tensor in manifest.state}
    for name, program in manifest.programs.items():
        given = [name for name in program.inputs if name not in state]
        inputs = f"{', '.join(given)}, and {len(program.inputs) - len(given)} of state"
        table.add_row(name, inputs, ", ".join(program.outputs), str(len(program.constants)))
    return table


def _parts(manifest: Manifest) -> Table:
    table = Table("part", "bytes", "SHA-256", title="parts of the file")
    for name, part in manifest.parts.items():
        table.add_row(name, size_text(part.bytes), part.sha256[:16])
    return table


def _tensor_bytes(tensor: TensorEntry, pages: int) -> int:
    sizes = {"batch": 1, "pages": pages}
    factors = [factor for size in tensor.shape for factor in str(size).split("*")]
    if not all(factor in sizes or factor.isdecimal() for factor in factors):
        raise ArtifactError(
            f"manifest, tensor {tensor.name!r}: shape must be of numbers, batch and pages. Got {list(tensor.shape)}. "
            "The file was changed after the export."
        )
    return math.prod(sizes.get(factor) or int(factor) for factor in factors) * _item_size(tensor.dtype)


def _item_size(name: str) -> int:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(
            f"manifest: dtype must be one of torch's. Got {name!r}. It is of another torch, or damaged."
        )
    return dtype.itemsize


def _ranges(indices: Sequence[int]) -> str:
    """Write sorted numbers shortly: 0, 2-5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
