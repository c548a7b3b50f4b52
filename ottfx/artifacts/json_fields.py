"""Dataclasses from JSON, with every field and type checked."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ottfx.errors import ArtifactError


def read_fields(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as a `kind`.

    Args:
        kind: a type as annotations write it: a dataclass, `dict[str, X]`, `tuple[X, ...]`, `Literal`, a union of these,
            `int`, `float`, `str`, `bool`, `None` or `Any`.
        value: what `json.loads` returned.
        where: how errors call the value.

    Raises:
        ArtifactError: a field is missing or unknown, or something is not of its type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        for alternative in arguments:
            try:
                return read_fields(alternative, value, where)
            except ArtifactError:
                continue
        raise _wrong(where, " or ".join(map(_name, arguments)), _short(value))
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, f"one of {list(arguments)}", _short(value))
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is dict:
        entries = _of_type(dict, value, where)
        return {key: read_fields(arguments[1], entry, f"{where}, {key!r}") for key, entry in entries.items()}
    if origin is tuple:
        entries = _of_type(list, value, where)
        return tuple(read_fields(arguments[0], entry, f"{where}, number {i}") for i, entry in enumerate(entries))
    return _of_type(kind, value, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    given = _of_type(dict, value, where)
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if set(given) != set(names):
        missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        raise _wrong(where, f"an object with the fields {names}", f"one without {missing}, and with {unknown} besides")
    return kind(**{name: read_fields(hints[name], given[name], f"{where}, {name}") for name in names})


def _of_type(kind: type, value: Any, where: str) -> Any:
    # A bool is an int to Python, and not to us.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(where, _name(kind), _short(value))
    return value


def _name(kind: Any) -> str:
    names = {str: "a string", int: "an integer", bool: "true or false", float: "a number", types.NoneType: "null"}
    names |= {dict: "an object", list: "an array"}
    return names.get(get_origin(kind) or kind, str(kind))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _wrong(where: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(f"{where}: must be {expected}. Got {got}. The file is damaged, or ottfx did not write it.")
