"""An artifact with real heads in bfloat16 on the GPU: the tokens of `ottfx.compile`, padded or not, through growth."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

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


class Follow(LogitsProcessor):
    """Makes a model choose the tokens of a given text, and notes by how much it would have preferred its own."""

    def __init__(self, text):
        self.text = text
        self.shortfall = []

    def __call__(self, input_ids, scores):
        chosen = self.text[:, input_ids.shape[1], None]
        best = scores.max(-1, keepdim=True).values
        step_of_bfloat16 = torch.exp2(best.abs().log2().floor() - 7)
        self.shortfall.append((best - scores.gather(-1, chosen)) / step_of_bfloat16)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


@pytest.mark.xdist_group("artifact_on_gpu")
@pytest.mark.parametrize(("batch_size", "length", "padding"), [(1, 40, 0), (5, 150, 60)])
def test_tokens_are_those_of_the_compiled_model(model, program, batch_size, length, padding):
    """The two are compiled differently, so logits may differ by a rounding, and of equal ones either may be first.

    A random model has many that are nearly equal. So the compiled model reads the artifact's text, and at each of its
    tokens that one must be its own choice but for roundings of the logits.
    """
    tokens = torch.randint(2, 32000, (batch_size, length), device="cuda")
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    text = program.generate(tokens, **options)
    assert text.shape == (batch_size, length + NEW_TOKENS)
    follow = Follow(text)
    ottfx.compile(model, bits=2, exempt_layers=())
    try:
        followed = model.generate(tokens, **options, logits_processor=LogitsProcessorList([follow]))
    finally:
        model._compiled_call_impl = None
    assert torch.equal(followed, text)
    shortfall = torch.cat(follow.shortfall, dim=1)
    print(f"{shortfall.count_nonzero().item()} of {shortfall.numel()} differ, by {shortfall.max().item()} at most")
    assert (shortfall == 0).float().mean() > 0.9
    assert shortfall.max() <= 4
