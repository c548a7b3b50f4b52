"""The numbers of a quality measurement: KL, its tail and drift, intervals, effective bits."""

import math

import pytest
import torch
from sample_results import metrics_of
from tiny_models import SLIDING_WINDOW, random_tokens, tiny_model
from transformers import DynamicCache

import ottfx
from ottfx.effective_bits import bits_at_length, cache_bits, quantized_layers
from ottfx.errors import ConfigError
from ottfx.metrics import PositionMetrics, bootstrap_interval, formula_bits, kl_divergence
from ottfx.schemes.base import PAGE, CacheShape, Scheme, SchemeConfig, TensorSpec


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
    assert math.isnan(metrics_of([0.1] * 3).kl_drift) and math.isnan(metrics_of([1e-8] * 6 + [0.1] * 2).kl_drift)


def test_bits_at_other_lengths():
    model = tiny_model("llama", num_hidden_layers=1)
    ottfx.compile(model, bits=2, scheme="ott", exempt_layers=(), lower="eager")
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


def test_dense_layers_and_their_window_count_truthfully():
    model = ottfx.compile(tiny_model("gemma3"), bits=2, exempt_layers=(), lower="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, 16), past_key_values=cache)
    # One layer slides and stays dense. 16 tokens do not fill its window: what it will hold counts, not what it holds.
    assert (quantized_layers(cache), len(cache.layers)) == (1, 2)
    full = cache.layers[1]
    stored = sum(
        formula_bits(half.payload.half.scheme, half.payload.half.config, role, half.payload.half.shape, 2048)
        for role, half in (("key", full.keys), ("value", full.values))
    )
    window = SLIDING_WINDOW - 1
    assert bits_at_length(cache, 2048) == pytest.approx((2048 * stored / 2 + window * 16) / (2048 + window))
