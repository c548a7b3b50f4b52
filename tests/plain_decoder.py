"""A decoder in plain PyTorch whose cache is a tuple of (key, value) tensors grown by `torch.cat`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVCache = tuple[tuple[Tensor, Tensor], ...]


class Attention(nn.Module):
    """Causal attention with grouped heads."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch_size, q_len, _ = hidden.shape
        query = self.q_proj(hidden).view(batch_size, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden).view(batch_size, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden).view(batch_size, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and past is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch_size, q_len, -1)), (key, value)


class PlainDecoder(nn.Module):
    """A language model without transformers. One new token a call after the prompt, unless a mask is given.

    Args of the call:
        tokens: int64 [batch_size, q_len].
        cache: the cache that the last call returned, or None for a fresh prompt.
        mask: bool [batch_size, 1, q_len, past + q_len], True = attend, or None.

    Returns:
        Logits [batch_size, q_len, vocab_size] and the new cache.
    """

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.position = nn.Embedding(max_length, hidden_size)
        self.attention = nn.ModuleList(
            Attention(hidden_size, num_heads, num_kv_heads, head_dim) for _ in range(num_layers)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size))
            for _ in range(num_layers)
        )
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        past_length = 0 if cache is None else cache[0][0].shape[2]
        positions = torch.arange(past_length, past_length + tokens.shape[1], device=tokens.device)
        hidden = self.embed(tokens) + self.position(positions)
        new_cache = []
        for index, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            normed = F.layer_norm(hidden, hidden.shape[-1:])
            attended, layer_cache = attention(normed, None if cache is None else cache[index], mask)
            hidden = hidden + attended
            hidden = hidden + mlp(F.layer_norm(hidden, hidden.shape[-1:]))
            new_cache.append(layer_cache)
        return self.head(hidden), tuple(new_cache)


def plain_decoder(**sizes: int) -> PlainDecoder:
    """A decoder with the same random weights every time, in eval mode without grad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PlainDecoder(**sizes)
    return model.eval().requires_grad_(False)


def greedy(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[Tensor, KVCache]:
    """Prompt int64 [batch_size, length] in; prompt with its continuation, and the last cache, out."""
    tokens, cache = prompt, None
    step = prompt
    for _ in range(new_tokens):
        logits, cache = model(step, cache)
        step = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, step], dim=1)
    assert cache is not None
    return tokens, cache
