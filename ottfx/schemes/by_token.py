"""What `turbo` and `polar` share: each token is a code of its own, after a random rotation (docs/storage.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ottfx.errors import ConfigError
from ottfx.schemes.base import CacheShape, Role, Scheme, SchemeConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class ByTokenConfig(SchemeConfig):
    """Options of a scheme that rotates a token at random and quantizes it on its own."""

    seed: int = 0
    """Of the random rotation, which all layers, heads and tokens share. A cache can be read only with its own seed."""

    def __post_init__(self) -> None:
        """Check every value."""
        seed: Any = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise ConfigError(f"ottfx.{self.scheme}: seed must be a number in [0, 2**31). Got seed={self.seed!r}.")

    def describe_seed(self) -> str:
        """Return what a description says of the seed: nothing if it is the default."""
        return f", seed {self.seed}" if self.seed else ""


Config = TypeVar("Config", bound=ByTokenConfig)


class ByTokenScheme(Scheme[Config]):
    """A scheme without a window: all stored tokens are codes, and a rewind only forgets."""

    head_multiple = 16
    """What head_dim must be a multiple of."""

    def check(self, config: Config, shape: CacheShape) -> str | None:
        """Say why a site of this shape cannot be stored, or None."""
        if shape.dtype not in DTYPES:
            return f"dtype must be float16, bfloat16 or float32, got {str(shape.dtype).removeprefix('torch.')}"
        if shape.head_dim % self.head_multiple:
            return f"head_dim must be a multiple of {self.head_multiple}, got {shape.head_dim}"
        return None

    def schedule(self, config: Config, role: Role) -> tuple[int, int]:
        """Every token is packed at once."""
        return 0, 1

    def rewind(
        self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        """Nothing to do: later tokens are overwritten."""
        return min(packed, length)
