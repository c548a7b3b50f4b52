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
import ottfx, ottfx.graph_compiler, ottfx.step_graph
if sys.argv[1:]:
    ottfx.graph_compiler.source_hash = lambda: sys.argv[1]
from fake_recorder import recording_on_cpu
from plain_decoder import plain_decoder
from torch._dynamo.utils import counters
model = ottfx.compile(plain_decoder(num_layers=2), scheme="ott", mode="reduce-overhead")
with torch.no_grad(), recording_on_cpu():
    past = model(torch.zeros(2, 5, dtype=torch.int64))[1]
    for _ in range(3):
        past = model(torch.zeros(2, 1, dtype=torch.int64), past)[1]
    assert ottfx.step_graph.counters == {"warmups": 1, "recordings": 1, "replays": 2}
assert not any("bypass" in name for name in [*counters["inductor"], *counters["aot_autograd"]]), counters
# The cache before decomposition: it sees the names of ops. The one behind it sees what they became.
print("hits", counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_the_key_of_a_compiled_graph_is_stable_and_holds_the_sources(tmp_path):
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
    assert hits() == 2, "a second process starts from the cache: the prompt and the recorded step"
    assert hits("0123456789ab") == 0, "other sources compile anew"
