"""A cache in a file: it continues with the same tokens, holds no more than it must, and a bad file is never used."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from plain_decoder import greedy, plain_decoder
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import ottfx
import ottfx.artifacts.cache_file
from ottfx.artifacts.cache_file import METADATA_KEY, load_cache, save_cache
from ottfx.artifacts.program_cache import CacheSite, ProgramCache
from ottfx.cache_state import CacheHalf, Payload
from ottfx.errors import ArtifactError
from ottfx.kv_tensor import KVTensor
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import CacheShape

ROOT = Path(__file__).parents[2]
B, H, D = 2, 3, 16
SCHEMES = {
    "none": {},
    "kivi": {"group_size": 32, "residual_length": 32},
    "ott": {"group_size": 32, "residual_length": 32, "exempt_layers": (0,)},
    "ott+": {"group_size": 32, "residual_length": 32},
    "turbo": {"bits": 3, "seed": 2},
    "polar": {"first_bits": 2},
    "qjl": {"residual_length": 32, "seed": 3},
}


def compiled(family="llama", scheme="ott", **overrides):
    return ottfx.compile(tiny_model(family, **overrides), lower="eager", scheme=scheme, **SCHEMES[scheme])


def padded_prompt(length=150):
    ids = random_tokens(3, length)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    mask[2, :7] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generate(model, ids, mask, new_tokens, cache=None):
    mask = torch.cat([mask, mask.new_ones(ids.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )


def handles(length=200, scheme="ott", capacity=0):
    """Key and value handles of `length` random tokens."""
    config, implementation = make_config(scheme, **SCHEMES[scheme]).at_layer(5), get_scheme(scheme)
    pages = max(2, implementation.pages_needed(config, max(length, capacity)))
    shape = CacheShape(
        batch_size=B, num_kv_heads=H, head_dim=D, pages=pages, dtype=torch.float32, device=torch.device("cpu")
    )
    halves = [CacheHalf.allocate(implementation, config, role, shape) for role in ("key", "value")]
    key, value = torch.randn(2, B, H, length, D)
    state = [tensor for half in halves for tensor in half.tensors.values()]
    lengths = torch.zeros(1, 3, dtype=torch.int64)
    implementation.append_op(key, value, None, lengths, 0, *state, *implementation.constants(config))
    for half in halves:
        half.advance(length)
    return tuple(KVTensor.from_payload(Payload(half, length)) for half in halves)


def assert_same_half(got: CacheHalf, want: CacheHalf) -> None:
    """Equal content, up to spare capacity."""
    for name in ("config", "role", "high", "packed", "in_ring"):
        assert getattr(got, name) == getattr(want, name), name
    assert list(got.tensors) == list(want.tensors)
    used = want.scheme.pages_needed(want.config, want.high)
    for name, spec in want.specs.items():
        one, two = got.tensors[name], want.tensors[name]
        if spec.paged_dim is not None:
            tokens = used * spec.shape[spec.paged_dim] // want.shape.pages
            one, two = (tensor.narrow(spec.paged_dim, 0, tokens) for tensor in (one, two))
        assert torch.equal(one, two), name


def snapshot(half: CacheHalf) -> CacheHalf:
    return half.map_batch(torch.clone)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_padded_batch_continues_with_the_same_tokens(tmp_path, scheme):
    model = compiled(scheme=scheme)
    ids, mask = padded_prompt()
    want = generate(model, ids, mask, 60).sequences
    first = generate(model, ids, mask, 25)
    before = [snapshot(layer.keys.payload.half) for layer in first.past_key_values.layers]
    save_cache(first.past_key_values, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    assert type(loaded) is DynamicCache
    for layer, old, half in zip(loaded.layers, first.past_key_values.layers, before, strict=True):
        assert layer.keys.payload is not None and layer.keys.config == old.keys.config
        assert_same_half(layer.keys.payload.half, half)
        assert_same_half(old.keys.payload.half, half)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = generate(model, first.sequences, mask, 35, loaded).sequences
        went_on = generate(model, first.sequences, mask, 35, first.past_key_values).sequences
    assert torch.equal(got, want)
    assert torch.equal(went_on, want), "saving changed the cache"


SCRIPT = """
import sys
import torch
from test_cache_file import compiled, generate, load_cache
continued = torch.load(sys.argv[2])
cache = load_cache(sys.argv[1])
print("tokens", generate(compiled(), continued["ids"], continued["mask"], 35, cache).sequences.tolist())
"""


def test_another_process_continues(tmp_path):
    model = compiled()
    ids, mask = padded_prompt()
    want = generate(model, ids, mask, 60).sequences
    first = generate(model, ids, mask, 25)
    save_cache(first.past_key_values, tmp_path / "cache")
    torch.save({"ids": first.sequences, "mask": mask}, tmp_path / "continued")
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "artifacts")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), str(tmp_path / "continued")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.split("tokens ")[1]) == want.tolist()


def test_a_sliding_layer_continues(tmp_path):
    model = compiled("gemma3", "kivi")
    ids, mask = padded_prompt(60)
    want = generate(model, ids, mask, 60).sequences
    first = generate(model, ids, mask, 25)
    save_cache(first.past_key_values, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    for got, old in zip(loaded.layers, first.past_key_values.layers, strict=True):
        assert type(got) is type(old) and type(got.keys) is type(old.keys)
        assert vars(got).keys() == vars(old).keys()
    assert loaded.layers[0].is_sliding and loaded.layers[0].cumulative_length == 84
    assert torch.equal(generate(model, first.sequences, mask, 35, loaded).sequences, want)


def test_continuations_of_one_file_do_not_disturb_each_other(tmp_path):
    model = compiled()
    ids, mask = padded_prompt(100)
    prompt = generate(model, ids, mask, 1)
    starts = prompt.sequences, torch.cat([ids, (prompt.sequences[:, -1:] + 5) % 100 + 2], dim=1)
    want = [generate(model, ids, mask, 30, copy.deepcopy(prompt.past_key_values)).sequences for ids in starts]
    save_cache(prompt.past_key_values, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    branch = copy.deepcopy(loaded)
    assert torch.equal(generate(model, starts[1], mask, 30, branch).sequences, want[1])
    assert torch.equal(generate(model, starts[0], mask, 30, loaded).sequences, want[0])
    assert torch.equal(generate(model, starts[1], mask, 30, load_cache(tmp_path / "cache")).sequences, want[1])


@torch.no_grad()
def test_a_plain_decoder_branches_from_one_loaded_tuple(tmp_path):
    model = ottfx.compile(plain_decoder(), lower="eager", scheme="ott", **SCHEMES["ott"])
    _, cache = greedy(model, random_tokens(2, 90), 3)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    assert type(loaded) is tuple and {type(pair) for pair in loaded} == {tuple}
    steps = [random_tokens(2, 1, seed=seed) for seed in range(3)]
    want = [model(step, cache)[0] for step in steps]
    # The results stay alive, as branches do.
    got = [model(step, loaded) for step in steps]
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one[0], two, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [1, 100, 150, 199])
def test_a_prefix_is_saved_as_the_prefix_and_nothing_is_disturbed(tmp_path, scheme, length):
    key, value = handles(200, scheme)
    before = [snapshot(handle.payload.half) for handle in (key, value)]
    prefix = [handle[:, :, :length] for handle in (key, value)]
    save_cache([prefix], tmp_path / "cache")
    ((got_key, got_value),) = load_cache(tmp_path / "cache")
    for got, want in ((got_key, prefix[0].clone()), (got_value, prefix[1].clone())):
        assert_same_half(got.payload.half, want.payload.half)
        torch.testing.assert_close(got.dequantize(), want.dequantize(), rtol=0, atol=0)
    for handle, half in zip((key, value), before, strict=True):
        assert handle.payload.half.high == 200
        assert_same_half(handle.payload.half, half)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [100, 170, 199])
def test_a_loaded_cache_is_cropped_as_the_saved_one(tmp_path, scheme, length):
    pair = handles(200, scheme)
    save_cache([pair], tmp_path / "cache")
    ((key, value),) = load_cache(tmp_path / "cache")
    for got, want in zip((key, value), pair, strict=True):
        assert_same_half(got[:, :, :length].clone().payload.half, want[:, :, :length].clone().payload.half)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_that_eager_code_appended_are_saved_too(tmp_path, scheme):
    pair = [torch.cat([handle, torch.randn(B, H, 5, D)], dim=2) for handle in handles(130, scheme)]
    save_cache((pair,), tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    assert type(loaded) is tuple and type(loaded[0]) is list
    for got, want in zip(loaded[0], pair, strict=True):
        assert (got.payload.length, got.shape[2]) == (130, 135)
        assert torch.equal(got.payload.tail, want.payload.tail)
        torch.testing.assert_close(got.dequantize(), want.dequantize(), rtol=0, atol=0)


def test_only_pages_in_use_are_written_and_allocated(tmp_path):
    pair = handles(200, capacity=10_000)
    save_cache([pair], tmp_path / "cache")
    saved = safetensors.torch.load_file(tmp_path / "cache")
    assert saved["layers.0.key.key_codes"].shape == (B, H, 2, 128)
    assert saved["layers.0.key.key_codes"].dtype == torch.int32, "packed as in memory"
    ((key, _),) = load_cache(tmp_path / "cache")
    assert key.payload.half.shape.pages == 2
    assert torch.equal(key.dequantize(), pair[0].dequantize())


def test_a_program_cache_comes_back(tmp_path):
    sites = [
        CacheSite(
            name=name,
            config=make_config(name, **SCHEMES[name]).at_layer(5),
            num_kv_heads=H,
            head_dim=D,
            dtype=torch.bfloat16,
        )
        for name in SCHEMES
    ]
    cache = ProgramCache.allocate(sites, B, 1000)
    key, value = torch.randn(2, B, H, 200, D, dtype=torch.bfloat16)
    for row, (keys, values) in enumerate(cache.layers):
        state = [*keys.tensors.values(), *values.tensors.values()]
        keys.scheme.append_op(key, value, None, cache.lengths(), row, *state, *keys.scheme.constants(keys.config))
    cache.advance(200)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    assert type(loaded) is ProgramCache
    assert list(loaded.tensors()) == list(cache.tensors())
    assert torch.equal(loaded.lengths(), cache.lengths())
    for got, want in zip(loaded.layers, cache.layers, strict=True):
        for one, two in zip(got, want, strict=True):
            assert one.shape.pages == 2
            assert_same_half(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_layers_are_saved_as_they_are(tmp_path, dtype):
    both = torch.randn(2, B, H, 7, D, dtype=dtype)
    strided = torch.randn(B, 7, H, D, dtype=dtype).transpose(1, 2)
    save_cache([(both[0], both[1]), (strided, strided)], tmp_path / "cache")
    (one, two), (three, four) = load_cache(tmp_path / "cache")
    for got, want in ((one, both[0]), (two, both[1]), (three, strided), (four, strided)):
        assert got.dtype == dtype and torch.equal(got, want)


def test_layers_without_tokens(tmp_path):
    config = tiny_model("gemma3").config
    for cache in (DynamicCache(), DynamicCache(config=config)):
        save_cache(cache, tmp_path / "cache")
        loaded = load_cache(tmp_path / "cache")
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
        assert loaded.layer_class_to_replicate is cache.layer_class_to_replicate
        assert not any(layer.is_initialized for layer in loaded.layers)


def test_saved_and_loaded_in_inference_mode_continues_outside(tmp_path):
    key, value = handles(130)
    dense = torch.randn(B, H, 7, D)
    with torch.inference_mode():
        save_cache([(key, value), (dense, dense)], tmp_path / "cache")
        (got, _), (got_dense, _) = load_cache(tmp_path / "cache")
    assert not any(tensor.is_inference() for tensor in [got_dense, *got.payload.half.tensors.values()])
    assert torch.equal(got.dequantize(), key.dequantize()) and torch.equal(got_dense, dense)


def test_the_file_can_be_replaced_while_its_cache_is_in_use(tmp_path):
    dense = torch.randn(B, H, 7, D)
    save_cache([(dense, dense)], tmp_path / "cache")
    ((got, _),) = load_cache(tmp_path / "cache")
    with open(tmp_path / "cache", "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / "cache")))
    assert torch.equal(got, dense)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_cache([handles(10)], tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(ottfx.artifacts.cache_file.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_cache([handles(20)], tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    assert os.listdir(tmp_path) == ["cache"]


@pytest.mark.gpu
def test_a_cache_from_a_gpu_goes_back_there(tmp_path):
    pair = [handle.to("cuda") for handle in handles(200)]
    save_cache([pair], tmp_path / "cache")
    for device, want in ((None, "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
        ((key, value),) = load_cache(tmp_path / "cache", device)
        assert key.device.type == value.device.type == key.payload.half.shape.device.type == want
        assert torch.equal(key.dequantize().cpu(), pair[0].dequantize().cpu())


def static_cache():
    return StaticCache(config=tiny_model("llama").config, max_cache_len=8)


def offloaded_cache():
    cache = DynamicCache()
    cache.offloading = True  # the constructor wants a device with streams
    return cache


def cache_with_another_layer():
    cache = DynamicCache()
    cache.layers = static_cache().layers
    return cache


@pytest.mark.parametrize(
    "make, got",
    [
        (static_cache, "Got a StaticCache"),
        (
            lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
            "Got a EncoderDecoderCache.*self_attention_cache",
        ),
        (cache_with_another_layer, "layer 0 is a StaticLayer"),
        (offloaded_cache, "offloading=True"),
        (lambda: "cache", "Got a str"),
        (lambda: [torch.zeros(1, 2, 3, 4)], "item 0 is a Tensor"),
        (lambda: [(torch.zeros(1, 2, 3, 4),) * 3], r"item 0 is a tuple of \(Tensor, Tensor, Tensor\)"),
        (lambda: [(torch.zeros(3, 4),) * 2], "layer 0: keys: a dense tensor must be"),
        (lambda: [(torch.zeros(1, 2, 3, 4).int(),) * 2], "layer 0: keys: dtype must be one of"),
        (lambda: [handles(10)[::-1]], "layer 0: keys: must hold keys, got 'value'"),
        (lambda: [(handles(10)[0], handles(11)[1])], r"same \(batch size, length\), got \(2, 10\) and \(2, 11\)"),
        (lambda: [(KVTensor(torch.empty(1, 2, 0, 4), 5),) * 2], "stand-in"),
    ],
)
def test_what_cannot_be_saved(tmp_path, make, got):
    with pytest.raises(ArtifactError, match=f"ottfx.save_cache: .*{got}"):
        save_cache(make(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def damage(tmp_path):
    """A function that writes a good file changed by a function of (tensors, metadata entry), and returns its path."""

    def write(change):
        path = tmp_path / "cache"
        save_cache([handles(200, "ott"), (torch.zeros(B, H, 200, D),) * 2], path)
        with safetensors.safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()[METADATA_KEY])
        tensors = safetensors.torch.load_file(path)
        change(tensors, entry)
        safetensors.torch.save_file(tensors, path, {METADATA_KEY: json.dumps(entry)})
        return path

    return write


def test_the_damage_fixture_can_write_a_good_file(damage):
    assert len(load_cache(damage(lambda tensors, entry: None))) == 2


def key_entry(entry):
    return entry["layers"][0]["halves"][0]


def set_key(**fields):
    return lambda tensors, entry: key_entry(entry).update(fields)


def set_option(**options):
    return lambda tensors, entry: key_entry(entry)["options"].update(options)


def set_tensor(name, function):
    return lambda tensors, entry: tensors.update({name: function(tensors[name])})


def set_entry(**fields):
    return lambda tensors, entry: entry.update(fields)


def set_layer(**fields):
    return lambda tensors, entry: entry["layers"][0].update(fields)


CODES = "layers.0.key.key_codes"


@pytest.mark.parametrize(
    "change, text",
    [
        (set_entry(format_version=2), "expected format version 1. Got 2"),
        (set_entry(format_version=None), "expected format version 1. Got None"),
        (set_entry(cache_class="StaticCache"), "cache_class must be one of .* got 'StaticCache'"),
        (set_entry(device=3), "device: must be a string. Got 3"),
        (set_entry(more=3), "must be an object with the fields"),
        (set_entry(layers=[3]), "layer 0: must be an object. Got 3"),
        (set_entry(cache_class="ProgramCache"), "must be packed, of one batch size and length"),
        (set_layer(layer_class="DynamicLayer"), "layer_class must be one of"),
        (set_layer(attributes={"a": 1}), r"attributes: must be an object with the fields \[\].*\['a'\]"),
        (set_layer(halves=[]), "must have one of .* got 0"),
        (set_key(stored="sparse"), "keys: \"stored\" must be one of .* got 'sparse'"),
        (set_key(stored=[]), '"stored" must be one of'),
        (set_key(scheme="squeeze"), "scheme must be known here .* got squeeze"),
        (set_option(codebook=1), "take the options.*codebook"),
        (set_option(bits=5), "take the options.*bits must be one of"),
        (set_option(layer_bits=7), "take the options"),
        (set_option(value_group_size=48), "value_group_size must divide head_dim"),
        (set_option(key_bits=4), f"{CODES} must be .*256.* got .*128"),
        (set_key(role="value"), "must hold keys, got 'value'"),
        (set_key(dtype="int8"), "dtype must be one of .* got 'int8'"),
        (set_key(dtype="bfloat16"), "key_residual must be .* torch.bfloat16 .* got .* torch.float32"),
        (set_key(length=-1), "lengths must be 0 <= packed <= length"),
        (set_key(packed=-1), "lengths must be 0 <= packed <= length"),
        (set_key(packed=201), "lengths must be 0 <= packed <= length"),
        (set_key(tail=-1), "0 <= tail"),
        (set_key(tail=2), r"got \(2, 202\) and \(2, 200\)"),
        (set_key(packed=128), "the scheme packs 160, got packed=128"),
        (set_key(in_ring=25), "the ring can hold 0 to 24 packed tokens as well, got in_ring=25"),
        (set_key(in_ring=-1), "the ring can hold 0 to 24 packed tokens as well, got in_ring=-1"),
        (set_key(length=200.0), "length: must be an integer. Got 200.0"),
        (set_key(length=True), "length: must be an integer. Got True"),
        (set_key(length=190), r"got \(2, 190\) and \(2, 200\)"),
        (set_key(head_dim=0), "must be positive"),
        (set_key(head_dim=32), f"{CODES} must be"),
        (set_key(batch_size=1), r"got \(1, 200\) and \(2, 200\)"),
        (lambda t, entry: [half.update(length=10**9, packed=10**9 // 32 * 32) for half in entry["layers"][0]["halves"]],
         f"{CODES} must be .*7812500"),
        (lambda tensors, entry: tensors.pop(CODES), f"{CODES}'\\] missing"),
        (lambda tensors, entry: tensors.update(extra=torch.zeros(1)), r"\['extra'\] unknown"),
        (set_tensor(CODES, lambda t: t.float()), f"{CODES} must be .* torch.int32 .* got .* torch.float32"),
        (set_tensor(CODES, lambda t: t[:, :, :1].clone()), rf"{CODES} must be \[2, 3, 2, 128\].* got \[2, 3, 1, 128\]"),
        (set_tensor("layers.1.key", lambda t: t[:1].clone()), "layers.1.key must be"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_not_used(damage, change, text):
    path = damage(change)
    with pytest.raises(ArtifactError, match=f"ottfx.load_cache: {path}.*{text}"):
        load_cache(path)


@pytest.mark.parametrize(
    "attributes",
    [
        {"sliding_window": 0, "cumulative_length": 50, "record_past": False},
        {"sliding_window": 24, "cumulative_length": 3, "record_past": False},
        {"sliding_window": 24, "cumulative_length": "50", "record_past": False},
        {},
    ],
)
def test_a_damaged_sliding_layer_is_not_used(tmp_path, attributes):
    cache = DynamicCache(config=tiny_model("gemma3").config)
    for index in range(2):
        cache.update(torch.zeros(1, 1, 50, D), torch.zeros(1, 1, 50, D), index)
    path = tmp_path / "cache"
    save_cache(cache, path)
    assert load_cache(path).layers[0].cumulative_length == 50
    with safetensors.safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()[METADATA_KEY])
    entry["layers"][0]["attributes"] = attributes
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {METADATA_KEY: json.dumps(entry)})
    with pytest.raises(ArtifactError, match="layer 0"):
        load_cache(path)


def test_files_that_are_no_caches(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(ArtifactError, match="expected a safetensors file.*No such file"):
        load_cache(path)
    with pytest.raises(ArtifactError, match="expected a safetensors file"):
        load_cache(tmp_path)
    save_cache([handles(200)], path)
    whole = path.read_bytes()
    for content in (b"", b"a text of more than eight bytes", whole[:6], whole[:300], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"ottfx.load_cache: {path}: expected a safetensors file"):
            load_cache(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="expected a file written by ottfx.save_cache"):
        load_cache(path)
    for metadata in ("{", "[]", "3"):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: metadata})
        with pytest.raises(ArtifactError, match="must be JSON|expected format version 1"):
            load_cache(path)
