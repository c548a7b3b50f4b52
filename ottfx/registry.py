"""The schemes that ottfx knows: those in `ottfx.schemes`, and those that other packages register.

A package adds its own by an entry point in the group "ottfx.schemes" whose value is a `Scheme` class, or a module that
calls `register_scheme` when it is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ottfx.errors import ConfigError
from ottfx.schemes import MODULES
from ottfx.schemes.base import Scheme, SchemeConfig

ENTRY_POINT_GROUP = "ottfx.schemes"

SchemeClass = TypeVar("SchemeClass", bound=type[Scheme])

_schemes: dict[str, Scheme] = {}
_discovered = False


def register_scheme(scheme_class: SchemeClass) -> SchemeClass:
    """Make a scheme available under its `name`; a class decorator.

    Raises:
        ConfigError: the name is taken by another class, or the config class does not carry it.
    """
    name = scheme_class.name
    known = _schemes.get(name)
    if known is not None and type(known) is not scheme_class:
        raise ConfigError(
            f"ottfx.register_scheme: name must be unique. Got {name!r}, which is {type(known).__module__}."
            f"{type(known).__qualname__}. Choose another name."
        )
    if scheme_class.config_class.scheme != name:
        raise ConfigError(
            f"ottfx.register_scheme: {scheme_class.config_class.__name__}.scheme must be {name!r}. "
            f"Got {scheme_class.config_class.scheme!r}. Set both to the same name."
        )
    _schemes.setdefault(name, scheme_class())
    return scheme_class


def scheme_names() -> list[str]:
    """Return the names of all schemes, sorted."""
    _discover()
    return sorted(_schemes)


def get_scheme(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        ConfigError: no scheme has it; the text lists those that exist.
    """
    _discover()
    if name not in _schemes:
        raise ConfigError(f"ottfx: scheme must be one of {scheme_names()}. Got {name!r}.")
    return _schemes[name]


def make_config(scheme: str | SchemeConfig, bits: int | None = None, **options: Any) -> SchemeConfig:
    """Return the config of a scheme.

    Args:
        scheme: a scheme's name, or a config, which is returned as it is.
        bits: width of a code, or None for the scheme's default.
        **options: other fields of the scheme's config.

    Raises:
        ConfigError: no such scheme or option, a value that cannot work, or options beside a config.
    """
    given = {**({} if bits is None else {"bits": bits}), **options}
    if isinstance(scheme, SchemeConfig):
        if given:
            raise ConfigError(
                f"ottfx: options must be in the config when scheme is one. Got {scheme.describe()} and {given!r}. "
                f"Write them as {type(scheme).__name__}(...)."
            )
        return scheme
    config_class = get_scheme(scheme).config_class
    valid = [field.name for field in dataclasses.fields(config_class) if field.init]
    unknown = sorted(set(given) - set(valid))
    if unknown:
        raise ConfigError(f"ottfx: options of scheme {scheme!r} must be among {valid}. Got {', '.join(unknown)}.")
    return config_class(**given)


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    # Set first: a scheme's module may ask the registry while it is imported.
    _discovered = True
    for module in MODULES:
        importlib.import_module(f"ottfx.schemes.{module}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        loaded = entry.load()
        if inspect.isclass(loaded) and issubclass(loaded, Scheme):
            register_scheme(loaded)
