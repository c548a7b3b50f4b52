"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """Return the version of a distribution, or None: a checkout that is only on the path has none either."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
