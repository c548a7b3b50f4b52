"""`Manifest`: what a file of compiled programs says of itself, as JSON, and whether it can run here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ottfx.artifacts.entries import config_from_options, dtype_name, options_of
from ottfx.artifacts.json_fields import read_fields
from ottfx.artifacts.machine import compute_capability_here, cpu_isa_here
from ottfx.artifacts.program_cache import CacheSite
from ottfx.errors import ArtifactError, ConfigError
from ottfx.schemes.base import ROLES, CacheShape, TensorSpec

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The model that was exported."""

    class_name: str
    config: dict[str, Any] | None
    """`config.to_dict()` of a transformers model; JSON makes the keys of dicts strings."""
    generation_config: dict[str, Any] | None
    takes_mask: bool = True
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """One attention that keeps a cache: a `CacheSite` in JSON."""

    name: str
    scheme: str
    options: dict[str, Any]
    num_kv_heads: int
    head_dim: int
    dtype: str
    schedule: dict[str, tuple[int, ...] | None]
    """"key" and "value" -> (window, step), or None if nothing is packed: `Scheme.packed_length`, for other hosts."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of the cache."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """Sizes; "batch", "pages" and "4*pages" stand for those that a cache chooses."""
    part: str
    fill: int | float
    """What fills new storage."""


@dataclass(frozen=True, kw_only=True)
class ProgramEntry:
    """One compiled program."""

    inputs: tuple[str, ...]
    """In call order."""
    outputs: tuple[str, ...]
    constants: dict[str, str]
    """What AOTInductor calls a constant -> the weight's name."""


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Where the weights are. All but `location` is filled in by `ottfx.artifacts.archive.write_archive`."""

    location: Literal["inside", "external"] = "inside"
    file: str = ""
    """The member of the archive, or the name of the file beside it."""
    sha256: str = ""
    bytes: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    """Name -> the name under which the same tensor is stored."""
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of tensors that were not contiguous: programs are compiled for the strides of their constants."""


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """One member of the archive."""

    sha256: str
    """See `ottfx.artifacts.part_hash`."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about a file of compiled programs without loading them."""

    format_version: int = FORMAT_VERSION
    versions: dict[str, str]
    """Packages, and python, with which it was made; `versions_here`."""
    device_type: str
    compute_capability: str = ""
    """Of the GPU, such as "9.0"; "" if the programs are bound to none."""
    cpu_isa: str = ""
    """What the host's CPU must be able to do, as `cpu_isa_here` writes it; "" if nothing in particular."""
    dtype: str
    """Of the model's keys and values."""
    model: ModelEntry
    sites: tuple[SiteEntry, ...]
    state: tuple[TensorEntry, ...]
    """Every tensor of the cache, in the order in which programs take them; `state_entries`."""
    programs: dict[str, ProgramEntry]
    weights: WeightsEntry = field(default_factory=WeightsEntry)
    parts: dict[str, PartEntry] = field(default_factory=dict)
    """Every member of the archive but the manifest; filled in by `ottfx.artifacts.archive.write_archive`."""

    def to_json(self) -> str:
        """Return the manifest as JSON text.

        Raises:
            ConfigError: the model's config holds something that JSON cannot.
        """
        try:
            return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"ottfx.export: a manifest must be made of what JSON knows. Got: {error}. "
                "Look for it in the model's config or generation config."
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "manifest") -> Manifest:
        """Read a manifest.

        Args:
            text: what `to_json` returned.
            where: how errors call it.

        Raises:
            ArtifactError: not JSON, of another format version, or a field is missing, unknown or of another type.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{where}: must be JSON. Got: {error}. The file is damaged, or ottfx.export did not write it."
            ) from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION or type(version) is not int:
            raise ArtifactError(
                f"{where}: format_version must be {FORMAT_VERSION}, which this ottfx reads. Got {version!r}. "
                "Export the model again, or install the ottfx that wrote it."
            )
        manifest: Manifest = read_fields(cls, value, where)
        return manifest

    def check_here(self, device: torch.device | str | None = None) -> None:
        """Raise unless the programs can run in this process.

        Args:
            device: where they shall run; None for the current device of their type.

        Raises:
            ArtifactError: they were made for another format, torch, device or CPU, or for a cache that the schemes here
                store in another way.
        """
        place = torch.device(device or self.device_type)
        _require_same("format version", str(self.format_version), str(FORMAT_VERSION))
        _require_same("torch", _minor(self.versions.get("torch", "an unknown release")), _minor(torch.__version__))
        if place.type != self.device_type:
            raise ArtifactError(
                f"ottfx.load: device must be of the type {self.device_type!r}, for which the programs were made. "
                f"Got {str(place)!r}. Load them there, or export the model again for {place.type!r}."
            )
        if place.type == "cuda":
            if not torch.cuda.is_available():
                raise ArtifactError(
                    "ottfx.load: the programs were made for a CUDA device, and torch finds none here. Load them on a "
                    "machine that has one, or export the model again for the CPU."
                )
            if self.compute_capability:
                _require_same("compute capability", self.compute_capability, compute_capability_here(place))
        missing = [ability for ability in self.cpu_isa.split() if ability not in cpu_isa_here().split()]
        if missing:
            raise ArtifactError(
                f"ottfx.load: the programs were made for a CPU with {', '.join(missing)}, which the one here lacks. "
                "Export the model again here."
            )
        self._check_state()

    def _check_state(self) -> None:
        sites = [site_from_entry(entry) for entry in self.sites]
        for entry, site in zip(self.sites, sites, strict=True):
            _require_same(f"schedule of {entry.name!r}", str(entry.schedule), str(entry_from_site(site).schedule))
        here = state_entries(sites)
        for number in range(max(len(here), len(self.state))):
            built = self.state[number] if number < len(self.state) else "none"
            mine = here[number] if number < len(here) else "none"
            _require_same(f"tensor {number} of the cache", str(built), str(mine))


def _require_same(what: str, built: str, here: str) -> None:
    """Raise ArtifactError unless what the programs were made for is what is here."""
    if built != here:
        raise ArtifactError(
            f"ottfx.load: the programs were made for {what} {built}. Here it is {here}. "
            "Export the model again here, or load it where it was made."
        )


def entry_from_site(site: CacheSite) -> SiteEntry:
    """Return a site in the form that the manifest keeps."""
    return SiteEntry(
        name=site.name,
        scheme=site.config.scheme,
        options=options_of(site.config),
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        dtype=dtype_name(site.dtype),
        schedule={role: site.scheme.schedule(site.config, role) for role in ROLES},
    )


def site_from_entry(entry: SiteEntry) -> CacheSite:
    """Return the site that `entry` describes.

    Raises:
        ArtifactError: its scheme or dtype is unknown here, or the scheme takes no such options or no such heads.
    """
    where = f"ottfx.load: cache of {entry.name!r}"
    advice = "Install the ottfx, or the package, that has it, or export the model again here."
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{where}: dtype must be one of torch's. Got {entry.dtype!r}. {advice}")
    # TypeError and ValueError: a value of a type that a scheme's config does not expect.
    try:
        config = config_from_options(entry.scheme, entry.options)
    except (ConfigError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: scheme {entry.scheme!r} must be known here, with its options. "
            f"Got: {str(error).rstrip('.')}. {advice}"
        ) from error
    site = CacheSite(
        name=entry.name, config=config, num_kv_heads=entry.num_kv_heads, head_dim=entry.head_dim, dtype=dtype
    )
    reason = site.scheme.check(config, _one_page(site))
    if reason is not None:
        raise ArtifactError(f"{where}: must be one that {config.describe()} can store; {reason}. {advice}")
    return site


def state_entries(sites: Sequence[CacheSite]) -> tuple[TensorEntry, ...]:
    """Return the layout of every tensor of `ProgramCache.allocate(sites, ...)`, named and ordered as there."""
    return tuple(
        TensorEntry(
            name=f"layers.{index}.{role}.{name}",
            dtype=dtype_name(spec.dtype),
            shape=_symbolic_shape(spec),
            part=spec.part,
            fill=spec.fill,
        )
        for index, site in enumerate(sites)
        for role in ROLES
        for name, spec in site.scheme.state_spec(site.config, role, _one_page(site)).items()
    )


def _one_page(site: CacheSite) -> CacheShape:
    return CacheShape(
        batch_size=1,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        pages=1,
        dtype=site.dtype,
        device=torch.device("cpu"),
    )


def _symbolic_shape(spec: TensorSpec) -> tuple[int | str, ...]:
    """Name the sizes of a tensor of one sequence and one page that a cache chooses."""
    shape: list[int | str] = ["batch", *spec.shape[1:]]
    if spec.paged_dim is not None:
        factor = spec.shape[spec.paged_dim]
        shape[spec.paged_dim] = "pages" if factor == 1 else f"{factor}*pages"
    return tuple(shape)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
