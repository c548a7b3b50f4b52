"""The cache of a loaded program: names and order of its state, growth, lengths, cropping and the batch axis."""

import subprocess
import sys

import pytest
import torch

from ottfx.artifacts.program_cache import CacheSite, ProgramCache
from ottfx.errors import CacheError
from ottfx.registry import make_config

B, H, D = 2, 3, 16
SCHEMES = {
    "none": {},
    "kivi": {"group_size": 32, "residual_length": 64},
    "ott": {"group_size": 32, "residual_length": 32, "exempt_layers": ()},
}


def sites(*schemes):
    return [
        CacheSite(
            name=f"layer{index}",
            config=make_config(scheme, **SCHEMES[scheme]).at_layer(index),
            num_kv_heads=H,
            head_dim=D,
            dtype=torch.float32,
        )
        for index, scheme in enumerate(schemes)
    ]


def append(cache, key, value):
    """Append the same new tokens [batch, heads, n, channels] to every layer, as a program does."""
    total = cache.length + key.shape[2]
    cache.make_room(total)
    lengths = cache.lengths()
    for row, (keys, values) in enumerate(cache.layers):
        state = [*keys.tensors.values(), *values.tensors.values()]
        keys.scheme.append_op(key, value, None, lengths, row, *state, *keys.scheme.constants(keys.config))
    cache.advance(total)


def filled(schemes, length=200, seed=0):
    """A cache of random tokens, and those tokens (keys, values)."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, B, H, length, D, generator=generator)
    cache = ProgramCache.allocate(sites(*schemes), B)
    append(cache, key, value)
    return cache, key, value


def contents(cache):
    return [half.read(cache.length) for layer in cache.layers for half in layer]


def assert_same_contents(got, want):
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_state_is_named_in_the_order_in_which_ops_take_it():
    cache = ProgramCache.allocate(sites("none", "kivi", "ott"), B)
    tensors = cache.tensors()
    assert list(tensors)[:3] == ["layers.0.key.key_data", "layers.0.value.value_data", "layers.1.key.key_codes"]
    in_order = [tensor for layer in cache.layers for half in layer for tensor in half.tensors.values()]
    assert [id(tensor) for tensor in tensors.values()] == [id(tensor) for tensor in in_order]
    for index, (key, value) in enumerate(cache.layers):
        names = [f"layers.{index}.{half.role}.{name}" for half in (key, value) for name in half.tensors]
        assert [name for name in tensors if name.startswith(f"layers.{index}.")] == names


def test_more_than_ten_layers_keep_their_order():
    cache = ProgramCache.allocate(sites(*["none"] * 12), B)
    assert list(cache.tensors())[-2:] == ["layers.11.key.key_data", "layers.11.value.value_data"]
    assert list(cache.tensors())[4] == "layers.2.key.key_data"


def test_all_halves_share_one_capacity_and_growth_keeps_the_content():
    cache, key, _ = filled(["none", "kivi", "ott"], 200)
    before = contents(cache)
    assert {half.shape.pages for layer in cache.layers for half in layer} == {2}
    cache.make_room(256)
    assert cache.layers[0][0].shape.pages == 2
    cache.make_room(257)
    # Three, and one to spare.
    assert {half.shape.pages for layer in cache.layers for half in layer} == {4}
    assert_same_contents(contents(cache), before)
    torch.testing.assert_close(before[0], key)
    assert ProgramCache.allocate(sites("ott"), B, 1000).layers[0][0].shape.pages == 8


def test_lengths_are_those_of_each_layer():
    cache, *_ = filled(["none", "kivi", "ott"], 200)
    lengths = cache.lengths()
    assert lengths.dtype == torch.int64 and lengths.device == cache.device
    assert lengths.tolist() == [[200, 0, 0], [200, 192, 136], [200, 160, 160]]
    assert (cache.length, cache.batch_size) == (200, B)


def test_bytes_are_those_of_the_tensors():
    cache, *_ = filled(["none", "ott"], 200)
    assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors().values())
    parts = cache.bytes_by_part()
    assert parts["dense"] == 2 * B * H * 256 * D * 4
    assert parts["codes"] == 2 * B * H * 256 * D // 4


@pytest.mark.parametrize("length", [0, 7, 130, 199])
def test_crop_forgets_and_can_be_continued(length):
    cache, key, value = filled(["none", "kivi", "ott"], 200)
    before = contents(cache)
    cache.crop(length)
    assert cache.length == length
    for got, want in zip(contents(cache), before, strict=True):
        torch.testing.assert_close(got, want[:, :, :length], rtol=0, atol=1e-6)
    append(cache, key[:, :, length:], value[:, :, length:])
    torch.testing.assert_close(contents(cache)[0], key)


@pytest.mark.parametrize("length", [-1, 201])
def test_crop_to_tokens_that_are_not_there_is_an_error(length):
    cache, *_ = filled(["none"], 200)
    with pytest.raises(CacheError, match="crop: length must be from 0 to the 200 tokens"):
        cache.crop(length)


def test_clones_do_not_disturb_each_other():
    cache, *_ = filled(["none", "kivi", "ott"], 130)
    before = contents(cache)
    clone = cache.clone()
    assert {t.data_ptr() for t in cache.tensors().values()}.isdisjoint(t.data_ptr() for t in clone.tensors().values())
    append(clone, *torch.randn(2, B, H, 70, D))
    clone.crop(3)
    assert cache.length == 130
    assert_same_contents(contents(cache), before)


def test_select_and_repeat_change_the_batch_in_place():
    cache, *_ = filled(["none", "kivi", "ott"], 130)
    before = contents(cache)
    storage = cache.layers[0][0].storage
    cache.repeat_interleave(2)
    assert cache.batch_size == 2 * B and cache.length == 130
    assert cache.layers[0][0].storage is not storage, "who recorded addresses must see that they changed"
    assert_same_contents(contents(cache), [dense.repeat_interleave(2, dim=0) for dense in before])
    cache.select(torch.tensor([3, 0, 3]))
    assert_same_contents(contents(cache), [dense[[1, 0, 1]] for dense in before])
    append(cache, *torch.randn(2, 3, H, 1, D))
    assert cache.lengths()[:, 0].tolist() == [131] * 3


@pytest.mark.parametrize("rows", [[], [0, 2], [-1]])
def test_rows_that_are_not_there_are_an_error(rows):
    cache, *_ = filled(["none"], 5)
    with pytest.raises(CacheError, match="select: rows must be numbers of the 2 sequences"):
        cache.select(torch.tensor(rows, dtype=torch.int64))
    assert cache.batch_size == B


def test_needs_no_transformers():
    code = "import sys, ottfx.artifacts.program_cache; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
