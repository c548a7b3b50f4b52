"""Ask what ottfx would do with a model: which attentions it rewrites, which it leaves alone and why."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import ottfx


def main() -> None:
    """Print the report of a small random Gemma 3, whose layers are half sliding-window and half full attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    prompt = torch.randint(3, 256, (1, 32))
    print(ottfx.explain(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, bits=2))


if __name__ == "__main__":
    main()
