"""Reading a text with a model, fed the true tokens: at once in full precision, and token by token through a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ottfx.dense_run import keep_logits
from ottfx.metrics import PositionMetrics, kl_divergence


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
    with torch.compiler.set_stance("force_eager"):
        logits = model(ids, use_cache=False, **keep_logits(model, wanted)).logits[0, -wanted:]
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
    model(ids[:, :prefill], past_key_values=cache, use_cache=True, **keep_logits(model, 1))
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
