"""ottfx: a compiler pass that stores the KV cache of unmodified transformers in 2 bits."""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout `passes/` and `kernels/` stand beside this package; an installed copy holds them inside.
if not (_Path(__file__).parent / "kernels").is_dir() and (_Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from ottfx.api import compile, explain
from ottfx.errors import ArtifactError, CacheError, ConfigError, MatchError, OttfxError
from ottfx.footprint import MemoryFootprint, memory_footprint
from ottfx.kv_tensor import DenseFallbackWarning, KVTensor
from ottfx.registry import register_scheme, scheme_names
from ottfx.report import Report
from ottfx.schemes.base import Scheme, SchemeConfig

if _TYPE_CHECKING:
    from ottfx.artifacts.cache_file import load_cache, save_cache
    from ottfx.artifacts.export_model import export
    from ottfx.artifacts.program import Program, load
    from ottfx.artifacts.program_cache import ProgramCache
    from ottfx.evaluation import evaluate

# What takes a second to import, and few processes need.
_LAZY = {
    "Program": "artifacts.program",
    "ProgramCache": "artifacts.program_cache",
    "evaluate": "evaluation",
    "export": "artifacts.export_model",
    "load": "artifacts.program",
    "load_cache": "artifacts.cache_file",
    "save_cache": "artifacts.cache_file",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ottfx' has no attribute {name!r}")
    return getattr(_importlib.import_module(f"ottfx.{_LAZY[name]}"), name)


__all__ = [
    "ArtifactError",
    "CacheError",
    "ConfigError",
    "DenseFallbackWarning",
    "KVTensor",
    "MatchError",
    "MemoryFootprint",
    "OttfxError",
    "Program",
    "ProgramCache",
    "Report",
    "Scheme",
    "SchemeConfig",
    "compile",
    "evaluate",
    "explain",
    "export",
    "load",
    "load_cache",
    "memory_footprint",
    "register_scheme",
    "save_cache",
    "scheme_names",
]
