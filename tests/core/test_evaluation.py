"""Quality measurement: decoding a text through the real cache, against simulations and against what is refused."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import ottfx
from ottfx.errors import ConfigError
from ottfx.evaluation import default_text, evaluate
from ottfx.results import Variant
from ottfx.teacher_forcing import decode_metrics, reference_log_probs


class NoisyLayer(DynamicLayer):
    """Forgets its keys a little: stands in for a quantized layer."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states * 0.8, value_states, *args, **kwargs)


@pytest.mark.parametrize("prefill", [1, 20, 32])
def test_decoding_through_a_stock_cache_reproduces_the_reference(prefill):
    model, ids = tiny_model("llama"), random_tokens(1, 64)
    with torch.no_grad():
        reference = reference_log_probs(model, ids, 32)
        metrics = decode_metrics(model, ids, DynamicCache(config=model.config), reference, prefill)
    assert len(metrics) == 32
    assert metrics.kl.abs().max() < 1e-5
    assert metrics.top1 == 1.0
    assert metrics.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert metrics.nll[:-1].isfinite().all() and metrics.nll[-1].isnan()


def test_reference_is_the_whole_forward_pass():
    model, ids = tiny_model("gpt2"), random_tokens(1, 24)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, 16:].log_softmax(-1)
        torch.testing.assert_close(reference_log_probs(model, ids, 16), expected)


def test_a_cache_that_forgets_is_noticed():
    model, ids = tiny_model("llama"), random_tokens(1, 64)
    cache = DynamicCache(config=model.config)
    cache.layers = [NoisyLayer() for _ in cache.layers]
    with torch.no_grad():
        metrics = decode_metrics(model, ids, cache, reference_log_probs(model, ids, 32), 16)
    assert metrics.mean_kl > 0.01
    assert cache.get_seq_length() == 64


class SimulatedLayer(DynamicLayer):
    """An independent OTT: a dense cache in which packed tokens are replaced by what a 2-bit store would give back."""

    def __init__(self, group: int, residual: int, seats: int, spill: int) -> None:
        super().__init__()
        self.group, self.residual, self.seats, self.spill = group, residual, seats, spill
        self.packed = 0
        self.pools: dict[int, list[tuple[float, int]]] = {}
        self.spilled: dict[int, int] = {}
        self.stopped: set[int] = set()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Packing waits for the next call: this call's queries see what was stored before it.
        while self.keys.numel() and self.packed + self.group + self.residual <= self.keys.shape[2]:
            for head in range(self.keys.shape[1]):
                self.pack(head, slice(self.packed, self.packed + self.group))
            self.packed += self.group
        return super().update(key_states, value_states, *args, **kwargs)

    def pack(self, head: int, tokens: slice) -> None:
        key, value = self.keys[0, head, tokens], self.values[0, head, tokens]
        winners = self.winners(head, tokens)
        kept = torch.tensor([t in winners for t in range(tokens.start, tokens.stop)])
        filled = torch.where(kept[:, None], key[~kept].mean(0), key)
        self.keys[0, head, tokens] = torch.where(kept[:, None], key, on_grid(filled, 0))
        self.values[0, head, tokens] = torch.where(kept[:, None], value, on_grid(value, 1))

    def winners(self, head: int, tokens: slice) -> set[int]:
        if head in self.stopped or self.seats == 0:
            return set()
        pool = self.pools.get(head, [])
        scores = self.keys[0, head, tokens].abs().sum(-1).tolist()
        seated = sorted(pool + list(zip(scores, range(tokens.start, tokens.stop), strict=True)))[: self.seats]
        spilled = self.spilled.get(head, 0) + len(set(pool) - set(seated))
        if spilled >= max(self.spill, 1):
            self.stopped.add(head)
        if spilled > self.spill:
            return set()
        self.pools[head], self.spilled[head] = seated, spilled
        return {t for _, t in seated if t >= tokens.start}


def on_grid(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Round to four levels between the extremes along `dim`, with fp16 scale and offset."""
    low = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - low) / 3).half().float()
    return ((x - low) / scale).round().clamp(0, 3) * scale + low


@pytest.mark.parametrize(("seats", "spill"), [(0, 0), (3, 3), (2, 32)], ids=["no pool", "pool 3+3", "pool 2+32"])
def test_the_real_cache_decodes_as_an_independent_simulation_of_it(seats, spill):
    model, ids = tiny_model("llama"), random_tokens(1, 200)
    options = dict(scheme="ott", bits=2, group_size=32, residual_length=8, exempt_layers=(), lower="eager")
    variant = Variant(label="real", options=options | dict(outlier_capacity=seats, spill_capacity=spill))
    (real,) = evaluate(model, ids, [variant], num_tokens=200, start=64)
    cache = DynamicCache(config=model.config)
    cache.layers = [SimulatedLayer(32, 8, seats, spill) for _ in cache.layers]
    with torch.no_grad():
        model = tiny_model("llama")  # not the compiled one
        simulated = decode_metrics(model, ids, cache, reference_log_probs(model, ids, 64), 64)
    assert simulated.mean_kl > 0.01
    torch.testing.assert_close(real.metrics.kl, simulated.kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(real.metrics.nll, simulated.nll, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_evaluate_measures_each_variant_and_reports_steps(dense_compile):
    steps = []
    results = evaluate(
        tiny_model("llama"),
        random_tokens(1, 80),
        [Variant(label="a", options={"scheme": "none"}), Variant(label="b", options={"bits": 2})],
        num_tokens=48,
        start=32,
        model_name="tiny",
        on_step=lambda *step: steps.append(step),
    )
    assert dense_compile == [{"scheme": "none"}, {"bits": 2}]
    assert [r.label for r in results] == ["a", "b"]
    assert steps[0] == ("a", 33, 48) and steps[-1] == ("b", 48, 48) and len(steps) == 32
    for result in results:
        assert result.mean_kl < 1e-5 and result.top1 == 1.0
        assert (result.bits_held, result.bits_formula, result.description) == (32.0, 16.0, "dense")
        assert result.kl_low <= result.mean_kl <= result.kl_high
        assert (result.conditions.tokens, result.conditions.start, result.conditions.prefill) == (48, 32, 32)
        assert result.conditions.model == "tiny" and result.conditions.text_sha256 == ""
    assert results[0].conditions == results[1].conditions


def test_a_run_that_breaks_off_has_reported_what_it_measured(dense_compile, monkeypatch):
    whole, done = ottfx.compile, []

    def break_at_second(model, **options):
        if done:
            raise RuntimeError("out of memory")
        return whole(model, **options)

    monkeypatch.setattr(ottfx, "compile", break_at_second)
    variants = [Variant(label=label, options={}) for label in "ab"]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(tiny_model("llama"), random_tokens(1, 80), variants, num_tokens=48, start=32, on_result=done.append)
    assert [r.label for r in done] == ["a"]


def test_options_alone_are_a_variant(dense_compile):
    options = [{"scheme": "none"}, {"scheme": "kivi", "bits": 2}, {}]
    results = ottfx.evaluate(tiny_model("llama"), random_tokens(1, 80), options, num_tokens=48, start=32)
    assert dense_compile == options
    assert [result.label for result in results] == ["scheme=none", "scheme=kivi bits=2", "default"]


def test_no_variant_is_measured_if_one_cannot_work(dense_compile):
    options = [{"scheme": "none"}, {"scheme": "ott+", "range_search": "no", "dynamic": False}]
    with pytest.raises(ConfigError, match="range_search must be True or False"):
        ottfx.evaluate(tiny_model("llama"), random_tokens(1, 80), options, num_tokens=48, start=32)
    assert dense_compile == []


def test_evaluate_tokenizes_text(dense_compile):
    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % VOCAB_SIZE for c in text]]))

    (result,) = evaluate(
        tiny_model("llama"), tokenizer, [Variant(label="a", options={})], text="abcd" * 9, num_tokens=20, start=16
    )
    assert len(result.conditions.text_sha256) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tokens=90, start=16), "at least num_tokens=90 tokens. Got 80"),
        (dict(num_tokens=48, start=48), "prefill <= start < num_tokens"),
        (dict(num_tokens=48, start=16, prefill=17), "Got prefill=17, start=16"),
        (dict(num_tokens=48, start=0), "prefill=0"),
    ],
)
def test_evaluate_refuses_what_cannot_be_scored(arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(tiny_model("llama"), random_tokens(1, 80), [], **arguments)


def test_evaluate_refuses_a_context_that_is_too_short():
    with pytest.raises(ConfigError, match="at most 40 tokens"):
        evaluate(tiny_model("llama", max_position_embeddings=40), random_tokens(1, 80), [], num_tokens=48, start=16)


def test_default_text_is_the_documented_excerpt():
    text = default_text()
    assert text.startswith("Persuasion\n") and "Sir Walter Elliot, of Kellynch Hall" in text[:200]
    assert 140_000 < len(text.encode()) < 150_000
    documented = Path(__file__).parents[2] / "ottfx/data/README.md"
    assert hashlib.sha256(text.encode()).hexdigest() in documented.read_text(encoding="utf-8")
