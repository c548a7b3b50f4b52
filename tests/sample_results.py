"""Made-up results of an evaluation, for tests of what is done with them."""

from __future__ import annotations

import torch

from ottfx.metrics import PositionMetrics
from ottfx.results import Conditions, Result


def metrics_of(kl: list[float], nll: float = 2.0, reference_nll: float = 2.0) -> PositionMetrics:
    values = torch.tensor(kl)
    return PositionMetrics(
        kl=values,
        agrees=values < 0.5,
        nll=torch.full_like(values, nll),
        reference_nll=torch.full_like(values, reference_nll),
    )


def result_of(label: str, kl: list[float]) -> Result:
    metrics = metrics_of(kl, nll=2.1)
    conditions = Conditions(
        model="tiny", text_sha256="ab", tokens_sha256="cd", tokens=9, start=5, prefill=5, dtype="float32",
        device="CPU", attention="sdpa", versions="torch 0", sources="ef",
        date="today",
    )  # fmt: skip
    return Result(
        label=label, description="described", mean_kl=metrics.mean_kl, kl_low=0.0, kl_high=1.0, top1=metrics.top1,
        perplexity=metrics.perplexity, perplexity_ratio=metrics.perplexity_ratio, bits_held=3.5, bits_formula=3.0,
        kl_p99=metrics.p99_kl, kl_drift=metrics.kl_drift, bits_2k=3.1, bits_8k=2.6, bits_32k=2.4,
        quantized_layers=2, layers=2,
        seconds=1.0, conditions=conditions, metrics=metrics,
    )  # fmt: skip
