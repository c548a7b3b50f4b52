"""Shapes of real models and of workloads, for benchmarks with random weights and random caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

LONGEST = 1 << 24
"""Positions that every shape allows, so that a benchmark may be longer than the real model's context."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaConfig",
        dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            vocab_size=32000,
        ),
    ),
    "llama-3-8b": (
        "LlamaConfig",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    "qwen3-8b": (
        "Qwen3Config",
        dict(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "qwen3-32b": (
        "Qwen3Config",
        dict(
            hidden_size=5120,
            intermediate_size=25600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "gemma-3-4b": (
        "Gemma3TextConfig",
        dict(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=262208,
            sliding_window=1024,
            query_pre_attn_scalar=256,
        ),
    ),
    "smollm2-135m": (
        "LlamaConfig",
        dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
    ),
    "tiny": (
        "LlamaConfig",
        dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=128,
        ),
    ),
}
"""Name -> (class of the config, the fields in which it differs from that class)."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention heads of one layer of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def heads_of(name: str) -> Heads:
    """Return the heads of one of `SHAPES`."""
    fields = SHAPES[name][1]
    return Heads(
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
    )


def parse_workload(text: str) -> tuple[int, int]:
    """Read `8x32k` as (8 sequences, 32768 tokens each)."""
    batch_size, length = text.split("x")
    return int(batch_size), int(length[:-1]) * 1024 if length.endswith("k") else int(length)


def random_model(name: str, *, device: str, dtype: torch.dtype, num_layers: int | None = None) -> PreTrainedModel:
    """Build a model of a real model's shape with random weights, directly on the device.

    Matrices are drawn from a normal distribution with deviation 0.02; norms are 1, biases 0. No end-of-sequence token.

    Args:
        name: one of `SHAPES`.
        device: where the weights are made.
        dtype: of weights and cache.
        num_layers: replaces the shape's number of layers.
    """
    config_name, fields = SHAPES[name]
    layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
    config = getattr(transformers, config_name)(**(fields | {"max_position_embeddings": LONGEST} | layers))
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)
