"""Numbers that compare a quantized cache with full precision: KL, agreement, perplexity, effective bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ottfx.errors import ConfigError
from ottfx.schemes.base import PAGE, CacheShape, Part, Role, Scheme, SchemeConfig

ROUNDING = 1e-6
"""Mean KL, in nat, that two ways to compute the same distribution may have in float32."""


@dataclass(frozen=True, kw_only=True)
class PositionMetrics:
    """What was measured at each scored position, float32 or bool on the CPU."""

    kl: Tensor
    """[positions]: KL(full || quantized) of the next-token distribution, in nat."""
    agrees: Tensor
    """[positions], bool: both put the same token first."""
    nll: Tensor
    """[positions]: minus the log-probability of the text's next token under the quantized cache, in nat.

    NaN at the text's last token, which has no next one.
    """
    reference_nll: Tensor
    """[positions]: the same in full precision."""

    def __len__(self) -> int:
        return self.kl.numel()

    @property
    def mean_kl(self) -> float:
        """Mean over positions of KL(full || quantized), in nat."""
        return self.kl.double().mean().item()

    @property
    def p99_kl(self) -> float:
        """The KL that one position in a hundred exceeds, in nat."""
        return self.kl.double().quantile(0.99).item()

    @property
    def kl_drift(self) -> float:
        """Mean KL of the last quarter of the positions over that of the first: about 1 where errors do not pile up.

        NaN for fewer than four positions, or where the first quarter has no error but rounding.
        """
        quarter = len(self) // 4
        if quarter == 0:
            return math.nan
        first, last = (part.double().mean().item() for part in (self.kl[:quarter], self.kl[-quarter:]))
        return last / first if first > ROUNDING else math.nan

    @property
    def top1(self) -> float:
        """Share of positions at which both put the same token first."""
        return self.agrees.double().mean().item()

    @property
    def perplexity(self) -> float:
        """Perplexity of the text under the quantized cache."""
        return self.nll.double().nanmean().exp().item()

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity under the quantized cache over perplexity in full precision."""
        return (self.nll.double() - self.reference_nll.double()).nanmean().exp().item()


def kl_divergence(reference_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """Compute KL(reference || other) of distributions given by their logarithms.

    Args:
        reference_log_probs: float [..., vocabulary], normalized; minus infinity is a probability of zero.
        log_probs: the same shape.

    Returns:
        float32 [...], in nat. Infinite where the other excludes what the reference allows.
    """
    reference, other = reference_log_probs.float(), log_probs.float()
    probability = reference.exp()
    return torch.where(probability > 0, probability * (reference - other), 0.0).sum(-1)


def bootstrap_interval(
    values: Tensor, *, block: int = 64, samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Estimate an interval of the mean by resampling blocks of neighbouring positions.

    Neighbours share their context, so single positions are not independent; blocks of them nearly are.

    Args:
        values: float [positions], in text order.
        block: positions of a block. The last block may be shorter: its mean is weighted by its size.
        samples: number of resamples.
        confidence: share of resampled means that the interval holds.
        seed: of the resampling.

    Returns:
        Lower and upper bound of the mean, in the unit of `values`.

    Raises:
        ConfigError: `values` is empty, or `block`, `samples` or `confidence` is out of range.
    """
    if values.numel() == 0 or block < 1 or samples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            "ottfx.bootstrap_interval: expected values, block >= 1, samples >= 1 and 0 < confidence < 1. "
            f"Got {values.numel()} values, block={block!r}, samples={samples!r}, confidence={confidence!r}."
        )
    blocks = values.double().split(block)
    sums = torch.stack([part.sum() for part in blocks])
    sizes = torch.tensor([part.numel() for part in blocks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(blocks), (samples, len(blocks)), generator=generator)
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def formula_bits(scheme: Scheme, config: SchemeConfig, role: Role, shape: CacheShape, length: int) -> float:
    """Compute the effective bits of an element of one half of a layer's cache, as papers count them.

    Codes and scales of the packed tokens, what the window stores of the others (16 bits where that is full precision,
    whatever the model's dtype; averaged over the phases of a flush), and the pools as if they were full. Room that is
    allocated but not needed at this length does not count; what is really held is `ottfx.memory_footprint`'s business.

    Args:
        scheme: the scheme that stores the half.
        config: its options at this layer.
        role: which half.
        shape: sizes of the half; `pages` and `dtype` are ignored.
        length: tokens stored.

    Returns:
        Bits of an element: a share of 16 for a 16-bit cache.
    """
    # Two sizes of the same half tell what a page costs and what is held once.
    one, two = (_bits_by_part(scheme, config, role, shape, pages) for pages in (1, 2))
    elements = shape.batch_size * shape.num_kv_heads * shape.head_dim
    token_bits = sum(two[part] - one[part] for part in one) / (PAGE * elements)
    pool_bits = (2 * one.get("pool", 0) - two.get("pool", 0)) / (length * elements)
    phases = range(length, length + PAGE)
    unpacked = sum(at - scheme.packed_length(config, role, at, 0) for at in phases) / len(phases)
    full = 0.0 if one.get("dense") else min(unpacked, float(length))
    rows = scheme.ring_rows(config)
    window_bits = one.get("residual", 0) / (rows * elements) if rows else 16
    return ((length - full) * token_bits + full * window_bits) / length + pool_bits


def _bits_by_part(scheme: Scheme, config: SchemeConfig, role: Role, shape: CacheShape, pages: int) -> dict[Part, int]:
    sized = replace(shape, pages=pages, dtype=torch.float16)
    bits: dict[Part, int] = {}
    for spec in scheme.state_spec(config, role, sized).values():
        bits[spec.part] = bits.get(spec.part, 0) + math.prod(spec.shape) * spec.dtype.itemsize * 8
    return bits
