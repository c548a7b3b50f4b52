"""Random-weight Hugging Face models of every family that matters, small enough for one CPU core.

Two layers, hidden size 64, 4 heads of 16, vocabulary 128, float32, eval mode, no end-of-sequence token.
Weights are larger than usual (`initializer_range`), so that a token far back changes the prediction:
with the usual ones attention is nearly uniform, and a test of the cache could not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
HEAD_DIM = 16
SLIDING_WINDOW = 24

COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.25,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
GROUPED: dict[str, Any] = dict(num_key_value_heads=2)


def _large_key_bias(model: PreTrainedModel) -> None:
    """Give a few key channels the offset that Qwen2 has: per-token quantization of such keys is useless."""
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.data.normal_()
            parameter.data[::7] = 30.0


_FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[PreTrainedModel], None] | None]] = {
    "llama": ("LlamaConfig", GROUPED, None),
    "llama-mha": ("LlamaConfig", dict(num_key_value_heads=4), None),
    "qwen2": ("Qwen2Config", GROUPED, _large_key_bias),
    "qwen3": ("Qwen3Config", GROUPED | dict(head_dim=HEAD_DIM), None),
    "mistral": ("MistralConfig", GROUPED | dict(sliding_window=None), None),
    "mistral-sliding": ("MistralConfig", GROUPED | dict(sliding_window=SLIDING_WINDOW), None),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            num_key_value_heads=1,
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        None,
    ),
    "phi3": ("Phi3Config", GROUPED, None),
    "gpt2": ("GPT2Config", dict(n_inner=96), None),
    "gpt-neox": ("GPTNeoXConfig", dict(), None),
    "opt": ("OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0), None),
    "falcon": ("FalconConfig", dict(multi_query=True, alibi=False, new_decoder_architecture=False), None),
}

FAMILIES = tuple(_FAMILIES)
"""Every name that `tiny_model` takes."""


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Build a random model of one family.

    Args:
        family: one of `FAMILIES`.
        overrides: config fields that replace the tiny ones, such as `num_hidden_layers=4`.

    Returns:
        The causal language model, float32 on the CPU, in eval mode, the same weights every time.
    """
    config_name, fields, finish = _FAMILIES[family]
    config = getattr(transformers, config_name)(**(COMMON | fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if finish is not None:
        finish(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval().requires_grad_(False)


def random_tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 [batch_size, length], none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (batch_size, length), generator=generator)
