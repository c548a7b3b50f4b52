"""A random model whose keys are hard to quantize: the shape of Qwen2.5, with its huge key biases, in small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY_BIAS = 60.0
"""Size of the bias in a channel that has one; the other channels of a key have a standard deviation of about 1."""
BIASED_PAIRS = (20, 25, 30)
"""The rotary pairs of each head whose channels have it: slow ones, as in the trained models."""


def load_random_qwen2(
    dtype: torch.dtype = torch.float32, *, notify: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a Qwen2 of random weights: 4 layers, 4 query and 2 KV heads of 64, context 32768; the same every time.

    Six channels of each key head carry a bias of 60, which the same channels of every token share. A grid along a
    token (or a rotation that mixes channels) drowns all others in it; a grid along a channel does not see it.
    Tokens are the bytes of a text. The model has learned nothing: read its KL, not its perplexity or answers.

    Args:
        dtype: of the weights, and so of the unquantized cache.
        notify: told what happens next.

    Returns:
        The model on the CPU in eval mode, and a tokenizer of 256 tokens.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if notify is not None:
        notify("building a random Qwen2")
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.0625,  # 1 / sqrt(hidden_size): a projection of normal inputs is normal
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    head_dim = config.hidden_size // config.num_attention_heads
    channels = torch.tensor([pair + offset for pair in BIASED_PAIRS for offset in (0, head_dim // 2)])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(-1, head_dim)
            signs = torch.randint(0, 2, (bias.shape[0], len(channels))) * 2.0 - 1
            bias[:, channels] = KEY_BIAS * signs
    return model.to(dtype).eval(), _byte_tokenizer()


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
