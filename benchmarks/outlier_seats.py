"""What attention loses along a long text, by who is kept out of the groups: the pool of `ott+`, or seats in each page.

`python -m benchmarks.outlier_seats` takes minutes on a CPU. A dense run of the model leaves keys, values and some of
the queries; of some layers each is stored as `ott+` does, 128 tokens at a time, and read back. No kernel knows seats in
pages: a row `page seats n` takes the n tokens of each page whose keys have the least L1 norm for outliers, `below .6`
only those that have less than .6 times the mean norm of their page. They are kept in 8 bits.

`kl_q1` .. `kl_q4`: KL of the attention weights from the dense ones, mean over queries of the last eighth of the text's
first quarter, and so on; `error_q1` .. `error_q4`: relative squared error of the attention output of the same queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.packed_state import lengths, operands
from benchmarks.results import FOLDER, conditions, write_results
from ottfx.cache_state import CacheHalf
from ottfx.eval_command import load_model
from ottfx.evaluate import default_text
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import PAGE, ROLES, CacheShape
from ottfx.window_rows import decode_rows, encode_rows

EVERY_QUERY = 16
EVERY_LAYER = 4
NO_POOL = {"outlier_capacity": 0, "spill_capacity": 0}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a dense run leaves of a layer."""

    index: int
    query: Tensor
    """[1, num_heads, tokens / EVERY_QUERY, head_dim]."""
    key: Tensor
    """[1, num_kv_heads, tokens, head_dim]; `value` alike."""
    value: Tensor


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


@contextmanager
def seen_queries(model: Any) -> Iterator[dict[int, Tensor]]:
    """Keep the queries of every layer that runs in the block, by its index."""
    queries: dict[int, Tensor] = {}

    def attention(module: Any, query: Tensor, *rest: Any, **options: Any) -> Any:
        queries[module.layer_idx] = query[:, :, ::EVERY_QUERY].clone()
        return sdpa_attention_forward(module, query, *rest, **options)

    before = model.config._attn_implementation
    AttentionInterface.register("seen_queries", attention)
    model.set_attn_implementation("seen_queries")
    try:
        yield queries
    finally:
        model.set_attn_implementation(before)


def dense_layers(model: Any, ids: Tensor) -> list[Layer]:
    """Run a model without a quantized cache, and return some of its layers."""
    with torch.no_grad(), seen_queries(model) as queries:
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    chosen = range(0, len(past.layers), EVERY_LAYER)
    return [Layer(index=i, query=queries[i], key=past.layers[i].keys, value=past.layers[i].values) for i in chosen]


def given_back(layer: Layer, options: dict[str, Any], key: Tensor, value: Tensor) -> list[Tensor]:
    """Store keys and values as `ott+` does, and return what is read."""
    config = make_config("ott+", 2, **options).at_layer(layer.index)
    scheme = get_scheme("ott+")
    batch_size, num_kv_heads, tokens, head_dim = key.shape
    shape = CacheShape(
        batch_size=batch_size, num_kv_heads=num_kv_heads, head_dim=head_dim,
        pages=scheme.pages_needed(config, tokens), dtype=key.dtype, device=key.device,
    )  # fmt: skip
    key_half, value_half = (CacheHalf.allocate(scheme, config, role, shape) for role in ROLES)
    halves = key_half, value_half
    for start in range(0, tokens, PAGE):
        new = key[:, :, start : start + PAGE], value[:, :, start : start + PAGE]
        scheme.append_op(*new, None, lengths(halves), 0, *operands(halves))
        for half in halves:
            half.advance(min(start + PAGE, tokens))
    return [half.read(tokens) for half in halves]


def page_outliers(key: Tensor, way: Way) -> Tensor:
    """Say which tokens have a seat in their page: bool [1, num_kv_heads, tokens, 1]."""
    norm = key.abs().sum(-1).unflatten(2, (-1, PAGE))
    lowest = norm.topk(way.page_seats, dim=-1, largest=False).indices
    seated = torch.zeros_like(norm, dtype=torch.bool).scatter(-1, lowest, True)
    return (seated & (norm < way.below * norm.mean(-1, keepdim=True))).flatten(2).unsqueeze(-1)


def with_page_seats(layer: Layer, way: Way) -> tuple[list[Tensor], float]:
    """Return keys and values that a cache with seats in pages gives back, and how many of a page are taken."""
    seated = page_outliers(layer.key, way)
    others = ~seated.unflatten(2, (-1, PAGE))

    def without(rows: Tensor) -> Tensor:
        paged = rows.unflatten(2, (-1, PAGE))
        mean = (paged * others).sum(3, keepdim=True) / others.sum(3, keepdim=True)
        return torch.where(others, paged, mean).flatten(2, 3)

    exact = [decode_rows(*encode_rows(rows)) for rows in (layer.key, layer.value)]
    read = given_back(layer, way.options, without(layer.key), without(layer.value))
    both = [torch.where(seated, *pair) for pair in zip(exact, read, strict=True)]
    return both, seated.sum().item() / (others.numel() / PAGE)


def losses(layer: Layer, key: Tensor, value: Tensor) -> tuple[list[float], list[float]]:
    """Return KL of the weights and error of the output in each quarter, against the layer's own keys and values."""
    tokens, groups = layer.key.shape[2], layer.query.shape[1] // layer.key.shape[1]
    position = torch.arange(0, tokens, EVERY_QUERY)
    kl, error = [], []
    for quarter in range(1, 5):
        end = tokens * quarter // 4
        mine = (position >= end - tokens // 8) & (position < end)
        hidden = torch.arange(end) > position[mine].unsqueeze(-1)

        def attend(keys: Tensor, values: Tensor, mine: Tensor, hidden: Tensor, end: int) -> tuple[Tensor, Tensor]:
            query = layer.query[:, :, mine].float()
            keys, values = (rows[:, :, :end].float().repeat_interleave(groups, 1) for rows in (keys, values))
            scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
            logarithm = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
            return logarithm, logarithm.exp() @ values

        (dense, output), (other, approximation) = (
            attend(*rows, mine, hidden, end) for rows in ((layer.key, layer.value), (key, value))
        )
        difference = torch.where(hidden, 0.0, dense - other)
        kl.append((dense.exp() * difference).sum(-1).mean().item())
        error.append(((approximation - output).square().sum() / output.square().sum()).item())
    return kl, error


def measure(layers: Sequence[Layer], way: Way) -> dict[str, Any]:
    """Measure one way, as the mean over layers."""
    taken, found = 0.0, []
    for layer in layers:
        if way.page_seats:
            rows, of_page = with_page_seats(layer, way)
            taken += of_page / len(layers)
        else:
            rows = given_back(layer, way.options, layer.key, layer.value)
        found.append(losses(layer, *rows))
    columns: dict[str, Any] = {"way": way.name, "taken_of_a_page": taken if way.page_seats else None}
    for number, name in enumerate(("kl", "error")):
        means = torch.tensor([loss[number] for loss in found]).mean(0).tolist()
        columns |= {f"{name}_q{quarter}": mean for quarter, mean in enumerate(means, start=1)}
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
        print(
            ", ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else str(value) for name, value in rows[-1].items()
            )
        )
        notes = [f"{options.model}, {options.tokens} tokens, float32, layers {[layer.index for layer in layers]}."]
        write_results(options.out, rows, conditions("cpu"), notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
