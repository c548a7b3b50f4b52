"""Steps that are launched before Dynamo has looked at the call: when, and that no guess changes a result."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_recorder import recording_on_cpu
from tiny_models import random_tokens, tiny_model

import ottfx
from ottfx.launch_ahead import MOST_MISSES
from ottfx.schemes.base import PAGE
from ottfx.step_graph import counters


class Twins:
    """One model recorded and one that is not, each with a cache of its own, which take the same steps."""

    def __init__(self, length: int = 40, **options: Any) -> None:
        model = tiny_model("llama")
        self.plain = ottfx.compile(copy.deepcopy(model), lower="eager", **options)
        self.recorded = ottfx.compile(copy.deepcopy(model), lower="eager", mode="reduce-overhead", **options)
        self.models = [self.plain, self.recorded]
        self.tokens = random_tokens(2, length)
        self.mask = torch.ones_like(self.tokens)
        self.mask[0, :3] = 0
        self.caches: list[Any] = [None, None]
        self.step(self.tokens)

    def step(self, ids: torch.Tensor | None = None, **options: Any) -> None:
        """Take a step with both, and compare."""
        results = []
        for i, model in enumerate(self.models):
            with torch.no_grad():
                results.append(
                    model(
                        self.tokens[:, -1:] if ids is None else ids,
                        attention_mask=self.mask,
                        past_key_values=self.caches[i],
                        use_cache=True,
                        **options,
                    )
                )
            self.caches[i] = results[i].past_key_values
        # `none` attends over its whole capacity where steps are recorded, and sums in another order.
        torch.testing.assert_close(results[1].logits, results[0].logits, rtol=0, atol=1e-5)
        self.tokens = torch.cat([self.tokens, results[0].logits[:, -1:].argmax(-1)], dim=1)
        self.mask = torch.cat([self.mask, self.mask[:, -1:]], dim=1)

    def steps(self, count: int) -> dict[str, int]:
        """Take steps; say what they added to the counters."""
        before = counters.copy()
        for _ in range(count):
            self.step()
        return dict(counters - before)

    def crop(self, length: int) -> None:
        for cache in self.caches:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self.tokens, self.mask = self.tokens[:, : length + 1], self.mask[:, : length + 1]


@contextlib.contextmanager
def twins(*args: Any, **options: Any) -> Iterator[Twins]:
    with recording_on_cpu():
        torch._dynamo.reset()
        yield Twins(*args, **options)


@pytest.mark.parametrize("scheme", ["ott+", "ott", "none"])
def test_steps_that_write_one_token_are_launched_ahead(scheme):
    with twins(scheme=scheme) as pair:
        # One runs as it is, one is recorded; each later one knows the step before.
        assert pair.steps(12) == {"warmups": 1, "recordings": 1, "replays": 11, "ahead": 10}


@pytest.mark.parametrize("first", [PAGE + 32 - 6, 2 * PAGE - 6])
def test_steps_that_pack_a_group_or_need_room_are_not(first):
    with twins(first - 3) as pair:
        pair.steps(3)
        half = pair.caches[1].layers[0].keys.payload.half
        before = half.packed, half.shape.pages
        for _ in range(10):
            packed, pages = half.packed, half.shape.pages
            added = pair.steps(1)
            writes_more = half.packed != packed or half.shape.pages != pages
            assert added.get("ahead", 0) == (not writes_more)
        assert (half.packed, half.shape.pages) != before
        assert counters["misses"] == 0


def test_schemes_that_code_each_token_are_not():
    with twins(scheme="turbo") as pair:
        assert "ahead" not in pair.steps(4)


def a_crop(pair: Twins) -> None:
    pair.crop(pair.tokens.shape[1] - 4)


def a_crop_beside_the_old_cache(pair: Twins) -> None:
    pair.kept = [[(layer.keys, layer.values) for layer in cache.layers] for cache in pair.caches]
    pair.crop(pair.tokens.shape[1] - 4)


def another_cache_object(pair: Twins) -> None:
    pair.caches = [copy.deepcopy(cache) for cache in pair.caches]


def training(pair: Twins) -> None:
    for model in pair.models:
        model.train()


def weights_elsewhere(pair: Twins) -> None:
    for model in pair.models:
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5


def other_rows(pair: Twins) -> None:
    pair.tokens, pair.mask = pair.tokens[:1], pair.mask[:1]
    for cache in pair.caches:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]


@pytest.mark.parametrize(
    "change, length",
    [
        (a_crop, PAGE + 50),
        (a_crop_beside_the_old_cache, PAGE + 50),
        (another_cache_object, 40),
        (training, 40),
        (weights_elsewhere, 40),
        (other_rows, PAGE + 50),
    ],
)
def test_whatever_changes_between_steps_results_do_not(change: Callable[[Twins], None], length: int):
    with twins(length) as pair:
        pair.steps(6)
        change(pair)
        pair.steps(6)


def test_a_chunk_in_the_place_of_a_step():
    with twins() as pair:
        pair.steps(5)
        chunk = random_tokens(2, 4, seed=3)
        pair.tokens = torch.cat([pair.tokens[:, :-1], chunk], dim=1)
        pair.mask = torch.cat([pair.mask, pair.mask[:, -1:].expand(2, 3)], dim=1)
        pair.step(chunk)
        assert pair.steps(5)["ahead"] >= 3
        assert counters["misses"] == 0


def test_a_launch_in_vain_is_counted_and_harms_nothing():
    with twins(PAGE + 70) as pair:
        pair.steps(5)
        # The recorded model only: what it launches belongs to a graph that is not called.
        pair.recorded.train()
        assert pair.steps(1)["misses"] == 1
        pair.recorded.eval()
        assert "misses" not in pair.steps(2)
        # What the ring holds of packed tokens is what a crop behind the miss gives back.
        pair.recorded.train()
        pair.crop(pair.tokens.shape[1] - 30)
        pair.steps(3)


def test_a_model_that_is_always_guessed_wrong_is_left_alone():
    with twins() as pair:
        pair.steps(5)
        for _ in range(MOST_MISSES):
            pair.recorded.train()
            pair.steps(2)
            pair.recorded.eval()
            pair.steps(2)
        assert counters["misses"] == MOST_MISSES
        assert "ahead" not in pair.steps(4)


def test_nothing_is_kept_alive():
    with twins() as pair:
        pair.steps(5)
        cache = pair.caches.pop()
        alive = [weakref.ref(cache), weakref.ref(cache.layers[0].keys)]
        del cache
        pair.caches.append(None)
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
