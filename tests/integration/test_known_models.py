"""The real models that are known by name, with their weights: they load, read, and are quantized as documented."""

import math

import pytest
import torch

from ottfx.errors import ArtifactError
from ottfx.evaluation import default_text, evaluate
from ottfx.models import load_known
from ottfx.results import Variant
from ottfx.teacher_forcing import reference_log_probs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first_token", "perplexity", "stored"),
    [("smollm2", None, 40, (30, 30)), ("gemma3-270m", 2, 60, (3, 18))],
)
def test_a_real_model_reads_and_is_quantized(name, first_token, perplexity, stored):
    try:
        model, tokenizer = load_known(name)
    except ArtifactError as error:
        pytest.skip(str(error))
    ids = tokenizer(default_text(), return_tensors="pt").input_ids[:, :320]
    if first_token is not None:
        assert tokenizer.bos_token_id == ids[0, 0].item() == first_token
    with torch.no_grad():
        log_probs = reference_log_probs(model, ids, 64)
    nll = -log_probs[:-1].gather(-1, ids[0, 65:, None]).mean()
    # A model that is loaded wrongly, or lacks its first token, does not know the language.
    assert nll.item() < math.log(perplexity)
    variant = Variant(label="a", options={"bits": 4, "lower": "eager"})
    (result,) = evaluate(model, ids, [variant], num_tokens=320, start=304)
    assert (result.quantized_layers, result.layers) == stored
    assert 0 < result.mean_kl < 0.05
