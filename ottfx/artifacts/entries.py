"""What manifests and cache files write of a scheme's config and of a dtype, and how it is read again."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ottfx.registry import make_config
from ottfx.schemes.base import SchemeConfig


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's prefix, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def options_of(config: SchemeConfig) -> dict[str, Any]:
    """Return the options that make this config again."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


def config_from_options(scheme: str, options: dict[str, Any]) -> SchemeConfig:
    """Return the config that `options_of` took apart, after a way through JSON.

    Raises:
        ConfigError: the scheme, an option or a value is unknown.
        TypeError: or ValueError: a value has a type that the config does not expect.
    """
    return make_config(scheme, **{name: _hashable(option) for name, option in options.items()})


def _hashable(option: Any) -> Any:
    # JSON makes lists of tuples, and a config must be hashable.
    return tuple(_hashable(item) for item in option) if isinstance(option, list) else option
