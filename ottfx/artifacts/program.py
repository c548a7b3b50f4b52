"""`Program`: a model that `ottfx.export` compiled, loaded from its file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottfx.artifacts.archive import Archive, read_archive
from ottfx.artifacts.manifest import Manifest, site_from_entry
from ottfx.artifacts.program_cache import CacheSite, ProgramCache
from ottfx.errors import CacheError, ConfigError


def load(path: str | Path, device: torch.device | str | None = None, *, verify: bool = True) -> Program:
    """Open an artifact.

    An artifact is native code: load only files whose origin you trust. Nothing in it is unpickled, and its checksums
    show damage, not who wrote it.

    Args:
        path: what `ottfx.export` wrote; external weights lie beside it.
        device: of the kind that it was exported for; by default the current one of that kind.
        verify: compare every part with its SHA-256 first.

    Raises:
        ArtifactError: the file is damaged, or was made for another device, torch, or version of its format.
    """
    archive = read_archive(path, verify=verify)
    where = torch.device(device if device is not None else archive.manifest.device_type)
    archive.manifest.check_here(where)
    return Program(archive, where)


class Program:
    """A loaded model with programs for prompts and for single tokens, over caches that it makes.

    Attributes:
        manifest: what the file says of itself.
        device: where it runs.
        sites: the attentions with a cache, one for each layer.
    """

    def __init__(self, archive: Archive, device: torch.device) -> None:
        self.manifest: Manifest = archive.manifest
        self.device = device
        self.sites: tuple[CacheSite, ...] = tuple(site_from_entry(entry) for entry in self.manifest.sites)
        self._archive = archive
        weights = _to_device(archive.weights(), device)
        index: int | None = device.index
        where = -1 if index is None else index
        self._runners: dict[str, Any] = {}
        for name, entry in self.manifest.programs.items():
            runner = torch._C._aoti.AOTIModelPackageLoader(str(archive.path), name, False, 1, where)
            # The programs share the tensors: none copies them.
            runner.load_constants({key: weights[value] for key, value in entry.constants.items()}, False, True, True)
            self._runners[name] = runner
        # The runners do not keep them alive.
        self._weights = weights

    def __repr__(self) -> str:
        return (
            f"Program({self.manifest.model.class_name}, device='{self.device}', layers={len(self.sites)}, "
            f"stored={self.sites[0].config.describe()})"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was exported along, or None. Needs transformers."""
        names = [name for name in self._archive.names() if name.startswith("tokenizer/")]
        if not names:
            return None
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="ottfx-tokenizer-") as folder:
            for name in names:
                (Path(folder) / Path(name).name).write_bytes(self.read(name))
            return AutoTokenizer.from_pretrained(folder)

    def read(self, name: str) -> bytes:
        """Return one part of the file, such as `tokenizer/tokenizer.json`."""
        return self._archive.read(name)

    def new_cache(self, batch_size: int, max_length: int = 0) -> ProgramCache:
        """Make an empty cache for `batch_size` sequences, with room for `max_length` tokens; it grows by itself."""
        return ProgramCache.allocate(self.sites, batch_size, max_length, self.device)

    def prefill(self, input_ids: Tensor, cache: ProgramCache, attention_mask: Tensor | None = None) -> Tensor:
        """Append tokens to a cache, empty or not.

        Args:
            input_ids: int64 [batch, q_len].
            cache: from `new_cache`; it is written.
            attention_mask: int64 or bool [batch, cache.length + q_len], 0 for padding, on the left; all real if None.

        Returns:
            Logits of the last position, [batch, 1, vocabulary].

        Raises:
            ConfigError: shapes or devices that do not fit each other.
            CacheError: the cache is another program's.
        """
        self._check(input_ids, cache)
        past = cache.length
        batch, q_len = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + q_len, dtype=torch.int64, device=self.device)
        if attention_mask.shape != (batch, past + q_len):
            raise ConfigError(
                f"ottfx.Program: attention_mask must be [batch, stored + new tokens] = {[batch, past + q_len]}. "
                f"Got {list(attention_mask.shape)}."
            )
        cache.make_room(past + q_len)
        inputs = [
            _aligned(input_ids.to(torch.int64)),
            _aligned(attention_mask.to(self.device, torch.int64)),
            torch.empty(past, 0, dtype=torch.uint8, device=self.device),
            cache.lengths(),
            *cache.tensors().values(),
        ]
        name = "decode" if q_len == 1 else "extend" if past else "prefill"
        (logits,) = self._runners[name].boxed_run(inputs)
        cache.advance(past + q_len)
        return logits

    def decode(self, input_ids: Tensor, cache: ProgramCache, attention_mask: Tensor | None = None) -> Tensor:
        """Append one token, input_ids [batch, 1]; otherwise as `prefill`."""
        if input_ids.dim() != 2 or input_ids.shape[1] != 1:
            raise ConfigError(f"ottfx.Program.decode: input_ids must be [batch, 1]. Got {list(input_ids.shape)}.")
        return self.prefill(input_ids, cache, attention_mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Generate as transformers' `generate` does, with its options; see `program_generation.generate`."""
        from ottfx.artifacts.program_generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def _check(self, input_ids: Tensor, cache: ProgramCache) -> None:
        if not isinstance(cache, ProgramCache):
            raise ConfigError(
                f"ottfx.Program: cache must be a ProgramCache, from new_cache or ottfx.load_cache. "
                f"Got {type(cache).__name__}."
            )
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
            raise ConfigError(
                "ottfx.Program: input_ids must be token ids [batch, q_len], q_len at least 1. "
                f"Got {input_ids.dtype} {list(input_ids.shape)}."
            )
        if input_ids.shape[0] != cache.batch_size:
            raise ConfigError(
                f"ottfx.Program: input_ids and cache must have the same batch size. Got {input_ids.shape[0]} and "
                f"{cache.batch_size}."
            )
        if input_ids.device.type != self.device.type:
            raise ConfigError(f"ottfx.Program: input_ids must be on {self.device}. Got {input_ids.device}.")
        if cache.device.type != self.device.type or not _same_storage(cache, self.sites):
            raise CacheError(
                f"ottfx.Program: cache must be one of this program's, on {self.device}. Got {cache!r}. "
                "Make it with program.new_cache(batch_size)."
            )


def _aligned(tensor: Tensor) -> Tensor:
    # Programs expect what the allocator gives. A column of a larger tensor begins anywhere, and they would warn.
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _to_device(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    # Tied weights are one tensor under two names.
    moved = {id(tensor): tensor.to(device) for tensor in weights.values()}
    return {name: moved[id(tensor)] for name, tensor in weights.items()}


def _same_storage(cache: ProgramCache, sites: tuple[CacheSite, ...]) -> bool:
    return len(cache.layers) == len(sites) and all(
        (half.config, half.shape.num_kv_heads, half.shape.head_dim, half.shape.dtype)
        == (site.config, site.num_kv_heads, site.head_dim, site.dtype)
        for layer, site in zip(cache.layers, sites, strict=True)
        for half in layer
    )
