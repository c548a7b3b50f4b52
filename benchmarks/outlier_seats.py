"""What attention loses along a long text, by who is kept out of the groups: the pool of `ott+`, or seats in each page.

`python -m benchmarks.outlier_seats` takes minutes on a CPU. Dense runs of the model leave keys and values, and the last
64 queries of each quarter of the text; of some layers each is stored as `ott+` does, 128 tokens at a time, and read
back at the end of each quarter. No kernel knows seats in pages: a row `page seats n` takes the n tokens of each page
whose keys have the least L1 norm for outliers, `below .6` only those that have less than .6 times the mean norm of
their page. They are kept in 8 bits.

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

from benchmarks.packed_state import empty_halves, lengths, operands
from benchmarks.results import FOLDER, as_text, conditions, write_results
from ottfx.cache_fidelity import attention_output, attention_weights
from ottfx.dense_run import AskedLayer, run_dense
from ottfx.eval_command import load_model
from ottfx.evaluate import default_text
from ottfx.metrics import kl_divergence
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import PAGE
from ottfx.window_rows import decode_rows, encode_rows

EVERY_LAYER = 4
QUARTERS = range(1, 5)
NO_POOL = {"outlier_capacity": 0, "spill_capacity": 0}
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


@dataclass(frozen=True, kw_only=True)
class Way:
    """Who is kept out of the groups: options of the pool, or tokens of each page."""

    name: str
    options: dict[str, Any]
    page_seats: int = 0
    below: float = float("inf")


WAYS = (
    Way(name="ott+", options={}),
    Way(name="no pool", options=NO_POOL),
    Way(name="spill_capacity=32", options={"spill_capacity": 32}),
    Way(name="outlier_capacity=8 spill_capacity=32", options={"outlier_capacity": 8, "spill_capacity": 32}),
    Way(name="page seats 1", options=NO_POOL, page_seats=1),
    Way(name="page seats 2", options=NO_POOL, page_seats=2),
    Way(name="page seats 4", options=NO_POOL, page_seats=4),
    Way(name="page seats 2, below .6", options=NO_POOL, page_seats=2, below=0.6),
)


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
        get_scheme("ott+").append_op(*new, None, lengths(halves), 0, *operands(halves))
        for half in halves:
            half.advance(half.high + PAGE)
        if halves[0].high % (tokens // 4) == 0:
            key, value = (half.read(half.high)[0] for half in halves)
            read.append((key, value))
    return read


def page_outliers(key: Tensor, way: Way) -> Tensor:
    """Say which tokens have a seat in their page: bool [num_kv_heads, tokens, 1]."""
    norm = key.abs().sum(-1).unflatten(1, (-1, PAGE))
    lowest = norm.topk(way.page_seats, dim=-1, largest=False).indices
    seated = torch.zeros_like(norm, dtype=torch.bool).scatter(-1, lowest, True)
    return (seated & (norm < way.below * norm.mean(-1, keepdim=True))).flatten(1).unsqueeze(-1)


def with_page_seats(layer: Layer, way: Way) -> tuple[list[Rows], float]:
    """Return what a cache with seats in pages gives back, as `given_back`, and how many of a page are taken."""
    key, value = layer.rows
    seated = page_outliers(key, way)
    others = ~seated.unflatten(1, (-1, PAGE))

    def without(rows: Tensor) -> Tensor:
        paged = rows.unflatten(1, (-1, PAGE))
        mean = (paged * others).sum(2, keepdim=True) / others.sum(2, keepdim=True)
        return torch.where(others, paged, mean).flatten(1, 2)

    def seat(exact: Tensor, read: Tensor) -> Tensor:
        held = read.shape[1]
        return torch.where(seated[:, :held], decode_rows(*encode_rows(exact[:, :held])), read)

    read = given_back(layer.index, way.options, (without(key), without(value)))
    both = [(seat(key, read_key), seat(value, read_value)) for read_key, read_value in read]
    return both, seated.sum().item() / (others.numel() / PAGE)


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


def measure(layers: Sequence[Layer], way: Way) -> dict[str, Any]:
    """Measure one way, as the mean over layers."""
    taken, found = 0.0, []
    for layer in layers:
        if way.page_seats:
            read, of_page = with_page_seats(layer, way)
            taken += of_page / len(layers)
        else:
            read = given_back(layer.index, way.options, layer.rows)
        found.append(losses(layer, read))
    columns: dict[str, Any] = {"way": way.name, "taken_of_a_page": taken if way.page_seats else None}
    for number, name in enumerate(("kl", "error")):
        means = torch.tensor([loss[number] for loss in found]).mean(0).tolist()
        columns |= {f"{name}_q{quarter}": mean for quarter, mean in zip(QUARTERS, means, strict=True)}
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
    for way in WAYS:
        rows.append(measure(layers, way))
        print(", ".join(f"{name} {as_text(value)}" for name, value in rows[-1].items()), flush=True)
        notes = [f"{options.model}, {options.tokens} tokens, float32, layers {[layer.index for layer in layers]}."]
        write_results(options.out, rows, conditions("cpu"), notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
