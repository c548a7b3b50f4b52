"""Where the kernel tests run: on the GPU if there is one, otherwise in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and torch imports it for its own purposes. So in an ordinary run
without a GPU the tests here are skipped, and `test_kernels_in_interpreter.py` runs them in a process of their own.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "kernel_device" in getattr(item, "fixturenames", ()) and not INTERPRETING and not torch.cuda.is_available():
        pytest.skip("runs in test_kernels_in_interpreter.py")


@pytest.fixture
def kernel_device() -> torch.device:
    """Where a kernel can run in this process."""
    return torch.device("cpu" if INTERPRETING else "cuda")
