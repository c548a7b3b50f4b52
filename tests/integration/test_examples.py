"""Every example runs as it stands, and prints what it promises."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

PROMISES = {
    "quickstart.py": r"2020 tokens\n16-bit cache: \d+ KiB\n2-bit cache:  \d+ KiB, ([3-9]|\d\d)\.\d times smaller\n",
    "torch_compile_backend.py": r"320 tokens in \d+ KiB\n",
    "plain_decoder.py": r"dense: +(\d+ ?){12}\nquantized: (\d+ ?){12}\nbytes: \d+ -> \d+\n",
    "explain.py": r"(?s).*layer|site|attention.*",
}


@pytest.fixture
def backend_is_registered() -> None:
    """Installed, the entry point names the backend; in a checkout that is not installed nothing does."""
    if "ott" not in torch._dynamo.list_backends():
        from ottfx.backend import ott

        torch._dynamo.register_backend(ott, name="ott")


def test_every_example_is_tested_and_short():
    examples = {path.name: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert set(examples) == set(PROMISES)
    assert max(examples.values()) < 60


@pytest.mark.parametrize("name", PROMISES)
def test_example_runs(name, capsys, backend_is_registered):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(PROMISES[name], capsys.readouterr().out)
