"""The compiled model on a card: the same tokens as the uncompiled one, and no host synchronization in a step."""

import copy

import pytest
import torch
from device_waits import no_device_waits
from tiny_models import random_tokens, tiny_model

import ottfx
from ottfx.kv_tensor import KVTensor

pytestmark = pytest.mark.gpu


def generate(model, ids, new_tokens, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def test_none_gives_the_same_tokens_through_inductor():
    model = tiny_model("llama").cuda()
    twin = ottfx.compile(copy.deepcopy(model), scheme="none")
    ids = random_tokens(3, 100).cuda()
    want, got = generate(model, ids, 200), generate(twin, ids, 200)
    assert torch.equal(want.sequences, got.sequences)
    assert type(got.past_key_values.layers[0].keys) is KVTensor


@pytest.mark.parametrize(
    "scheme, dtype, fields",
    [
        ("kivi", torch.float32, {}),
        ("ott", torch.float32, {}),
        # Of one wide kv head there may be more parts than a program joins at once.
        ("ott", torch.float16, {"head_dim": 256, "num_key_value_heads": 1}),
        ("ott+", torch.float16, {"head_dim": 256, "num_key_value_heads": 1}),
    ],
)
def test_inductor_and_eager_lowering_agree(scheme, dtype, fields):
    model = tiny_model("llama", **fields).to("cuda", dtype)
    ids = random_tokens(2, 400).cuda()
    logits = []
    for lower in ("inductor", "eager"):
        # With 2 bits a code that differs by one at a tie changes everything behind it; 8 bits forgive.
        twin = ottfx.compile(copy.deepcopy(model), bits=8, scheme=scheme, lower=lower)
        with torch.no_grad():
            cache = twin(ids[:, :300]).past_key_values
            steps = []
            for t in range(300, 400):
                out = twin(ids[:, t : t + 1], past_key_values=cache)
                cache = out.past_key_values
                steps.append(out.logits)
        logits.append(torch.cat(steps, dim=1))
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 0.02


@pytest.mark.parametrize("scheme", ["none", "kivi", "ott"])
def test_a_step_does_not_wait_for_the_device(scheme):
    model = ottfx.compile(tiny_model("llama").cuda(), scheme=scheme)
    ids = random_tokens(2, 300).cuda()
    with torch.no_grad():
        cache = model(ids).past_key_values
        for _ in range(2):
            cache = model(ids[:, :1], past_key_values=cache).past_key_values
        with no_device_waits():
            for _ in range(140):
                cache = model(ids[:, :1], past_key_values=cache).past_key_values
    assert cache.get_seq_length() == 442


def test_smollm2_none_equals_the_uncompiled_model(load_smollm2):
    model, tokenizer = load_smollm2(torch.float32)
    model.cuda()
    inputs = tokenizer(["The history of the bicycle begins", "def fibonacci(n):"], return_tensors="pt", padding=True)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    want = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    ottfx.compile(model, scheme="none")
    got = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    assert torch.equal(want, got)
