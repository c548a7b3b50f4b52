"""Shapes of real models, for benchmarks with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=1 << 20,
    ),
    "llama-3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=1 << 20,
    ),
}


def random_model(name: str, *, device: str, dtype: torch.dtype, num_layers: int | None = None) -> PreTrainedModel:
    """Build a model of a real model's shape with random weights, directly on the device.

    Args:
        name: one of `SHAPES`.
        device: where the weights are made.
        dtype: of weights and cache.
        num_layers: replaces the shape's number of layers.
    """
    config = LlamaConfig(**SHAPES[name])
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)
