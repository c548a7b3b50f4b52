"""What the uncompiled model keeps of a text, and what its attentions ask: the measure of a quantized cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ottfx.errors import MatchError

QUERIES = 64
"""Queries of each layer that are kept: those of the last tokens."""


@dataclass(frozen=True, kw_only=True)
class AskedLayer:
    """Keys and values that one layer keeps of a text, and its last queries."""

    key: Tensor
    """[num_kv_heads, held, head_dim]: of the last `held` tokens; of all of them, unless the layer slides."""
    value: Tensor
    """The shape of `key`."""
    query: Tensor
    """[num_heads, queries, head_dim], as the attention takes them, rotated."""
    bias: Tensor
    """[1 or num_heads, queries, held], float32: 0 or the mask's number where a query sees a token, else -inf."""
    softmax_scale: float


@torch.no_grad()
def run_dense(model: torch.nn.Module, ids: Tensor) -> list[AskedLayer]:
    """Read a text at once with the uncompiled model and a stock cache.

    Args:
        model: a transformers causal language model, compiled or not, whose attention is
            `scaled_dot_product_attention`, called once by each layer of its cache, in their order.
        ids: int64 [1, tokens].

    Returns:
        One entry for each layer of the cache.

    Raises:
        MatchError: the model calls another attention, or not once for each layer.
    """
    from transformers import DynamicCache

    config: Any = model.config
    cache: Any = DynamicCache(config=config)
    with torch.compiler.set_stance("force_eager"), _AttentionCalls() as seen:
        model(ids, past_key_values=cache, use_cache=True, **keep_logits(model, 1))
    if len(seen.calls) != len(cache.layers):
        raise MatchError(
            f"ottfx.run_dense: expected one scaled_dot_product_attention for each of {len(cache.layers)} layers. "
            f"Got {len(seen.calls)} calls. Load the model with attn_implementation='sdpa'."
        )
    return [call.asked_of(layer.keys[0], layer.values[0]) for call, layer in zip(seen.calls, cache.layers, strict=True)]


def keep_logits(model: torch.nn.Module, count: int) -> dict[str, int]:
    """Return the argument that makes a transformers model compute its last `count` logits only, if it takes one."""
    # A compiled model's forward is still the method of its class.
    takes_it = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": count} if takes_it else {}


@dataclass(frozen=True, kw_only=True)
class _Call:
    query: Tensor
    mask: Tensor | None
    softmax_scale: float

    def asked_of(self, key: Tensor, value: Tensor) -> AskedLayer:
        queries, held = self.query.shape[1], key.shape[1]
        if self.mask is None:
            # Token j of those held lies `held - 1 - j` before the last one, query i `queries - 1 - i`.
            ahead = torch.arange(held, device=key.device) - held > (
                torch.arange(queries, device=key.device)[:, None] - queries
            )
            bias = torch.zeros(1, queries, held, device=key.device).masked_fill(ahead, -torch.inf)
        elif self.mask.dtype == torch.bool:
            bias = torch.where(self.mask[..., -held:], 0.0, -torch.inf)
        else:
            lowest = torch.finfo(self.mask.dtype).min / 2
            bias = torch.where(self.mask > lowest, self.mask.float(), -torch.inf)[..., -held:]
        return AskedLayer(key=key, value=value, query=self.query, bias=bias, softmax_scale=self.softmax_scale)


class _AttentionCalls(TorchFunctionMode):
    """Keeps the last queries of each call of `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        rows = query[0, :, -QUERIES:].clone()
        mask = None
        if attn_mask is not None:
            mask = attn_mask.expand(query.shape[0], -1, query.shape[2], key.shape[2])[0, :, -QUERIES:].clone()
        softmax_scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.calls.append(_Call(query=rows, mask=mask, softmax_scale=softmax_scale))
