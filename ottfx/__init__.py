"""ottfx: a compiler pass that stores the KV cache of unmodified transformers in 2 bits."""

from pathlib import Path as _Path

# In a checkout `passes/` and `kernels/` stand beside this package; an installed copy holds them inside.
if not (_Path(__file__).parent / "kernels").is_dir() and (_Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from ottfx.api import compile, explain
from ottfx.errors import CacheError, ConfigError, MatchError, OttfxError
from ottfx.footprint import MemoryFootprint, memory_footprint
from ottfx.kv_tensor import DenseFallbackWarning, KVTensor
from ottfx.registry import register_scheme, scheme_names
from ottfx.report import Report
from ottfx.schemes.base import Scheme, SchemeConfig

__all__ = [
    "CacheError",
    "ConfigError",
    "DenseFallbackWarning",
    "KVTensor",
    "MatchError",
    "MemoryFootprint",
    "OttfxError",
    "Report",
    "Scheme",
    "SchemeConfig",
    "compile",
    "explain",
    "memory_footprint",
    "register_scheme",
    "scheme_names",
]
