"""Measure what a quantized cache costs in quality: teacher-forced decoding of a text through the real cache."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

import ottfx
from ottfx.cache_fidelity import Fidelity, measure_fidelity
from ottfx.dense_run import AskedLayer, keep_logits, run_dense
from ottfx.earlier_results import check_same_conditions, find_finished
from ottfx.effective_bits import bits_at_length, cache_bits, quantized_layers
from ottfx.errors import ConfigError
from ottfx.metrics import bootstrap_interval
from ottfx.results import Conditions, Result, Variant, options_in_json
from ottfx.retrieval import Sample, score_samples
from ottfx.settings import make_settings
from ottfx.source_hash import source_hash
from ottfx.teacher_forcing import decode_metrics, reference_log_probs
from ottfx.versions import installed_version

OnStep = Callable[[str, int, int], None]
"""Called with (label, steps done, steps in all) after each step; of a task, with "label, task" and its samples."""


def default_text() -> str:
    """Return the bundled text: the beginning of Jane Austen's Persuasion, about 35,000 tokens."""
    return files("ottfx").joinpath("data/persuasion.txt").read_text(encoding="utf-8")


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokenizer_or_ids: Any,
    variants: Iterable[Variant | Mapping[str, Any]],
    *,
    text: str | None = None,
    num_tokens: int = 2048,
    start: int = 256,
    prefill: int | None = None,
    model_name: str | None = None,
    tasks: Mapping[str, Sequence[Sample]] | None = None,
    sqnr: bool = False,
    earlier: Sequence[Result] = (),
    on_step: OnStep | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Compare quantized caches with full precision on one text.

    The reference is one forward pass over the whole text without a cache. Each variant then compiles the model,
    reads the first `prefill` tokens as a prompt and decodes the others one by one, fed with the true text, through a
    stock transformers cache. What a query sees is what the cache stores at that moment: nothing is simulated.

    The model comes back compiled for the last variant, and torch has forgotten its other compiled graphs.
    The reference's log-probabilities stay on the model's device: `4 * (num_tokens - start) * vocabulary` bytes.

    Args:
        model: a transformers causal language model, on its device, in its dtype.
        tokenizer_or_ids: its tokenizer, or token ids, int64 [tokens] or [1, tokens]; then `text` is not read.
        variants: what to measure, in this order: `Variant`, or the options of `ottfx.compile` alone, such as
            `{"scheme": "kivi", "bits": 2}`, whose label is then what they say.
        text: the text to read; `default_text()` if None.
        num_tokens: tokens of it that are read.
        start: first scored position (position p predicts token p + 1).
        prefill: tokens of the prompt, at most `start`; `start` if None. The prompt attends in full precision.
        tasks: name -> samples (`ottfx.retrieval.make_samples`), which each variant is asked after it has read the text.
        model_name: what the results call the model; what its config says if None.
        sqnr: also compare what each cache gives back with the dense cache, see `ottfx.cache_fidelity.Fidelity`. Each
            variant then reads the text once more, as one prompt.
        earlier: results of a run that was broken off (`ottfx.earlier_results.read_results`). Variants that are whole
            there are not measured again.
        on_step: called after each step of a variant.
        on_result: called with each result as soon as it is measured, so that a long run can be saved as it goes.

    Returns:
        One result for each variant.

    Raises:
        ConfigError: an option of a variant cannot work; the text, or the model's context, is too short; `start` or
            `prefill` is out of range; `earlier` was measured under other conditions.
        MatchError: `sqnr`, and the model's attention is not `scaled_dot_product_attention`.
    """
    prefill = start if prefill is None else prefill
    if not 1 <= prefill <= start < num_tokens:
        raise ConfigError(
            "ottfx.evaluate: expected 1 <= prefill <= start < num_tokens. "
            f"Got prefill={prefill!r}, start={start!r}, num_tokens={num_tokens!r}."
        )
    chosen = [one if isinstance(one, Variant) else Variant.of(one) for one in variants]
    if len({variant.label for variant in chosen}) < len(chosen):
        raise ConfigError(
            f"ottfx.evaluate: labels of variants must differ. Got {[variant.label for variant in chosen]!r}."
        )
    for variant in chosen:
        # Before hours are spent on those in front of it.
        make_settings({k: v for k, v in variant.options.items() if k not in ("dynamic", "fullgraph")}, where="evaluate")
    given = isinstance(tokenizer_or_ids, (Tensor, Sequence))
    text = "" if given else (default_text() if text is None else text)
    ids = _token_ids(tokenizer_or_ids, text, num_tokens)
    device = next(model.parameters()).device
    config: Any = model.config
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ConfigError(
            f"ottfx.evaluate: the model reads at most {context} tokens. Got num_tokens={num_tokens!r}. Read fewer."
        )
    conditions = Conditions(
        model=model_name or config._name_or_path or f"{config.model_type} without a name",
        text_sha256=hashlib.sha256(text.encode()).hexdigest() if text else "",
        tokens_sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        tokens=num_tokens,
        start=start,
        prefill=prefill,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        attention=str(getattr(config, "_attn_implementation", "unknown")),
        versions=", ".join(
            f"{name} {installed_version(name) or 'not installed'}"
            for name in ("torch", "transformers", "triton", "ottfx")
        ),
        sources=source_hash(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    check_same_conditions(earlier, conditions)
    ids = ids.to(device)
    was_training = model.training
    model.eval()
    reference: Tensor | None = None
    dense: list[AskedLayer] | None = None
    results: list[Result] = []
    for variant in chosen:
        result = find_finished(earlier, variant, tasks or {}, sqnr)
        if result is None:
            if reference is None:
                reference = reference_log_probs(model, ids, start)
                dense = run_dense(model, ids) if sqnr else None
            result = _measure(model, ids, variant, reference, dense, conditions, tasks or {}, on_step)
            if on_result is not None:
                on_result(result)
        results.append(result)
    model.train(was_training)
    return results


def _measure(
    model: torch.nn.Module,
    ids: Tensor,
    variant: Variant,
    reference: Tensor,
    dense: Sequence[AskedLayer] | None,
    conditions: Conditions,
    tasks: Mapping[str, Sequence[Sample]],
    on_step: OnStep | None,
) -> Result:
    from transformers import DynamicCache

    # Graphs of earlier variants count towards Dynamo's limit for this forward, after which it would run uncompiled.
    torch.compiler.reset()
    began = time.perf_counter()
    compiled = ottfx.compile(model, **variant.options)
    config: Any = model.config
    cache: Any = DynamicCache(config=config)
    report = None if on_step is None else lambda done, total: on_step(variant.label, done, total)
    metrics = decode_metrics(compiled, ids, cache, reference, conditions.prefill, report)
    seconds = time.perf_counter() - began
    scores = {}
    for name, samples in tasks.items():
        ask = None if on_step is None else partial(on_step, f"{variant.label}, {name}")
        scores[name] = score_samples(compiled, samples, ask)
    fidelity: Fidelity | None = None
    if dense is not None:
        stored: Any = DynamicCache(config=config)
        compiled(ids, past_key_values=stored, use_cache=True, **keep_logits(model, 1))
        fidelity = measure_fidelity(dense, stored, cache, ids.shape[1])
    held, formula, description = cache_bits(cache)
    low, high = bootstrap_interval(metrics.kl)
    return Result(
        label=variant.label,
        options=options_in_json(variant.options),
        description=description,
        mean_kl=metrics.mean_kl,
        kl_low=low,
        kl_high=high,
        kl_p99=metrics.p99_kl,
        kl_drift=metrics.kl_drift,
        top1=metrics.top1,
        perplexity=metrics.perplexity,
        perplexity_ratio=metrics.perplexity_ratio,
        bits_held=held,
        bits_formula=formula,
        bits_2k=bits_at_length(cache, 2048),
        bits_8k=bits_at_length(cache, 8192),
        bits_32k=bits_at_length(cache, 32768),
        quantized_layers=quantized_layers(cache),
        layers=len(cache.layers),
        tasks=scores,
        seconds=seconds,
        conditions=conditions,
        metrics=metrics,
        fidelity=fidelity,
    )


def _token_ids(tokenizer_or_ids: Any, text: str, num_tokens: int) -> Tensor:
    if isinstance(tokenizer_or_ids, (Tensor, Sequence)):
        ids = torch.as_tensor(tokenizer_or_ids, dtype=torch.int64).reshape(1, -1).cpu()
    else:
        ids = tokenizer_or_ids(text, return_tensors="pt").input_ids
    if ids.shape[1] < num_tokens:
        raise ConfigError(
            f"ottfx.evaluate: expected a text of at least num_tokens={num_tokens!r} tokens. Got {ids.shape[1]}. "
            "Give a longer text, or a smaller num_tokens."
        )
    return ids[:, :num_tokens]
