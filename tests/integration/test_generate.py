"""Whole `generate` calls over the real cache, stock model and stock DynamicCache, against the uncompiled model."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, random_tokens, tiny_model
from torch._dynamo.utils import counters
from transformers import DynamicCache

import ottfx
from ottfx.api import MOST_GRAPHS
from ottfx.cache_state import CacheHalf
from ottfx.kv_tensor import KVTensor

FULL_ATTENTION = [family for family in FAMILIES if family != "mistral-sliding"]


def compiled_copy(model, **options):
    """The reference model, and a copy of it that ottfx compiled without Inductor, plus what reached the backend."""
    twin = copy.deepcopy(model)
    ottfx.compile(twin, lower="eager", **options)
    return model, twin


def generate(model, ids, mask=None, new_tokens=20, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)


def left_padded(ids, amounts):
    mask = torch.ones_like(ids)
    for row, amount in enumerate(amounts):
        mask[row, :amount] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_same_tokens(reference, twin, ids, mask=None, **options):
    torch.manual_seed(1)
    want = generate(reference, ids, mask, **options)
    torch.manual_seed(1)
    got = generate(twin, ids, mask, **options)
    assert torch.equal(want.sequences, got.sequences)
    return got


def relative_error(got, want) -> float:
    return float((got - want).norm() / want.norm())


def unique_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_none_gives_the_same_tokens(family):
    """`none` stores 16 (here 32) bits: equal tokens prove the pass on this family."""
    reference, twin = compiled_copy(tiny_model(family), scheme="none")
    counters.clear()
    got = assert_same_tokens(reference, twin, random_tokens(3, 9), new_tokens=60)
    assert unique_graphs() == (2 if family not in ("gemma3", "mistral-sliding") else unique_graphs())
    assert not counters["graph_break"]
    kinds = [type(layer.keys) for layer in got.past_key_values.layers]
    if family == "mistral-sliding":
        assert KVTensor not in kinds
    elif family == "gemma3":
        assert kinds == [torch.Tensor, KVTensor]
    else:
        assert set(kinds) == {KVTensor}


def test_other_lengths_and_growth_compile_nothing():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    assert_same_tokens(reference, twin, random_tokens(3, 9), new_tokens=3)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = assert_same_tokens(reference, twin, random_tokens(3, 200, seed=1), new_tokens=400)
        assert_same_tokens(reference, twin, random_tokens(5, 30, seed=2), new_tokens=30)
    assert unique_graphs() == 0
    assert got.past_key_values.layers[0].keys.payload.half.shape.pages >= 5, "grew from 2 pages"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_left_padding(family):
    reference, twin = compiled_copy(tiny_model(family), scheme="none")
    ids, mask = left_padded(random_tokens(3, 40), [17, 0, 5])
    assert_same_tokens(reference, twin, ids, mask, new_tokens=50)


def test_beam_search_and_several_sequences():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    ids = random_tokens(2, 12)
    assert_same_tokens(reference, twin, ids, num_beams=3)
    assert_same_tokens(reference, twin, ids, do_sample=True, num_return_sequences=3)


def test_prompt_lookup_decoding():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    ids = random_tokens(1, 12).repeat(1, 3)
    assert_same_tokens(reference, twin, ids, prompt_lookup_num_tokens=4, new_tokens=40)


def test_assisted_decoding():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    assistant = tiny_model("llama", num_hidden_layers=1)
    assert_same_tokens(reference, twin, random_tokens(1, 12), assistant_model=assistant, new_tokens=30)


@torch.no_grad()
def test_prompt_lookup_crops_inside_the_ring_without_loss(monkeypatch):
    """Each step crops up to 4 tokens, some of a group just packed: the cache is that of a run without candidates."""
    rewind, cuts = CacheHalf.rewind, []

    def spy(half, length):
        before = half.packed
        rewind(half, length)
        cuts.append(half.packed < before)

    monkeypatch.setattr(CacheHalf, "rewind", spy)
    _, twin = compiled_copy(tiny_model("llama"), scheme="ott", bits=2, group_size=32, residual_length=3)
    got = generate(twin, random_tokens(1, 12).repeat(1, 3), prompt_lookup_num_tokens=4, new_tokens=150)
    assert any(cuts), "a packed group was cut"
    # The first layer's keys and values follow from the tokens alone, and no pool of outliers is kept there.
    layer = got.past_key_values.layers[0]
    straight = twin(got.sequences[:, : layer.keys.shape[2]]).past_key_values.layers[0]
    for one, other in ((layer.keys, straight.keys), (layer.values, straight.values)):
        assert relative_error(one.dequantize(), other.dequantize()) < 1e-3, "a rounding of a float16 scale"


@torch.no_grad()
def test_chunked_prefill_prefix_reuse_and_crop():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    ids = random_tokens(2, 60)
    caches = []
    for model in (reference, twin):
        cache = None
        for chunk in ids.split(25, dim=1):
            out = model(chunk, past_key_values=cache)
            cache = out.past_key_values
        branch = copy.deepcopy(cache)
        first = model(ids[:, :1], past_key_values=cache).logits
        other = model(ids[:, 1:2], past_key_values=branch).logits
        cache.crop(-11)
        after_crop = model(ids[:, 2:3], past_key_values=cache).logits
        caches.append((out.logits, first, other, after_crop))
    for want, got in zip(*caches, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dense_cache_is_imported_and_a_refused_layer_stays_dense():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="kivi", bits=8, group_size=32, residual_length=32)
    ids = random_tokens(2, 100)
    cache = reference(ids).past_key_values
    want = reference(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    out = twin(ids[:, :1], past_key_values=cache)
    assert type(out.past_key_values.layers[0].keys) is KVTensor
    assert relative_error(out.logits, want) < 0.05


def test_training_is_left_alone():
    reference, twin = compiled_copy(tiny_model("llama").requires_grad_(True), scheme="kivi")
    ids = random_tokens(2, 10)
    for model in (reference, twin):
        model(ids, labels=ids).loss.backward()
    for want, got in zip(reference.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    with torch.no_grad():
        cache = twin(ids).past_key_values
    with pytest.raises(Exception, match="no gradient"):
        twin(ids[:, :1], past_key_values=cache)


def test_static_cache_stays_as_it_is():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="kivi")
    assert_same_tokens(reference, twin, random_tokens(2, 10), cache_implementation="static")


def test_inference_mode_then_no_grad():
    reference, twin = compiled_copy(tiny_model("llama"), scheme="none")
    ids = random_tokens(2, 10)
    with torch.inference_mode():
        got = assert_same_tokens(reference, twin, ids)
    with torch.no_grad():
        twin(ids[:, :1], past_key_values=got.past_key_values)


@pytest.mark.parametrize("scheme", ["kivi", "ott", "ott+"])
def test_more_bits_agree_longer(scheme):
    """8 bits agree with full precision over a stretch that covers several groups; 2 bits hold fewer bytes."""
    reference, twin = compiled_copy(tiny_model("llama"), scheme=scheme, bits=8, group_size=32, residual_length=32)
    ids, mask = left_padded(random_tokens(3, 150), [40, 0, 3])
    with torch.no_grad():
        want = reference(ids, attention_mask=mask).logits[:, -1]
        cache = twin(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
        got = twin(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert relative_error(got, want) < 0.05


@pytest.mark.parametrize(
    ("scheme", "options", "bits"),
    [
        ("turbo", {}, 2 + 16 / 16),
        ("polar", {}, (32 + 3 * 8 + 16) / 16),
        # Keys and values, 16 channels a head.
        ("polar_pairs", {"group_size": 32, "residual_length": 32}, (4 + 32 / 32 + 2 + 32 / 16) / 2),
        # 64 and 32 signs, two norms, eight bytes for 32 tokens.
        ("qjl", {"residual_length": 32}, ((64 + 32 + 32 + 2) / 16 + 2 + 32 / 16) / 2),
    ],
)
def test_schemes_with_codes_of_their_own_generate(scheme, options, bits):
    """After a prompt, decode steps and a crop, a chunk sees what a dense cache of the dequantized tokens shows."""
    reference, twin = compiled_copy(tiny_model("llama"), scheme=scheme, **options)
    ids = random_tokens(3, 150)
    cache = generate(twin, ids, new_tokens=6).past_key_values
    cache.crop(140 - cache.get_seq_length())
    halves = [tensor.payload for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert {payload.length for payload in halves} == {140}
    elements = sum(payload.half.shape.pages * 128 * payload.dequantize()[:, :, 0].numel() for payload in halves)
    parts = ottfx.memory_footprint(cache).parts
    assert (parts["codes"] + parts["scales"]) * 8 == bits * elements
    dense = DynamicCache()
    for index, layer in enumerate(cache.layers):
        dense.update(layer.keys.payload.dequantize(), layer.values.payload.dequantize(), index)
    with torch.no_grad():
        want = reference(ids[:, 140:], past_key_values=dense).logits
        got = twin(ids[:, 140:], past_key_values=cache).logits
    assert relative_error(got, want) < 1e-4


def test_a_sliding_model_never_runs_uncompiled():
    """Prompts, chunks and steps around the end of a window: torch gives up a forward after its limit of graphs."""
    model = tiny_model("gemma3", sliding_window=64)
    ottfx.compile(model, bits=2, lower="eager")
    counters.clear()
    with torch.no_grad():
        for length in (1, 20, 63):
            for chunks in ((1, 1), (50, 1, 3), (100, 1)):
                cache = DynamicCache(config=model.config)
                for tokens in (length, *chunks):
                    model(random_tokens(1, tokens), past_key_values=cache)
                    # Uncompiled, it would hold a dense tail, or warn that it was dequantized.
                    assert cache.layers[1].keys.payload.tail is None
    assert torch._dynamo.config.recompile_limit < unique_graphs() <= MOST_GRAPHS
