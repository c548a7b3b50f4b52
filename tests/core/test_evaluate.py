"""Quality measurement: the numbers, the decoding loop, the files and the command."""

import csv
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from typer.testing import CliRunner

import ottfx
from ottfx.errors import ConfigError
from ottfx.eval_command import default_variants
from ottfx.evaluate import bits_at_length, cache_bits, decode_metrics, default_text, evaluate, reference_log_probs
from ottfx.metrics import PositionMetrics, bootstrap_interval, formula_bits, kl_divergence
from ottfx.results import Conditions, Result, Variant, csv_table, json_text, markdown_table, write_results
from ottfx.schemes.base import PAGE, CacheShape, Scheme, SchemeConfig, TensorSpec
from ottfx.study import EQUAL_BITS, STUDY, study_table, study_variants


class PaperCounting(Scheme):
    """Only what the formula reads: a 2-bit code, fp16 scales, a residual of 32 flushed by groups, a pool."""

    name, config_class, citation = "paper-counting", SchemeConfig, ""
    append_op = attend_op = None
    pool, group = 6, 128

    def check(self, config, shape):
        return None

    def state_spec(self, config, role, shape):
        lead = (shape.batch_size, shape.num_kv_heads)
        groups = PAGE // self.group * shape.head_dim if role == "key" else PAGE * max(1, shape.head_dim // self.group)
        return {
            "codes": TensorSpec(shape=(*lead, shape.pages, 8 * shape.head_dim), dtype=torch.int32, part="codes"),
            "scale": TensorSpec(shape=(*lead, shape.pages, 2 * groups), dtype=torch.float16, part="scales"),
            "ring": TensorSpec(shape=(*lead, 32 + self.group, shape.head_dim), dtype=shape.dtype, part="residual"),
            "pool": TensorSpec(shape=(*lead, self.pool, shape.head_dim), dtype=shape.dtype, part="pool"),
        }

    def constants(self, config):
        return ()

    def packed_length(self, config, role, length, packed):
        return max(packed, (length - 32) // self.group * self.group, 0)

    def read(self, config, role, state, packed, length):
        raise NotImplementedError

    def rewind(self, config, role, state, packed, in_ring, length):
        raise NotImplementedError


def cache_shape(**sizes: int) -> CacheShape:
    return CacheShape(head_dim=64, dtype=torch.float32, device=torch.device("cpu"), **sizes)


def dense_cache_of(tensor: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    cache.update(tensor, tensor, 0)
    return cache


def metrics_of(kl: list[float], nll: float = 2.0, reference_nll: float = 2.0) -> PositionMetrics:
    values = torch.tensor(kl)
    return PositionMetrics(
        kl=values,
        agrees=values < 0.5,
        nll=torch.full_like(values, nll),
        reference_nll=torch.full_like(values, reference_nll),
    )


def result_of(label: str, kl: list[float]) -> Result:
    metrics = metrics_of(kl, nll=2.1)
    conditions = Conditions(
        model="tiny", text_sha256="ab", tokens_sha256="cd", tokens=9, start=5, prefill=5, dtype="float32",
        device="CPU", attention="sdpa", versions="torch 0", date="today",
    )  # fmt: skip
    return Result(
        label=label, description="described", mean_kl=metrics.mean_kl, kl_low=0.0, kl_high=1.0, top1=metrics.top1,
        perplexity=metrics.perplexity, perplexity_ratio=metrics.perplexity_ratio, bits_held=3.5, bits_formula=3.0,
        kl_p99=metrics.p99_kl, kl_drift=metrics.kl_drift, bits_2k=3.1, bits_8k=2.6, bits_32k=2.4,
        seconds=1.0, conditions=conditions, metrics=metrics,
    )  # fmt: skip


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_the_definition_and_not_symmetric():
    full = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    expected = torch.tensor([0.25 * math.log(2), 0.8 * math.log(8) - 0.1 * math.log(8)])
    torch.testing.assert_close(kl_divergence(full.log(), other.log()), expected)
    assert not torch.allclose(kl_divergence(full.log(), other.log())[1], kl_divergence(other.log(), full.log())[0])


def test_kl_of_an_impossible_token_is_not_nan():
    full = torch.tensor([0.5, 0.5, 0.0]).log()
    assert kl_divergence(full, full) == 0.0
    assert kl_divergence(full, torch.tensor([1.0, 0.0, 0.0]).log()).isinf()


def test_position_metrics_ignore_the_last_token_that_has_no_next():
    metrics = PositionMetrics(
        kl=torch.tensor([0.1, 0.3]),
        agrees=torch.tensor([True, False]),
        nll=torch.tensor([1.5, torch.nan]),
        reference_nll=torch.tensor([1.0, torch.nan]),
    )
    assert metrics.mean_kl == pytest.approx(0.2)
    assert metrics.top1 == 0.5
    assert metrics.perplexity == pytest.approx(math.exp(1.5))
    assert metrics.perplexity_ratio == pytest.approx(math.exp(0.5))


def test_tail_and_drift():
    rising = metrics_of([0.1] * 50 + [0.2] * 149 + [9.0])
    assert rising.p99_kl == pytest.approx(0.2) and metrics_of([0.0] * 97 + [5.0] * 3).p99_kl == pytest.approx(5.0)
    assert metrics_of([0.1] * 50 + [0.7] * 100 + [0.3] * 50).kl_drift == pytest.approx(3.0)
    assert math.isnan(metrics_of([0.1] * 3).kl_drift) and math.isnan(metrics_of([0.0] * 8).kl_drift)


def test_bits_at_other_lengths():
    model = ottfx.compile(tiny_model("llama", num_hidden_layers=1), bits=2, exempt_layers=(), lower="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, 200), past_key_values=cache)
    bits = [bits_at_length(cache, length) for length in (200, 2048, 8192, 32768)]
    assert bits[0] == bits_at_length(cache) == pytest.approx(cache_bits(cache)[1])
    assert bits == sorted(bits, reverse=True)
    # Heads of 16 channels: codes, a scale and a zero point for 128 tokens or 16 channels; then window and pool.
    assert 3.1 < bits[3] < bits[2] < bits[1] < bits[0] < 16
    assert bits_at_length(dense_cache_of(torch.zeros(1, 1, 9, 4)), 2048) == 16.0


def test_bootstrap_interval_holds_the_mean_and_widens_with_correlation():
    noise = torch.randn(1792).abs()
    low, high = bootstrap_interval(noise)
    assert low < noise.mean() < high
    # Blocks that agree inside carry less information than the same number of independent positions.
    correlated = torch.randn(28).abs().repeat_interleave(64)
    wide = bootstrap_interval(correlated, block=64)
    narrow = bootstrap_interval(correlated, block=1)
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert bootstrap_interval(torch.full((100,), 0.25)) == pytest.approx((0.25, 0.25))


def test_bootstrap_interval_refuses_no_values():
    with pytest.raises(ConfigError, match="Got 0 values"):
        bootstrap_interval(torch.tensor([]))


@pytest.mark.parametrize(("length", "expected"), [(2048, 3.06), (8192, 2.55)])
def test_formula_bits_are_those_of_the_study(length, expected):
    shape = cache_shape(batch_size=2, num_kv_heads=3, pages=99)
    scheme = PaperCounting()
    bits = [formula_bits(scheme, SchemeConfig(), role, shape, length) for role in ("key", "value")]
    assert sum(bits) / 2 == pytest.approx(expected, abs=0.006)


def test_formula_bits_of_a_cache_shorter_than_its_window_are_16():
    shape = cache_shape(batch_size=1, num_kv_heads=1, pages=1)
    scheme = PaperCounting()
    scheme.pool = 0
    assert formula_bits(scheme, SchemeConfig(), "key", shape, 8) == 16.0


# -- the loop ----------------------------------------------------------------------------------------------------------


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
    options = dict(bits=2, group_size=32, residual_length=8, exempt_layers=(), lower="eager")
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


@pytest.fixture
def dense_compile(monkeypatch):
    """`ottfx.compile` that leaves the model alone, and a memory report of dense tensors."""
    seen = []

    def compile(model, **options):
        seen.append(options)
        return model

    def memory_footprint(cache):
        return SimpleNamespace(total=sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))

    monkeypatch.setattr(ottfx, "compile", compile, raising=False)
    monkeypatch.setattr(ottfx, "memory_footprint", memory_footprint, raising=False)
    return seen


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
    assert 50_000 < len(text.encode()) <= 64 * 1024


# -- files, study, command ---------------------------------------------------------------------------------------------


def test_results_survive_json_and_csv():
    results = [result_of("a", [0.1, 0.2]), result_of("b", [0.3, 0.6])]
    loaded = json.loads(json_text(results))
    assert [row["mean_kl"] for row in loaded] == [r.mean_kl for r in results]
    assert loaded[0]["conditions"] == dataclasses.asdict(results[0].conditions)
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [float(row["top1"]) for row in rows] == [1.0, 0.5]
    assert rows[1]["label"] == "b" and rows[1]["model"] == "tiny" and "metrics" not in rows[1]


def test_markdown_states_the_conditions_once():
    table = markdown_table([result_of("a", [0.1, 0.2]), result_of("b", [0.3, 0.6])])
    assert "| a | 3.00 | 3.50 | 2.60 | 0.1500 | 0.0000 to 1.0000 | 0.199 | nan | 1.000 | 1.105 |" in table
    assert table.count("tiny, float32 on CPU") == 1 and "positions 5 to 8 are scored" in table


def test_write_results_by_suffix(tmp_path):
    results = [result_of("a", [0.1])]
    assert [f.name for f in write_results(results, tmp_path / "new" / "q")] == ["q.json", "q.csv", "q.md"]
    assert [f.name for f in write_results(results, tmp_path / "only.csv")] == ["only.csv"]
    assert json.loads((tmp_path / "new" / "q.json").read_text())[0]["label"] == "a"
    with pytest.raises(ConfigError, match="must end in one of"):
        write_results(results, tmp_path / "q.xlsx")


def test_study_table_compares_with_the_anchor():
    ott, kivi = EQUAL_BITS
    anchor = {row.variant.label: row.anchor for row in STUDY}[ott].mean_kl
    near = study_table([result_of(ott, [anchor * 1.1] * 128), result_of(kivi, [0.38] * 128)])
    assert "+10.0%, within 20%" in near and "(paired): better." in near
    far = study_table([result_of(ott, [anchor * 2] * 128), result_of(kivi, [0.38] * 128)])
    assert "+100.0%, OUTSIDE 20%" in far and "(paired): worse." in far
    assert "paired" not in study_table([result_of(ott, [0.1] * 128)])


def test_study_labels_are_unique_and_selectable():
    labels = [row.variant.label for row in STUDY]
    assert len(set(labels)) == len(labels) and set(EQUAL_BITS) <= set(labels)
    assert [v.label for v in study_variants([labels[2], labels[0]])] == [labels[0], labels[2]]


def test_default_variants_of_the_command():
    options = [v.options for v in default_variants([" none", "ott", ""], ["4"])]
    assert options == [{"scheme": "none"}, {"scheme": "ott", "bits": 4}]
    variants = default_variants(["none", "ott", "kivi"], ["2", " 3"])
    assert [v.label for v in variants] == ["none", "ott 2-bit", "ott 3-bit", "kivi 2-bit", "kivi 3-bit"]
    assert variants[2].options == {"scheme": "ott", "bits": 3}
    with pytest.raises(ConfigError, match="at least one scheme"):
        default_variants([" "])
    for widths in ([], ["two"], ["2", "-3"]):
        with pytest.raises(ConfigError, match="must be whole numbers"):
            default_variants(["ott"], widths)


def test_command_writes_what_it_measured(dense_compile, monkeypatch, tmp_path):
    import typer

    import ottfx.models
    from ottfx.evaluate import register

    def load(dtype, notify):
        notify("loading")
        return tiny_model("llama"), lambda text, return_tensors: SimpleNamespace(input_ids=random_tokens(1, 40))

    monkeypatch.setattr(ottfx.models, "load_smollm2", load)
    app = typer.Typer()
    app.command("other")(lambda: None)
    register(app)
    arguments = "eval --schemes ott --tokens 40 --start 32 --device cpu --out".split()
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "q.json")])
    assert done.exit_code == 0, done.output
    assert dense_compile == [{"scheme": "ott", "bits": 2}]
    (row,) = json.loads((tmp_path / "q.json").read_text())
    assert row["label"] == "ott" and row["conditions"]["model"] == "SmolLM2-135M-Instruct"
    assert "mean KL" in done.output
    refused = CliRunner().invoke(app, ["eval", "--dtype", "int8"])
    assert refused.exit_code == 1 and "Got 'int8'" in refused.output
