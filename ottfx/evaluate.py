"""Measure what a quantized cache costs in quality: teacher-forced decoding of a text through the real cache."""

from __future__ import annotations

import hashlib
import inspect
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
from ottfx.cache_state import CacheHalf
from ottfx.errors import ConfigError
from ottfx.eval_command import register as register
from ottfx.kv_tensor import KVTensor
from ottfx.metrics import PositionMetrics, bootstrap_interval, formula_bits, kl_divergence
from ottfx.results import Conditions, Result, Variant
from ottfx.retrieval import Sample, score_samples
from ottfx.schemes.base import Role
from ottfx.versions import installed_version

OnStep = Callable[[str, int, int], None]
"""Called with (label, steps done, steps in all) after each step; of a task, with "label, task" and its samples."""


def default_text() -> str:
    """Return the bundled text: the beginning of Jane Austen's Persuasion, about 14,500 tokens."""
    return files("ottfx").joinpath("data/persuasion.txt").read_text(encoding="utf-8")


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokenizer_or_ids: Any,
    variants: Iterable[Variant],
    *,
    text: str | None = None,
    num_tokens: int = 2048,
    start: int = 256,
    prefill: int | None = None,
    model_name: str | None = None,
    tasks: Mapping[str, Sequence[Sample]] | None = None,
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
        variants: what to measure, in this order.
        text: the text to read; `default_text()` if None.
        num_tokens: tokens of it that are read.
        start: first scored position (position p predicts token p + 1).
        prefill: tokens of the prompt, at most `start`; `start` if None. The prompt attends in full precision.
        tasks: name -> samples (`ottfx.retrieval.make_samples`), which each variant is asked after it has read the text.
        model_name: what the results call the model; what its config says if None.
        on_step: called after each step of a variant.
        on_result: called with each result as soon as it is there, so that a long run can be saved as it goes.

    Returns:
        One result for each variant.

    Raises:
        ConfigError: the text, or the model's context, is too short; `start` or `prefill` is out of range.
    """
    prefill = start if prefill is None else prefill
    if not 1 <= prefill <= start < num_tokens:
        raise ConfigError(
            "ottfx.evaluate: expected 1 <= prefill <= start < num_tokens. "
            f"Got prefill={prefill!r}, start={start!r}, num_tokens={num_tokens!r}."
        )
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
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    ids = ids.to(device)
    was_training = model.training
    model.eval()
    reference = reference_log_probs(model, ids, start)
    results = []
    for variant in variants:
        results.append(_measure(model, ids, variant, reference, conditions, tasks or {}, on_step))
        if on_result is not None:
            on_result(results[-1])
    model.train(was_training)
    return results


@torch.no_grad()
def reference_log_probs(model: torch.nn.Module, ids: Tensor, start: int) -> Tensor:
    """Return the model's own log-probabilities, from one uncompiled forward pass without a cache.

    Args:
        model: a transformers causal language model, compiled or not.
        ids: int64 [1, tokens].
        start: first position wanted.

    Returns:
        float32 [tokens - start, vocabulary].
    """
    wanted = ids.shape[1] - start
    keep = {"logits_to_keep": wanted} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    with torch.compiler.set_stance("force_eager"):
        logits = model(ids, use_cache=False, **keep).logits[0, -wanted:]
    return logits.float().log_softmax(-1)


def decode_metrics(
    model: torch.nn.Module,
    ids: Tensor,
    cache: Any,
    reference: Tensor,
    prefill: int,
    on_step: Callable[[int, int], None] | None = None,
) -> PositionMetrics:
    """Decode `ids` token by token through `cache`, and compare each scored position with the reference.

    Args:
        model: a transformers causal language model, compiled or not.
        ids: int64 [1, tokens].
        cache: an empty transformers cache; holds all tokens afterwards.
        reference: float32 [positions, vocabulary]: log-probabilities at the last `positions` of `ids`.
        prefill: tokens that are read at once as a prompt; none of them is scored.
        on_step: called with (tokens done, tokens in all).

    Returns:
        Metrics of the last `positions` positions.
    """
    tokens = ids.shape[1]
    start = tokens - reference.shape[0]
    kl = torch.zeros(tokens - start, device=ids.device)
    agrees = torch.zeros_like(kl, dtype=torch.bool)
    nll = torch.full_like(kl, torch.nan)
    model(ids[:, :prefill], past_key_values=cache, use_cache=True)
    for position in range(prefill, tokens):
        logits = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        if position >= start:
            row = position - start
            log_probs = logits.float().log_softmax(-1)
            kl[row] = kl_divergence(reference[row], log_probs)
            agrees[row] = reference[row].argmax() == log_probs.argmax()
            if position + 1 < tokens:
                nll[row] = -log_probs[ids[0, position + 1]]
        if on_step is not None:
            on_step(position + 1, tokens)
    reference_nll = torch.full_like(nll, torch.nan)
    reference_nll[:-1] = -reference[:-1].gather(-1, ids[0, start + 1 :, None])[:, 0]
    return PositionMetrics(kl=kl.cpu(), agrees=agrees.cpu(), nll=nll.cpu(), reference_nll=reference_nll.cpu())


def cache_bits(cache: Any) -> tuple[float, float, str]:
    """Return the effective bits of an element of a filled transformers cache, and how its last layer is stored.

    Returns:
        (bits really held, bits by formula, description). A dense tensor counts with its own width as held and with 16
        bits in the formula.
    """
    elements, description = 0, "dense"
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            elements += tensor.numel()
            if (half := _packed_half(tensor)) is not None:
                description = half.config.describe()
    return ottfx.memory_footprint(cache).total * 8 / elements, bits_at_length(cache), description


def bits_at_length(cache: Any, length: int | None = None) -> float:
    """Return the bits of an element by formula (`ottfx.metrics.formula_bits`), over all layers.

    Args:
        cache: a filled transformers cache. A dense layer counts with 16 bits; if it is a sliding one, it keeps the
            tokens that it holds.
        length: tokens that the cache is thought to hold; those that it holds if None.
    """
    elements, bits = 0, 0.0
    for layer in cache.layers:
        halves: tuple[tuple[Role, Tensor], ...] = (("key", layer.keys), ("value", layer.values))
        for role, tensor in halves:
            tokens = tensor.shape[2] if length is None or getattr(layer, "is_sliding", False) else length
            count = tensor.shape[0] * tensor.shape[1] * tokens * tensor.shape[3]
            half = _packed_half(tensor)
            elements += count
            bits += count * (16.0 if half is None else formula_bits(half.scheme, half.config, role, half.shape, tokens))
    return bits / elements


def _packed_half(tensor: Tensor) -> CacheHalf | None:
    return tensor.payload.half if isinstance(tensor, KVTensor) and tensor.payload is not None else None


def _measure(
    model: torch.nn.Module,
    ids: Tensor,
    variant: Variant,
    reference: Tensor,
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
    cache = DynamicCache(config=config)
    report = None if on_step is None else lambda done, total: on_step(variant.label, done, total)
    metrics = decode_metrics(compiled, ids, cache, reference, conditions.prefill, report)
    seconds = time.perf_counter() - began
    scores = {}
    for name, samples in tasks.items():
        ask = None if on_step is None else partial(on_step, f"{variant.label}, {name}")
        scores[name] = score_samples(compiled, samples, ask)
    held, formula, description = cache_bits(cache)
    low, high = bootstrap_interval(metrics.kl)
    return Result(
        label=variant.label,
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
        tasks=scores,
        seconds=seconds,
        conditions=conditions,
        metrics=metrics,
    )


def _token_ids(tokenizer_or_ids: Any, text: str, num_tokens: int) -> Tensor:
    if isinstance(tokenizer_or_ids, (Tensor, Sequence)):
        ids = torch.as_tensor(tokenizer_or_ids, dtype=torch.int64).reshape(1, -1)
    else:
        ids = tokenizer_or_ids(text, return_tensors="pt").input_ids
    if ids.shape[1] < num_tokens:
        raise ConfigError(
            f"ottfx.evaluate: expected a text of at least num_tokens={num_tokens!r} tokens. Got {ids.shape[1]}. "
            "Give a longer text, or a smaller num_tokens."
        )
    return ids[:, :num_tokens]
