"""The benchmark of `generate`: whose time it tells, what it counts, and the searches for the largest size."""

from __future__ import annotations

import argparse
import importlib
import time
from types import SimpleNamespace

import pytest
import torch
from fake_recorder import recording_on_cpu
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import generation as module
from benchmarks.compiled_kernels import storing_microseconds
from benchmarks.configurations import CONFIGURATIONS, Quantization, scheme_option
from benchmarks.generation import WARM_UP_TOKENS, Generation, Workload, weight_bytes
from benchmarks.search import largest_that_fits
from benchmarks.shapes import random_model
from benchmarks.timing import kernel_times

EAGER = CONFIGURATIONS["dynamic-eager"]
SHORT = Workload(batch_size=2, start=20, synthetic=False, new_tokens=6)


@pytest.fixture
def generation():
    return Generation(
        random_model("tiny", device="cpu", dtype=torch.float32),
        Quantization(lower="eager"),
        profiled=0,
        read_ceiling=1e9,
    )


def slow_forward(model, calls):
    """Let the calls of forward whose number is in `calls` take 50 ms more."""
    numbers = iter(range(10**6))
    return model.register_forward_hook(lambda *_: time.sleep(0.05) if next(numbers) in calls else None)


def test_the_time_of_forward_and_of_the_loop_around_it_are_told_apart(generation):
    slow_forward(generation.model, range(1000))
    row = generation.measure(EAGER, SHORT)
    assert row["forward_ms"] >= 50 and row["forward_host_ms"] >= 50 and row["first_token_s"] >= 0.05
    assert row["step_ms"] >= row["forward_ms"] and 0 < row["outside_ms"] < 50
    assert row["device_ms"] is None and row["idle_ms"] is None
    assert "prepare_inputs_for_generation" not in generation.model.__dict__


def test_the_floor_is_one_read_of_weights_and_cache(generation):
    row = generation.measure(EAGER, SHORT)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    weights = (2 * layer + 64 + 64 * 128) * 4  # the output's matrix is read, the embedding's is not
    assert weight_bytes(generation.model) == weights
    # 1 GB/s is 1e6 bytes a millisecond; the cache is read at its mean length.
    assert row["floor_ms"] == pytest.approx((weights + row["cache_bytes"] * 23 / 26) / 1e6)
    generation.model.lm_head.weight = generation.model.model.embed_tokens.weight
    assert weight_bytes(generation.model) == weights


def test_the_run_that_compiles_is_not_counted_into_times(generation):
    workload = Workload(batch_size=2, start=20, synthetic=False, new_tokens=WARM_UP_TOKENS + 2)
    slow_forward(generation.model, range(WARM_UP_TOKENS))
    row = generation.measure(EAGER, workload)
    assert row["step_ms_p90"] < 50 and row["first_token_s"] < 0.05
    assert row["compile_s"] > 0.05 * WARM_UP_TOKENS / 2
    assert row["tokens_per_s"] > workload.batch_size / 0.05


def test_recordings_replays_and_recompilations_of_the_measured_run_are_counted(generation):
    before = module._counts()
    with recording_on_cpu():
        row = generation.measure(CONFIGURATIONS["ottfx-graphs"], SHORT)
    assert module._counts()["graphs_compiled"] >= before["graphs_compiled"] + 2, "the first run compiles two graphs"
    assert row["graphs_compiled"] == row["refusals"] == 0
    # The cache is at new addresses: one step runs directly, the next is recorded and replayed.
    assert (row["warmups"], row["recordings"], row["replays"]) == (1, 1, SHORT.new_tokens - 2)
    assert row["scheme"] == "ott+ 2-bit, group 128, residual 32, seats 1"


@given(limit=st.integers(0, 300), start=st.integers(1, 100), most=st.integers(1, 400))
def test_the_largest_size_is_found(limit, start, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = largest_that_fits(fits, start=start, most=most, precision=1 / 16)
    assert found <= min(limit, most) and max(tried) <= most
    assert found == most or min(limit, most) - found < max(1, found / 16)
    assert len(tried) == len(set(tried)) <= 20


def lacking_memory(monkeypatch, name, limit):
    """Let a method of Generation run out of memory for batches above `limit`."""
    original = getattr(Generation, name)

    def method(self, way, workload):
        if workload.batch_size > limit:
            raise torch.OutOfMemoryError("no memory")
        return original(self, way, workload)

    monkeypatch.setattr(Generation, name, method)


def largest_batch(generation, most=64):
    def make(batch_size):
        return Workload(batch_size=batch_size, start=20, synthetic=False, new_tokens=6)

    return generation.measure_largest(EAGER, make, start=2, most=most)


def test_the_largest_batch_is_the_one_before_memory_ends(generation, monkeypatch):
    lacking_memory(monkeypatch, "_decode_a_little", 5)
    workload, row = largest_batch(generation)
    assert workload.batch_size == 5 and row["stopped_by"] == "out of memory"
    assert row["cache_bytes"] == 2 * 2 * 5 * 2 * 25 * 16 * 4


def test_a_measurement_that_lacks_memory_is_repeated_with_less(generation, monkeypatch):
    lacking_memory(monkeypatch, "measure", 6)
    workload, row = largest_batch(generation, most=8)
    assert workload.batch_size == 6 and row["stopped_by"] == "the largest size that is tried"


def test_nothing_fits(generation, monkeypatch):
    lacking_memory(monkeypatch, "_decode_a_little", 0)
    with pytest.raises(RuntimeError, match="nothing fits: out of memory"):
        largest_batch(generation)


def test_a_size_is_tried_at_its_final_length(generation, monkeypatch):
    lengths = []
    run = Generation._run
    monkeypatch.setattr(
        Generation, "_run", lambda *args, **more: lengths.append(run(*args, **more).get_seq_length()) or args[1]
    )
    assert generation._try(EAGER, SHORT) is None
    assert lengths == [20 + 2, 20 + 6]


def test_only_what_ran_on_the_device_counts_as_its_time():
    def event(key, kind, microseconds=5.0, marked=False):
        device = getattr(torch.autograd.DeviceType, kind)
        return SimpleNamespace(key=key, device_type=device, device_time_total=microseconds, is_user_annotation=marked)

    events = [event("gemm", "CUDA"), event("launch", "CPU"), event("range", "CUDA", marked=True)]
    assert kernel_times([*events, event("nothing", "CUDA", 0.0)]) == {"gemm": 5.0}


def test_the_time_of_storing_is_that_of_the_kernels_behind_append():
    for name in ("affine_append", "affine_decode"):
        importlib.import_module(f"ottfx.kernels.{name}")
    times = {"_store_tokens_kernel": 1.0, "_encode_key_pages_kernel_0": 2.0, "_decode_kernel": 4.0, "gemm": 8.0}
    assert storing_microseconds(times) == 3.0


def test_options_of_a_scheme():
    assert scheme_option("group_size=64") == ("group_size", 64)
    assert scheme_option("exempt_layers=()") == ("exempt_layers", ())
    assert scheme_option("replacement=group") == ("replacement", "group")
    config = Quantization(scheme="ott", options=(("group_size", 64), ("residual_length", 0))).config()
    assert config.describe() == "ott 2-bit, group 64, residual 0, pool 3+32"
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
        scheme_option("group_size")
