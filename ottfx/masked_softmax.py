"""Softmax of attention in plain torch where a query may see nothing. Traceable."""

from __future__ import annotations

import torch
from torch import Tensor


def additive_mask(mask: Tensor) -> Tensor:
    """Return a bool (True = attend) or additive mask as additive fp32; what an additive one hides is -inf."""
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, -torch.inf)
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, mask.float(), -torch.inf)


def softmax_or_zero(scores: Tensor) -> Tensor:
    """Return the softmax over the last axis, 0 where all scores are -inf."""
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(highest == -torch.inf, 0.0, highest))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)
