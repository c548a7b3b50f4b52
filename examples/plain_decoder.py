"""No transformers here: one attention layer in plain PyTorch, whose cache is a tuple grown by `torch.cat`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ottfx


class Decoder(nn.Module):
    """Predicts the next token from all tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 256)
        self.qkv = nn.Linear(256, 3 * 256)
        self.head = nn.Linear(256, 256)

    def forward(self, tokens: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens int64 [batch, q_len] and the cache before; logits [batch, q_len, 256] and the cache after."""
        hidden = self.embed(tokens)
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key = torch.cat([cache[0], key], dim=2)
            value = torch.cat([cache[1], value], dim=2)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self.head(hidden + attended.transpose(1, 2).flatten(2)), (key, value)


@torch.no_grad()
def generate(model: Decoder, prompt: Tensor, new_tokens: int) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """Greedy decoding; return the new tokens and the last cache."""
    step, cache, out = prompt, None, []
    for _ in range(new_tokens):
        logits, cache = model(step, cache)
        step = logits[:, -1:].argmax(-1)
        out.append(int(step))
    return out, cache


def main() -> None:
    """Decode densely, then with a 4-bit cache."""
    torch.manual_seed(0)
    model, prompt = Decoder().eval(), torch.randint(0, 256, (1, 400))
    dense_tokens, dense_cache = generate(model, prompt, 12)
    ottfx.compile(model, bits=4)
    tokens, cache = generate(model, prompt, 12)
    print("dense:    ", *dense_tokens)
    print("quantized:", *tokens)
    print("bytes:", ottfx.memory_footprint([dense_cache]).total, "->", ottfx.memory_footprint([cache]).total)


if __name__ == "__main__":
    main()
