"""The random model with large key biases: the same every time, and as hard as it claims."""

import torch

from ottfx.cache_fidelity import attention_output, sqnr_db
from ottfx.dense_run import run_dense
from ottfx.evaluation import default_text
from ottfx.models import TITLES, load_known
from ottfx.reference import dequantize_affine, quantize_affine


def on_grid(keys: torch.Tensor, dim: int) -> torch.Tensor:
    """Keys [heads, tokens, channels] rounded to 4 levels along an axis."""
    return dequantize_affine(*quantize_affine(keys, 2, dim=dim), dim=dim)


def test_biased_channels_spoil_a_grid_along_tokens_only():
    model, tokenizer = load_known("random-qwen2")
    ids = tokenizer(default_text()[:256], return_tensors="pt").input_ids
    assert ids.shape == (1, 256) and ids.max() < model.config.vocab_size
    for asked in run_dense(model, ids):
        means = asked.key.mean(1).abs()
        assert ((means > 30).sum(-1) == 6).all() and (means.median(-1).values < 1).all()
        exact = attention_output(asked, asked.key, asked.value)
        by_channel, by_token = (
            sqnr_db(exact, attention_output(asked, on_grid(asked.key, dim), asked.value)).mean() for dim in (1, 2)
        )
        assert by_channel > by_token + 10


def test_it_is_the_same_every_time_and_says_what_it_does():
    torch.manual_seed(1)
    said = []
    one, _ = load_known("random-qwen2", notify=said.append)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two, tokenizer = load_known("random-qwen2", torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert said == ["building a random Qwen2"] and "random-qwen2" in TITLES
    assert tokenizer.decode(tokenizer("Anne Elliot")["input_ids"]) == "Anne Elliot"
