"""An artifact with real heads in bfloat16 on the GPU: the tokens of `ottfx.compile`, padded or not, through growth."""

import pytest
import torch

import ottfx
from benchmarks.shapes import random_model

pytestmark = pytest.mark.gpu

NEW_TOKENS = 256


@pytest.fixture(scope="module")
def model():
    return random_model("llama-3-8b", device="cuda", dtype=torch.bfloat16, num_layers=2)


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    path = ottfx.export(model, tmp_path_factory.mktemp("artifact") / "llama.pt2", bits=2, exempt_layers=())
    return ottfx.load(path)


@pytest.mark.xdist_group("artifact_on_gpu")
@pytest.mark.parametrize(("batch_size", "length", "padding"), [(1, 40, 0), (5, 150, 60)])
def test_tokens_equal_those_of_the_compiled_model(model, program, batch_size, length, padding):
    tokens = torch.randint(2, 32000, (batch_size, length), device="cuda")
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    got = program.generate(tokens, **options)
    ottfx.compile(model, bits=2, exempt_layers=())
    try:
        want = model.generate(tokens, **options)
    finally:
        model._compiled_call_impl = None
    assert got.shape == want.shape == (batch_size, length + NEW_TOKENS)
    # A random model's logits lie close together: after the first difference two texts have nothing in common.
    agree = (got == want)[:, length:].cumprod(1).sum(1)
    assert agree.min() == NEW_TOKENS, agree.tolist()
