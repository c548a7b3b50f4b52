"""Which layers get wider codes: those of `ott+` that gain most by it when each has them alone, or those at both ends.

`python -m benchmarks.layer_budget` from the repository root takes half an hour on a CPU. First each layer alone has
4-bit codes, on a stretch of the text that is not the one all rows are judged by, fed in chunks of 32 tokens: by how
much mean KL falls is its gain (`layer-budget-gains.csv`). Then the layers of greatest gain, or those at both ends, are
wider on the beginning of the text, token by token as in `ottfx eval`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import ottfx
from benchmarks.quality_ideas import PLAIN, add_changes
from benchmarks.results import FOLDER, conditions
from benchmarks.results import write_results as write_table
from ottfx.dense_run import keep_logits
from ottfx.eval_command import load_model, run_evaluation
from ottfx.evaluation import default_text
from ottfx.metrics import bootstrap_interval, kl_divergence
from ottfx.results import Variant
from ottfx.teacher_forcing import reference_log_probs

CHUNK = 32
LayerBits = Mapping[int, int]


@torch.no_grad()
def kl_in_chunks(model: torch.nn.Module, ids: Tensor, reference: Tensor, layer_bits: LayerBits) -> Tensor:
    """Return the KL of the last positions of `ids` with `ott+`, fed in chunks, with wider codes in some layers.

    Args:
        model: a transformers causal language model.
        ids: int64 [1, tokens].
        reference: [positions, vocabulary], see `reference_log_probs`. The tokens before are a prompt.
        layer_bits: layer -> bits.

    Returns:
        [positions], in nat.
    """
    torch.compiler.reset()
    compiled = ottfx.compile(model, scheme="ott+", bits=2, layer_bits=layer_bits, lower="eager")
    config: Any = model.config
    cache = DynamicCache(config=config)
    prompt, rest = ids.tensor_split([ids.shape[1] - len(reference)], dim=1)
    compiled(prompt, past_key_values=cache, use_cache=True, **keep_logits(model, 1))
    kl = []
    for chunk, expected in zip(rest.split(CHUNK, 1), reference.split(CHUNK), strict=True):
        logits = compiled(chunk, past_key_values=cache, use_cache=True).logits[0]
        kl.append(kl_divergence(expected, logits.float().log_softmax(-1)))
    return torch.cat(kl)


def layer_gains(model: torch.nn.Module, ids: Tensor, start: int, layers: int) -> list[dict[str, float]]:
    """Return by how much mean KL falls when a layer alone has 4-bit codes, for each of the first `layers`.

    Args:
        model: a transformers causal language model.
        ids: int64 [1, tokens].
        start: first scored position.
        layers: how many layers the model has.
    """
    reference = reference_log_probs(model, ids, start)
    plain = kl_in_chunks(model, ids, reference, {})
    rows = []
    for layer in range(layers):
        gain = plain - kl_in_chunks(model, ids, reference, {layer: 4})
        low, high = bootstrap_interval(gain)
        rows.append({"layer": layer, "gain": gain.mean().item(), "gain_low": low, "gain_high": high})
        print(f"layer {layer}: KL falls by {rows[-1]['gain']:.5f} of {plain.mean():.5f}", flush=True)
    return rows


def budgets(gains: Sequence[float]) -> dict[str, LayerBits]:
    """Return what to compare, all at equal bits: name -> layer -> bits.

    Args:
        gains: of each layer, of four at least.
    """
    last = len(gains) - 1
    by_gain = sorted(range(len(gains)), key=lambda layer: -gains[layer])
    chosen = {
        "2 first and 2 last": dict.fromkeys((0, 1, last - 1, last), 3),
        "4 of greatest gain": dict.fromkeys(sorted(by_gain[:4]), 3),
        "2 of greatest gain": dict.fromkeys(sorted(by_gain[:2]), 4),
    }
    return {
        f"{name}: layers {', '.join(map(str, bits))} at {max(bits.values())} bits": bits
        for name, bits in chosen.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the gains, choose layers, measure those, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--start", type=int, default=256, help="tokens of the prompts, which are not scored")
    parser.add_argument("--gain-tokens", type=int, default=1024, help="of the stretch behind those")
    parser.add_argument("--keep", action="store_true", help="add to the rows of the file, do not replace them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / FOLDER / "layer-budget")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, "float32")
    text = torch.tensor([tokenizer(default_text())["input_ids"]])
    config: Any = model.config
    stop = options.tokens + options.gain_tokens
    behind = text[:, options.tokens : stop]
    gains = layer_gains(model.eval(), behind, options.start, config.num_hidden_layers)
    notes = [f"{options.model}, float32, tokens {options.tokens} to {stop - 1} of the text, {CHUNK} at once."]
    write_table(options.out.with_name(f"{options.out.name}-gains"), gains, conditions("cpu"), notes)

    plain = {"scheme": "ott+", "bits": 2}
    variants = [Variant(label=PLAIN, options=plain)]
    for name, layer_bits in budgets([row["gain"] for row in gains]).items():
        variants.append(Variant(label=f"{PLAIN}, {name}", options={**plain, "layer_bits": layer_bits}))
    results = run_evaluation(
        variants, options.model, "cpu", "float32", "", options.tokens, options.start, str(options.out),
        fresh=not options.keep,
    )  # fmt: skip
    add_changes(results, options.out.with_suffix(".csv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
