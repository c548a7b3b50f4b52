"""The models the other tests stand on: they must read their whole context, and decode as they prefill."""

import pytest
import torch
from plain_decoder import greedy, plain_decoder
from tiny_models import FAMILIES, SLIDING_WINDOW, random_tokens, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_model_reads_far_context(family):
    model = tiny_model(family)
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 128
    logits, other = model(tokens).logits[:, -1], model(changed).logits[:, -1]
    # A token 20 places back must move the prediction clearly, or no test of a cache could fail.
    assert (logits - other).norm() > 0.02 * logits.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_greedy_over_the_full_forward(family):
    model = tiny_model(family)
    prompt = random_tokens(1, 2 * SLIDING_WINDOW)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert out.shape == (1, prompt.shape[1] + 6)
    logits = model(out[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), out[:, prompt.shape[1] :])


def test_models_are_reproducible():
    first, second = tiny_model("llama"), tiny_model("llama")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_plain_decoder_cache_equals_recomputation(num_kv_heads):
    model = plain_decoder(num_kv_heads=num_kv_heads)
    tokens, cache = greedy(model, random_tokens(2, 17), 8)
    logits, _ = model(tokens[:, :-1])
    assert torch.equal(logits[:, 16:].argmax(-1), tokens[:, 17:])
    assert cache[0][0].shape == (2, num_kv_heads, 24, 16)
