"""Compiled graphs on disk: found again by another process, and not found by other sources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import torch
import ottfx, ottfx.graph_compiler
if sys.argv[1:]:
    ottfx.graph_compiler.source_hash = lambda: sys.argv[1]
from plain_decoder import plain_decoder
from torch._dynamo.utils import counters
model = ottfx.compile(plain_decoder(num_layers=1), scheme="none")
with torch.no_grad():
    model(torch.zeros(2, 5, dtype=torch.int64))
# The cache before decomposition: it sees the names of ops. The one behind it sees what they became.
print("hits", counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_the_key_of_a_compiled_graph_holds_the_sources(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_FORCE_DISABLE_CACHES"}
    environment |= {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }

    def hits(*arguments):
        command = [sys.executable, "-c", SCRIPT, *arguments]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return int(output.split("hits ")[1])

    assert hits() == 0
    assert hits() > 0, "a second process starts from the cache"
    assert hits("0123456789ab") == 0, "other sources compile anew"
