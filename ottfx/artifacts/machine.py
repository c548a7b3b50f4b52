"""What of this machine a compiled program depends on."""

from __future__ import annotations

import platform

import torch

from ottfx.versions import installed_version

PACKAGES = ("ottfx", "torch", "triton", "transformers")

NOT_FOR_COMPILERS = {"aes", "clflush", "clflushopt", "clwb", "fma4", "sha", "sha1", "sha2", "pmull", "sse4a"}
"""Abilities of a CPU that no compiler uses unless the source names them."""


def versions_here() -> dict[str, str]:
    """Return the versions that a manifest records: packages that are installed, and python."""
    versions = {package: installed_version(package) for package in PACKAGES}
    return {name: version for name, version in versions.items() if version} | {"python": platform.python_version()}


def cpu_isa_here() -> str:
    """Return what this CPU can do, such as "x86_64 avx2 avx512_f ...".

    Inductor compiles for the very CPU it runs on (`-march=native`), the host's side of CUDA programs as well.
    """
    abilities = torch.cpu.get_capabilities()
    names = sorted(name for name, value in abilities.items() if value is True and name not in NOT_FOR_COMPILERS)
    return " ".join([str(abilities.get("architecture", platform.machine())), *names])


def compute_capability_here(device: torch.device) -> str:
    """Return that of a CUDA device, such as "9.0"; "" for other devices."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
