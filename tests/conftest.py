"""What every test gets: a seed, one thread, no compiler caches, no network, and a `gpu` marker that skips."""

import os

# Read when torch and huggingface_hub are imported, so they are set first.
# Inductor's cache key does not see the body of an operator: with the cache on, an edited operator runs its old code.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Several test processes share the cores of a small machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seed the generators, and forget the graphs and the modes that the test before left."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    default_dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == default_dtype, "the test left another default dtype"
    assert torch.is_grad_enabled(), "the test left grad mode off"


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported Llama of one layer, scheme ott with an outlier pool in that layer. It takes minutes.

    Modules that use it carry `pytest.mark.xdist_group("artifact")`, so that one test process makes it.
    """
    from byte_tokenizer import byte_tokenizer
    from tiny_models import tiny_model

    import ottfx

    if torch.__version__ < "2.12" and not torch.cuda.is_available():
        pytest.skip("artifacts for the CPU need torch 2.12")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=256).to(device)
    path = tmp_path_factory.mktemp("artifact") / "tiny.pt2"
    return ottfx.export(model, path, bits=2, scheme="ott", exempt_layers=(), tokenizer=byte_tokenizer())


@pytest.fixture
def device() -> torch.device:
    """The best device here: CUDA if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def load_smollm2() -> Callable[[torch.dtype], tuple[Any, Any]]:
    """Loads the demo's real model and its tokenizer; skips the test where the weights cannot be had."""
    from ottfx.errors import ArtifactError
    from ottfx.models import load_smollm2

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        try:
            return load_smollm2(dtype)
        except ArtifactError as error:
            pytest.skip(str(error))

    return load


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill uninitialized memory (NaN, or the largest integer), so that reading an unwritten element shows."""
    enabled, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
