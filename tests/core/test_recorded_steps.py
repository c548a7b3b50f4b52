"""Recorded steps: when they are recorded and replayed, and that a step runs once whatever happens. No GPU needed."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder, recording_on_cpu
from tiny_models import random_tokens, tiny_model

import ottfx
from ottfx import graph_compiler
from ottfx.recorders import RecordingPool
from ottfx.schemes.base import PAGE
from ottfx.step_graph import MOST_RECORDINGS, StepGraph, StepInput, counters

CPU = torch.device("cpu")
MODE = {"lower": "eager", "mode": "reduce-overhead"}
WEIGHT, STATE, COPIED, NUMBER = (StepInput(kind=kind) for kind in ("weight", "state", "copied", "number"))


class Decoder:
    """A step that adds `weight * x` to its state once a call, and returns the state and the sum of its mask."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        inputs = [WEIGHT, STATE, COPIED, StepInput(kind="copied", widened=1), NUMBER,
                  StepInput(kind="number", below_capacity=1), NUMBER]  # fmt: skip
        self.step_graph = StepGraph(self.inner, inputs, 4, CPU, RecordingPool())
        self.weight = torch.full((2,), 2.0)

    def inner(self, weight, state, x, mask, pages, past, batch):
        self.calls.append((weight.data_ptr(), state.data_ptr(), x.data_ptr(), mask.data_ptr(), pages, past, batch))
        state += weight * x
        return state, mask.sum(1)

    def __call__(self, state, storage, x, length, pages=2, batch=1):
        arguments = [self.weight, None, x, torch.ones(1, length), pages, length - 1, batch]
        return self.step_graph(arguments, [storage], lambda: [state])


def test_one_recording_serves_all_lengths():
    with recording_on_cpu():
        decoder, state, storage = Decoder(), torch.zeros(2), object()
        for step in range(1, 6):
            results = decoder(state, storage, torch.full((2,), float(step)), 10 + step)
            assert results[0].tolist() == [step * (step + 1.0)] * 2
            # Buffers are as wide as the storage; what lies behind the mask is not new.
            assert results[1].tolist() == [10.0 + step]
            assert results[0].data_ptr() != state.data_ptr(), "the caller's own"
        assert counters == {"warmups": 1, "recordings": 1, "replays": 4}
        assert len(set(decoder.calls)) == 1 and decoder.calls[0][-3:] == (2, 2 * PAGE - 1, 1)


def test_other_addresses_are_other_recordings():
    with recording_on_cpu():
        decoder, x = Decoder(), torch.ones(2)
        caches = [(torch.zeros(2), object()) for _ in range(2)]
        for step in range(1, 5):
            for state, storage in caches:
                assert decoder(state, storage, x, 9)[0].tolist() == [2.0 * step] * 2
        # Alternating, neither is ever seen twice in a row before it is recorded.
        assert counters == {"warmups": 8}
        for state, storage in caches:
            for _ in range(3):
                decoder(state, storage, x, 9)
        for state, storage in caches:
            decoder(state, storage, x, 9)
        assert counters == {"warmups": 10, "recordings": 2, "replays": 6}
        assert [state.tolist() for state, _ in caches] == [[16.0] * 2] * 2


def test_storage_of_another_size_or_weights_elsewhere():
    with recording_on_cpu():
        decoder, x, state = Decoder(), torch.ones(2), torch.zeros(2)
        storage = object()
        for _ in range(3):
            decoder(state, storage, x, 9)
        grown = torch.zeros(2)
        storage = object()
        results = [decoder(grown, storage, x, 300, pages=3) for _ in range(3)]
        assert results[-1][0].tolist() == [6.0, 6.0] and results[-1][1].tolist() == [300.0]
        assert counters == {"warmups": 1, "recordings": 2, "replays": 5}
        decoder.weight = torch.full((2,), 5.0)
        assert decoder(grown, storage, x, 300, pages=3)[0].tolist() == [11.0, 11.0]
        assert counters["warmups"] == 2
        for _ in range(2):
            decoder(grown, storage, x, 300, pages=3)
        # Another batch has kernels of its own, also where the room is another.
        decoder(torch.zeros(2), object(), x, 9, pages=2, batch=4)
        assert counters == {"warmups": 3, "recordings": 3, "replays": 7}


def test_new_storage_at_recorded_addresses_is_replayed():
    with recording_on_cpu():
        decoder, x, state = Decoder(), torch.ones(2), torch.zeros(2)
        for _ in range(2):
            decoder(state, storage := object(), x, 9)
        assert counters == {"warmups": 2}
        for _ in range(2):
            decoder(state, storage, x, 9)
        decoder(state, object(), x, 9)
        assert counters == {"warmups": 2, "recordings": 1, "replays": 3}


def test_recordings_are_bounded_and_the_oldest_goes():
    with recording_on_cpu():
        decoder, x = Decoder(), torch.ones(2)
        caches = [(torch.zeros(2), object()) for _ in range(MOST_RECORDINGS + 1)]
        for state, storage in caches:
            for _ in range(2):
                decoder(state, storage, x, 9)
        assert counters["recordings"] == MOST_RECORDINGS + 1
        counters.clear()
        for state, storage in reversed(caches):
            decoder(state, storage, x, 9)
        assert counters == {"replays": MOST_RECORDINGS, "warmups": 1}
        assert [state.tolist() for state, _ in caches] == [[6.0] * 2] * len(caches)


class BrokenRecorder(FakeRecorder):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    with recording_on_cpu(BrokenRecorder):
        decoder, state, storage = Decoder(), torch.zeros(2), object()
        for _ in range(4):
            decoder(state, storage, torch.ones(2), 9)
        assert counters == {"warmups": 4, "refusals": 1}
        assert state.tolist() == [8.0, 8.0]
    (told,) = [record.getMessage() for record in caplog.records if record.name == "ottfx"]
    assert "not permitted" in told


@pytest.mark.parametrize(
    "failures, expected", [(1, {"warmups": 1, "recordings": 1, "replays": 3}), (2, {"warmups": 4})]
)
def test_a_recording_without_memory_is_tried_again_when_what_is_cached_is_free(failures, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))

    class LackingRecorder(FakeRecorder):
        def record(self, function):
            asked.append("record")
            if asked.count("record") <= failures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().record(function)

    with recording_on_cpu(LackingRecorder):
        decoder, state, storage = Decoder(), torch.zeros(2), object()
        for _ in range(4):
            decoder(state, storage, torch.ones(2), 9)
        assert counters == expected | ({"refusals": 1} if failures > 1 else {})
        assert state.tolist() == [8.0, 8.0]
    assert asked == ["record", "empty", "record"]


def test_a_grown_cache_that_cannot_be_recorded_at_once_is_recorded_later(monkeypatch, caplog):
    with recording_on_cpu():
        decoder, x, state = Decoder(), torch.ones(2), torch.zeros(2)
        for _ in range(2):
            decoder(state, "small", x, 9)
        grown = state.clone()
        monkeypatch.setattr(FakeRecorder, "record", BrokenRecorder.record)
        assert decoder(grown, "large", x, 300, pages=3)[0].tolist() == [6.0, 6.0]
        assert counters == {"warmups": 2, "recordings": 1, "replays": 1}
        monkeypatch.undo()
        assert decoder(grown, "large", x, 301, pages=3)[0].tolist() == [8.0, 8.0]
        assert counters == {"warmups": 2, "recordings": 2, "replays": 2}
    assert not [record for record in caplog.records if record.name == "ottfx"]


class OneReplayRecorder(FakeRecorder):
    """Knows addresses after the first replay, as a CUDA graph does, and no tensors."""

    def replay(self):
        results = super().replay()
        self._function = None
        return [result.clone() for result in results]


def test_a_dead_cache_is_not_kept():
    with recording_on_cpu(OneReplayRecorder):
        decoder, state, storage = Decoder(), torch.zeros(2), object()
        for _ in range(2):
            decoder(state, storage, torch.ones(2), 9)
        assert counters["recordings"] == 1
        alive = weakref.ref(state)
        del state
        gc.collect()
        assert alive() is None


def test_buffers_made_in_inference_mode_serve_outside_it():
    with recording_on_cpu():
        decoder, state, storage = Decoder(), torch.zeros(2), object()
        with torch.inference_mode():
            decoder(state, storage, torch.ones(2), 9)
        for _ in range(2):
            decoder(state, storage, torch.ones(2), 10)
        assert state.tolist() == [6.0, 6.0]


def launch(decoder: Decoder, storage: object, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return decoder.step_graph.launch([decoder.weight], [storage], {2: x, 3: mask})


def test_a_launched_step_runs_once():
    with recording_on_cpu():
        decoder, state, storage, x = Decoder(), torch.zeros(2), object(), torch.ones(2)
        assert launch(decoder, storage, x, torch.ones(1, 9)) is None, "nothing is recorded yet"
        for _ in range(2):
            decoder(state, storage, x, 9)
        x, mask = torch.full((2,), 3.0), torch.ones(1, 11)
        arguments = [decoder.weight, None, x, mask, 2, 10, 1]
        assert launch(decoder, storage, x, mask) is not None
        assert state.tolist() == [10.0, 10.0], "it runs before the call"
        results = decoder.step_graph(arguments, [storage], lambda: [state])
        assert results[0].tolist() == [10.0, 10.0] and results[1].tolist() == [11.0]
        assert counters == {"warmups": 1, "recordings": 1, "replays": 2, "ahead": 1}
        assert decoder.step_graph(arguments, [storage], lambda: [state])[0].tolist() == [16.0, 16.0]
        assert counters["ahead"] == 1


@pytest.mark.parametrize("change", ["tensor", "content", "storage"])
def test_a_launched_step_serves_no_other_call(change):
    with recording_on_cpu():
        decoder, state, storage, x = Decoder(), torch.zeros(2), object(), torch.ones(2)
        for _ in range(2):
            decoder(state, storage, x, 9)
        x, mask, other = torch.full((2,), 3.0), torch.ones(1, 11), torch.zeros(2)
        launched = launch(decoder, storage, x, mask)
        state.zero_()
        if change == "storage":
            results = decoder.step_graph([decoder.weight, None, x, mask, 2, 10, 1], [object()], lambda: [other])
        else:
            x = x + 1 if change == "tensor" else x.add_(1)
            results = decoder.step_graph([decoder.weight, None, x, mask, 2, 10, 1], [storage], lambda: [state])
        assert not launched.is_taken and counters["ahead"] == 0
        assert results[0].tolist() == [6.0 if change == "storage" else 8.0] * 2


def test_results_of_a_launch_in_vain_are_of_no_use_later():
    with recording_on_cpu():
        decoder, state, storage, x = Decoder(), torch.zeros(2), object(), torch.ones(2)
        for _ in range(2):
            decoder(state, storage, x, 9)
        x, mask = torch.full((2,), 3.0), torch.ones(1, 11)
        launched = launch(decoder, storage, x, mask)
        decoder.step_graph.forget_launched()
        state.zero_()
        results = decoder.step_graph([decoder.weight, None, x, mask, 2, 10, 1], [storage], lambda: [state])
        assert not launched.is_taken and counters["ahead"] == 0
        assert results[0].tolist() == [6.0, 6.0]


def test_nothing_is_launched_for_weights_or_storage_elsewhere():
    with recording_on_cpu():
        decoder, state, storage, x = Decoder(), torch.zeros(2), object(), torch.ones(2)
        for _ in range(2):
            decoder(state, storage, x, 9)
        assert launch(decoder, object(), x, torch.ones(1, 9)) is None
        decoder.weight = decoder.weight.clone()
        assert launch(decoder, storage, x, torch.ones(1, 9)) is None
        assert state.tolist() == [4.0, 4.0]


# Whole models.


def generate(model, ids, new_tokens=20, **options):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **options
    )


def test_between_steps_only_contents_change(monkeypatch):
    seen: list[list[Any]] = []
    symbols: list[set[Any]] = []
    lower = graph_compiler._lower

    def watched(gm, example_inputs, settings, **options):
        inner = lower(gm, example_inputs, settings, **options)
        sizes = [size for x in example_inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
        symbols.append({s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols})

        def call(*args):
            seen.append([(x.data_ptr(), *x.shape, *x.stride()) if isinstance(x, torch.Tensor) else x for x in args])
            return inner(*args)

        return call

    model, ids = tiny_model("llama"), random_tokens(2, 240)
    want = generate(ottfx.compile(copy.deepcopy(model), lower="eager"), ids, 30)
    monkeypatch.setattr(graph_compiler, "_lower", watched)
    with recording_on_cpu(), torch.random.fork_rng():
        torch._dynamo.reset()
        got = generate(ottfx.compile(copy.deepcopy(model), **MODE), ids, 30)
        # A prompt of 240 tokens has room for 256, and 29 steps need another page.
        # All but the first three and the first with more room are launched before Dynamo has seen the call.
        assert counters == {"warmups": 1, "recordings": 2, "replays": 28, "ahead": 26}
    assert torch.equal(got.sequences, want.sequences)
    prompt, *steps = seen
    assert len(steps) == 29
    assert all(step == steps[0] for step in steps[:16]) and all(step == steps[16] for step in steps[16:])
    assert steps[0] != steps[16]
    # Batch and pages: the compiler need not find out that a mask is as wide as the storage.
    assert len(symbols[1]) == 2


def test_a_long_decode_records_each_capacity_once_and_compiles_nothing():
    model, ids, steps = (
        tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096),
        random_tokens(1, 40),
        2000,
    )
    with recording_on_cpu():
        model = ottfx.compile(model, **MODE)
        generate(model, ids, 4)
        counters.clear()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        generate(model, ids, steps + 1)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        # Pages: 1, 3, 5, 7, 9, 11, 13, 15, 18.
        assert counters["recordings"] <= 9 and counters["refusals"] == counters["misses"] == 0
        assert counters["replays"] + counters["warmups"] == steps and counters["warmups"] <= 1


def test_beams_move_their_cache_and_are_not_recorded():
    model, ids = tiny_model("llama"), random_tokens(2, 12)
    want = generate(ottfx.compile(copy.deepcopy(model), lower="eager"), ids, num_beams=2)
    with recording_on_cpu():
        torch._dynamo.reset()
        got = generate(ottfx.compile(copy.deepcopy(model), **MODE), ids, num_beams=2)
        assert counters["warmups"] == 19 and counters["refusals"] == 0
    assert torch.equal(got.sequences, want.sequences)


def test_two_generations_and_a_branch_share_a_model():
    model = tiny_model("gpt2")
    ids = [random_tokens(2, 12, seed) for seed in (0, 1)]
    plain = ottfx.compile(copy.deepcopy(model), scheme="kivi", lower="eager")
    want = [generate(plain, x).sequences for x in ids]
    with recording_on_cpu():
        torch._dynamo.reset()
        recorded = ottfx.compile(copy.deepcopy(model), scheme="kivi", **MODE)
        for _ in range(2):
            got = [generate(recorded, x) for x in ids]
            assert all(torch.equal(a.sequences, b) for a, b in zip(got, want, strict=True))
        assert counters["replays"] > 60
        results = []
        for twin, outputs in ((plain, generate(plain, ids[0])), (recorded, got[0])):
            cache = outputs.past_key_values
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :20], layer.values[:, :, :20]
            tokens = want[0][:, :21]
            mask = torch.ones_like(tokens)
            mask[0, :3] = 0
            for _ in range(3):
                with torch.no_grad():
                    out = twin(tokens[:, -1:], attention_mask=mask, past_key_values=cache)
                tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
                mask = torch.cat([mask, mask[:, -1:]], dim=1)
            results.append(tokens)
    assert torch.equal(*results) and results[0].shape[1] == 24


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_other_modes_record_nothing(mode):
    with recording_on_cpu():
        generate(ottfx.compile(tiny_model("llama"), lower="eager", mode=mode), random_tokens(2, 12), 4)
        assert not counters


def test_a_cpu_records_nothing():
    counters.clear()
    generate(ottfx.compile(tiny_model("llama"), **MODE), random_tokens(2, 12), 4)
    assert not counters
