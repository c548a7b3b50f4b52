"""Which layer, and which head of it, loses the answers that `ott+` does not find: the task `lines`, taken apart.

`python -m benchmarks.lost_lines` takes a quarter of an hour on a CPU. Contexts are read by the dense model and stored
as `ott+` stores a prompt; question and answer, read at once, attend to what the storage gives back. In each row some
of it is as it was: the keys or the values of all layers, the keys of one layer, or those of one head of the layer that
matters most. Rows with gradual widths are `ott+` as if it had one set of widths (docs/storage.md, *Mixed words*).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.packed_state import append_tokens, empty_halves
from benchmarks.results import FOLDER, as_text, conditions, write_results
from ottfx import mixed_words
from ottfx.dense_run import keep_logits
from ottfx.eval_command import load_model
from ottfx.evaluation import default_text
from ottfx.metrics import kl_divergence
from ottfx.registry import make_config
from ottfx.retrieval import Sample, make_samples

AT_ONCE = 16
"""Samples that are read together."""
Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer, [batch, num_kv_heads, tokens, head_dim]."""
Choose = Callable[[int, Pair, Pair], Pair]
"""(layer, as they were, as the storage gives them back) -> what attention reads."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples whose contexts were read."""

    cache: Any
    """A dense cache of the contexts."""
    fed: Tensor
    """int64 [batch, tokens of question and answer]."""
    answer: Tensor
    """int64 [batch, tokens of the answer]."""
    expected: Tensor
    """float32 [batch, tokens of the answer, vocabulary]: its log-probabilities, over the dense cache."""


def give_back(layer: int, pair: Pair) -> Pair:
    """Store the keys and values of one layer as `ott+` stores a prompt, and return what is read then."""
    batch, heads, tokens, head_dim = pair[0].shape
    halves = empty_halves(
        make_config("ott+", 2).at_layer(layer), batch_size=batch, num_kv_heads=heads, head_dim=head_dim, room=tokens,
        dtype=pair[0].dtype, device="cpu",
    )  # fmt: skip
    append_tokens(halves, *pair)
    key, value = (half.read(tokens) for half in halves)
    return key, value


def stored_layers(cache: Any) -> list[int]:
    """Return the layers that a scheme stores: all but those that slide."""
    return [index for index, layer in enumerate(cache.layers) if not getattr(layer, "is_sliding", False)]


def answer_log_probs(model: Any, cache: Any, fed: Tensor, answer: int) -> Tensor:
    """Return the log-probabilities of the last `answer` tokens of `fed`, which the cache keeps from then on."""
    logits = model(fed[:, :-1], past_key_values=cache, use_cache=True, **keep_logits(model, answer)).logits
    result: Tensor = logits.float().log_softmax(-1)
    return result


@torch.no_grad()
def read_contexts(model: Any, samples: Sequence[Sample]) -> list[Batch]:
    """Read the contexts of samples and their answers, those of equal lengths together, over dense caches."""
    of_lengths: dict[tuple[int, int, int], list[Sample]] = {}
    for sample in samples:
        of_lengths.setdefault((len(sample.context), len(sample.question), len(sample.answer)), []).append(sample)
    batches = []
    for some in (alike[at : at + AT_ONCE] for alike in of_lengths.values() for at in range(0, len(alike), AT_ONCE)):
        cache = DynamicCache(config=model.config)
        context = torch.stack([sample.context for sample in some])
        model(context, past_key_values=cache, use_cache=True, **keep_logits(model, 1))
        answer = torch.stack([sample.answer for sample in some])
        fed = torch.cat([torch.stack([sample.question for sample in some]), answer], dim=1)
        expected = answer_log_probs(model, copy.deepcopy(cache), fed, answer.shape[1])
        batches.append(Batch(cache=cache, fed=fed, answer=answer, expected=expected))
    return batches


@torch.no_grad()
def ask(model: Any, batches: Iterable[tuple[Batch, dict[int, Pair]]], choose: Choose) -> dict[str, Any]:
    """Ask all samples over what `choose` takes of each stored layer, and return how many were answered, and the KL."""
    right, asked, kl = 0, 0, []
    for batch, stored in batches:
        cache = copy.deepcopy(batch.cache)
        for index, pair in stored.items():
            layer = cache.layers[index]
            layer.keys, layer.values = choose(index, (layer.keys, layer.values), pair)
        log_probs = answer_log_probs(model, cache, batch.fed, batch.answer.shape[1])
        right += int((log_probs.argmax(-1) == batch.answer).all(-1).sum())
        asked += len(batch.answer)
        kl.append(kl_divergence(batch.expected.flatten(0, 1), log_probs.flatten(0, 1)))
    return {"right": right, "asked": asked, "kl": torch.cat(kl).mean().item()}


def dense_keys(wanted: int, head: int | None = None) -> Choose:
    """Take the keys of one layer, or of one head of it, as they were."""

    def choose(index: int, dense: Pair, stored: Pair) -> Pair:
        if index != wanted:
            return stored
        key = dense[0] if head is None else stored[0].index_copy(1, torch.tensor([head]), dense[0][:, [head]])
        return key, stored[1]

    return choose


def measure(model: Any, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Measure all rows, and print each."""
    rows: list[dict[str, Any]] = []

    def add(widths: str, what: str, stored: Sequence[dict[int, Pair]], choose: Choose) -> None:
        rows.append({"widths": widths, "as_it_was": what, **ask(model, zip(batches, stored, strict=True), choose)})
        print(", ".join(f"{name} {as_text(value)}" for name, value in rows[-1].items()), flush=True)

    def store() -> list[dict[int, Pair]]:
        return [
            {index: give_back(index, (b.cache.layers[index].keys, b.cache.layers[index].values)) for index in layers}
            for b in batches
        ]

    layers = stored_layers(batches[0].cache)
    add("", "everything", [{} for _ in batches], lambda index, dense, stored: dense)
    both_sets = store()
    add("both sets", "nothing", both_sets, lambda index, dense, stored: stored)
    add("both sets", "all keys", both_sets, lambda index, dense, stored: (dense[0], stored[1]))
    add("both sets", "all values", both_sets, lambda index, dense, stored: (stored[0], dense[1]))
    del both_sets
    with patch.object(mixed_words, "STEEP", mixed_words.GRADUAL):
        gradual = store()
    add("gradual", "nothing", gradual, lambda index, dense, stored: stored)
    first = len(rows)
    for layer in layers:
        add("gradual", f"keys of layer {layer}", gradual, dense_keys(layer))
    worst = layers[min(range(len(layers)), key=lambda place: rows[first + place]["kl"])]
    for head in range(gradual[0][worst][0].shape[1]):
        add("gradual", f"keys of layer {worst}, head {head}", gradual, dense_keys(worst, head))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=FOLDER / "lost-lines", help="results files, without suffix")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, "float32")
    samples = make_samples("lines", tokenizer, default_text(), options.samples)
    rows = measure(model, read_contexts(model.eval(), samples))
    write_results(options.out, rows, {"model": options.model, **conditions("cpu")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
