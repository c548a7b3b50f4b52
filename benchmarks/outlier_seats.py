"""What attention loses along a long text, by who is kept out of the groups: those with a seat, or with one in a pool.

`python -m benchmarks.outlier_seats` takes minutes on a CPU. Dense runs of the model leave keys and values, and the last
64 queries of each quarter of the text; of some layers each is stored as `ott+` does, 128 tokens at a time, and read
back at the end of each quarter.

`kl_q1` .. `kl_q4`: KL of the attention weights from the dense ones, mean over the queries at the end of the text's
first quarter, and so on; `error_q1` .. `error_q4`: relative squared error of the attention output of the same queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.packed_state import append_tokens, empty_halves
from benchmarks.results import FOLDER, as_text, conditions, write_results
from ottfx.cache_fidelity import attention_output, attention_weights
from ottfx.dense_run import AskedLayer, run_dense
from ottfx.eval_command import load_model
from ottfx.evaluation import default_text
from ottfx.metrics import kl_divergence
from ottfx.registry import make_config
from ottfx.schemes.base import PAGE

EVERY_LAYER = 4
QUARTERS = range(1, 5)
Rows = tuple[Tensor, Tensor]
"""Keys and values, [num_kv_heads, tokens, head_dim]."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What dense runs leave of a layer."""

    index: int
    at_quarters: Sequence[AskedLayer]
    """At the end of each quarter of the text; the last has all keys and values."""

    @property
    def rows(self) -> Rows:
        """Keys and values of the whole text."""
        return self.at_quarters[-1].key, self.at_quarters[-1].value


WAYS: dict[str, dict[str, int]] = {
    "ott+": {},
    "seats 2": {"group_seats": 2},
    "seats 4": {"group_seats": 4},
    "nobody": {"group_seats": 0},
    "pool 3+3": {"group_seats": 0, "outlier_capacity": 3, "spill_capacity": 3},
    "pool 3+32": {"group_seats": 0, "outlier_capacity": 3, "spill_capacity": 32},
    "pool 8+32": {"group_seats": 0, "outlier_capacity": 8, "spill_capacity": 32},
}
"""Name -> options of `ott+`."""


def dense_layers(model: Any, ids: Tensor) -> list[Layer]:
    """Run a model without a quantized cache on one quarter of a text, on two, and so on; return some of its layers."""
    tokens = ids.shape[1]
    runs = [run_dense(model, ids[:, : tokens * quarter // 4])[::EVERY_LAYER] for quarter in QUARTERS]
    return [
        Layer(index=number * EVERY_LAYER, at_quarters=asked)
        for number, asked in enumerate(zip(*runs, strict=True))
        if asked[-1].key.shape[1] == tokens
    ]


def given_back(index: int, options: dict[str, Any], rows: Rows) -> list[Rows]:
    """Store keys and values as `ott+` does in a layer, and return what is read at the end of each quarter."""
    config = make_config("ott+", 2, **options).at_layer(index)
    num_kv_heads, tokens, head_dim = rows[0].shape
    halves = empty_halves(
        config, batch_size=1, num_kv_heads=num_kv_heads, head_dim=head_dim, room=tokens, dtype=rows[0].dtype,
        device="cpu",
    )  # fmt: skip
    read: list[Rows] = []
    for new in zip(*(half.unsqueeze(0).split(PAGE, 2) for half in rows), strict=True):
        append_tokens(halves, *new)
        if halves[0].high % (tokens // 4) == 0:
            key, value = (half.read(half.high)[0] for half in halves)
            read.append((key, value))
    return read


def losses(layer: Layer, read: Sequence[Rows]) -> tuple[list[float], list[float]]:
    """Return KL of the weights and error of the output in each quarter, of what is read instead of the layer's own."""
    kl, error = [], []
    for asked, rows in zip(layer.at_quarters, read, strict=True):
        pairs = (asked.key, asked.value), rows
        dense, other = (attention_weights(asked, keys).clamp(min=torch.finfo().tiny).log() for keys, _ in pairs)
        output, approximation = (attention_output(asked, *pair) for pair in pairs)
        kl.append(kl_divergence(dense, other).mean().item())
        error.append(((approximation - output).square().sum() / output.square().sum()).item())
    return kl, error


def measure(layers: Sequence[Layer], name: str) -> dict[str, Any]:
    """Measure one way, as the mean over layers."""
    found = [losses(layer, given_back(layer.index, WAYS[name], layer.rows)) for layer in layers]
    columns: dict[str, Any] = {"way": name}
    for number, loss_name in enumerate(("kl", "error")):
        means = torch.tensor([loss[number] for loss in found]).mean(0).tolist()
        columns |= {f"{loss_name}_q{quarter}": mean for quarter, mean in zip(QUARTERS, means, strict=True)}
    return columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all ways, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192, help="a multiple of 512")
    parser.add_argument("--out", type=Path, default=FOLDER / "outlier-seats", help="results files, without suffix")
    options = parser.parse_args(arguments)
    if options.tokens <= 0 or options.tokens % 512:
        parser.error(f"--tokens must be a positive multiple of 512. Got {options.tokens}.")
    model, tokenizer = load_model(options.model, "float32")
    ids = torch.tensor([tokenizer(default_text())["input_ids"][: options.tokens]])
    layers = dense_layers(model, ids)
    rows: list[dict[str, Any]] = []
    for name in WAYS:
        rows.append(measure(layers, name))
        print(", ".join(f"{column} {as_text(value)}" for column, value in rows[-1].items()), flush=True)
        notes = [f"{options.model}, {options.tokens} tokens, float32, layers {[layer.index for layer in layers]}."]
        write_results(options.out, rows, conditions("cpu"), notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
