"""The doors: what they accept, what they refuse in words, and that each of them reaches the same pass."""

import copy
import subprocess
import sys

import pytest
import torch
from plain_decoder import greedy, plain_decoder
from tiny_models import random_tokens, tiny_model
from torch.torch_version import TorchVersion

import ottfx
from ottfx import api
from ottfx.backend import ott
from ottfx.graph_compiler import compile_graph
from ottfx.kv_tensor import KVTensor
from ottfx.settings import make_settings

EAGER = {"lower": "eager"}


def test_compile_is_in_place_and_can_be_repeated():
    model = tiny_model("llama")
    assert ottfx.compile(model, bits=2, scheme="kivi", **EAGER) is model
    ids = random_tokens(2, 200)
    with torch.no_grad():
        cache = model(ids).past_key_values
        assert cache.layers[1].keys.payload.half.config.key_bits == 2
        ottfx.compile(model, key_bits=4, value_bits=8, **EAGER)
        cache = model(ids).past_key_values
    half = cache.layers[1].keys.payload.half
    assert (half.scheme.name, half.config.widths()) == ("ott+", (4, 8))


def test_a_cache_keeps_its_scheme_when_the_model_is_compiled_for_another():
    model = ottfx.compile(tiny_model("llama"), scheme="kivi", **EAGER)
    ids = random_tokens(2, 200)
    with torch.no_grad():
        cache = model(ids).past_key_values
        ottfx.compile(model, scheme="ott", **EAGER)
        cache = model(ids[:, :1], past_key_values=cache).past_key_values
    assert cache.layers[0].keys.payload.half.scheme.name == "kivi"


def test_a_mode_that_replays_steps_tells_caches_of_other_configs_apart():
    model, ids, caches = tiny_model("llama"), random_tokens(2, 200), []
    for bits in (2, 4):
        ottfx.compile(model, scheme="kivi", bits=bits, **EAGER)
        with torch.no_grad():
            caches.append(model(ids).past_key_values)
    logits = []
    for mode in (None, "reduce-overhead"):
        ottfx.compile(model, mode=mode, **EAGER)
        with torch.no_grad():
            logits.append([model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits for cache in caches])
    torch.testing.assert_close(logits[1], logits[0])
    assert not torch.equal(*logits[1])


def test_where_steps_are_replayed_guards_inside_a_handle_are_not_checked(monkeypatch):
    filtered = []
    keep = api._worth_checking

    def spy(guards):
        kept = keep(guards)
        filtered.append({(guard.name, is_kept) for guard, is_kept in zip(guards, kept, strict=True)})
        return kept

    monkeypatch.setattr(api, "_worth_checking", spy)
    model, ids = ottfx.compile(tiny_model("llama"), mode="reduce-overhead", **EAGER), random_tokens(1, 8)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    inside = [is_kept for name, is_kept in filtered[-1] if ".keys." in name and "layers" in name]
    handles = [is_kept for name, is_kept in filtered[-1] if name.endswith(".keys") and "layers" in name]
    assert not any(inside) and all(handles) and len(inside) == 2 * len(handles) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: ottfx.compile(m, bits=5), "bits must be one of"),
        (lambda m: ottfx.compile(m, scheme="kiwi"), "kivi"),
        (lambda m: ottfx.compile(m, outlier_seats=3), "outlier_capacity"),
        (lambda m: ottfx.compile(m, mode="fastest"), "mode must be one of"),
        (lambda m: ottfx.compile(m, lower="c"), "inductor"),
        (lambda m: ottfx.compile(m.forward), "torch.nn.Module"),
        (lambda m: ottfx.compile(torch.compile(m, backend="eager")), "original module"),
        (lambda m: ottfx.memory_footprint(()), "without any"),
    ],
    ids=["bits", "scheme", "option", "mode", "lower", "function", "compiled", "footprint"],
)
def test_wrong_arguments_say_what_to_do(call, words):
    with pytest.raises(ottfx.OttfxError, match=words):
        call(tiny_model("llama"))


@pytest.mark.parametrize("door", ["model.compile", "torch.compile(model.forward)", "torch.compile(model)"])
def test_torch_compile_doors(door):
    reference, model = tiny_model("llama"), tiny_model("llama")
    options = {"scheme": "none", **EAGER}
    ids = random_tokens(2, 9)
    with torch._dynamo.config.patch(specialize_float=True):
        if door == "model.compile":
            model.compile(backend=ott, dynamic=True, options=options)
        elif door == "torch.compile(model.forward)":
            model.forward = torch.compile(model.forward, backend=ott, dynamic=True, options=options)
        else:
            called = torch.compile(model, backend=ott, dynamic=True, options=options)
            with torch.no_grad():
                assert type(called(ids).past_key_values.layers[0].keys) is KVTensor
            return
        kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        got = model.generate(ids, return_dict_in_generate=True, **kwargs)
    assert torch.equal(got.sequences, reference.generate(ids, **kwargs))
    assert type(got.past_key_values.layers[0].keys) is KVTensor


def test_a_plain_decoder_with_tuples():
    model = plain_decoder()
    twin = ottfx.compile(copy.deepcopy(model), scheme="none", **EAGER)
    prompt = random_tokens(2, 30)
    assert torch.equal(greedy(model, prompt, 40)[0], greedy(twin, prompt, 40)[0])
    with torch.no_grad():
        _, cache = twin(prompt)
    assert type(cache[0][0]) is KVTensor
    footprint = ottfx.memory_footprint(cache)
    assert footprint.total == sum(footprint.parts.values()) == sum(sum(layer.values()) for layer in footprint.per_layer)


def test_a_graph_without_a_cache_is_left_alone():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want = layer(x)
        got = torch.compile(layer, backend=ott, options=EAGER)(x)
    torch.testing.assert_close(got, want)


def test_a_graph_without_inputs():
    function = torch.compile(lambda: torch.arange(3) + 1, backend=ott, options=EAGER)
    assert function().tolist() == [1, 2, 3]


def test_an_old_torch_gets_its_workaround_and_options_win(monkeypatch):
    seen = []

    def compile_fx(gm, example_inputs, config_patches):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    settings = make_settings()
    for version, device, options in [
        ("2.12.1", "cpu", {}),
        ("2.12.1", "meta", {}),
        ("2.13.0", "cpu", {}),
        ("2.12.1", "cpu", {"assert_indirect_indexing": True}),
    ]:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        settings.inductor_options = options
        compile_graph(gm, [torch.empty(1, device=device)], settings)
    assert seen == [{"assert_indirect_indexing": False}, None, None, {"assert_indirect_indexing": True}]


def test_inlined_cpu_ops_are_refused_where_inductor_breaks_them(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))
    assert make_settings({"inline_cpu_ops": True}).inline_cpu_ops
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    with pytest.raises(ottfx.ConfigError, match="torch 2.12 or newer"):
        make_settings({"inline_cpu_ops": True})


@pytest.mark.parametrize(
    ("mode", "records", "options"),
    [
        (None, False, {}),
        ("default", False, {}),
        ("reduce-overhead", True, {}),
        ("max-autotune", True, {"max_autotune": True}),
        ("max-autotune-no-cudagraphs", False, {"max_autotune": True}),
    ],
)
def test_modes(mode, records, options):
    for settings in (make_settings(mode=mode), make_settings({"mode": mode})):
        assert settings.records_steps is records
        assert "triton.cudagraphs" not in settings.inductor_options
        assert options.items() <= settings.inductor_options.items()
        assert bool(settings.inductor_options) is bool(options)


def test_footprint_is_what_the_tensors_hold():
    model = ottfx.compile(tiny_model("llama"), scheme="ott", **EAGER)
    with torch.no_grad():
        cache = model(random_tokens(2, 300)).past_key_values
    footprint = ottfx.memory_footprint(cache)
    tensors = [
        t for layer in cache.layers for half in (layer.keys, layer.values) for t in half.payload.half.tensors.values()
    ]
    assert footprint.total == sum(t.nbytes for t in tensors)
    assert set(footprint.parts) == {"codes", "scales", "residual", "pool", "tables"}
    codes = 2 * 2 * 2 * 2 * 3 * 128 * 16 * 2 // 8  # layers, halves, batch, heads, pages, tokens, channels, bits
    assert footprint.parts["codes"] == codes
    assert len(footprint.per_layer) == 2 and footprint.dense_total == 2 * 2 * 2 * 2 * 300 * 16 * 4


def test_explain_reports_sites_refusals_and_bytes():
    report = ottfx.explain(tiny_model("gemma3"), {"input_ids": random_tokens(2, 40)}, bits=2)
    assert [site.kinds for site in report.sites] == [("prompt", "continue")]
    assert [refusal.index for refusal in report.refusals] == [0]
    text = str(report)
    assert "sliding window" in text and "ott_plus_attend" in text and "32k" in text
    site = report.sites[0]
    assert site.bytes_per_token[32768] < site.dense_bytes_per_token / 5


def test_who_compiled_nothing_is_told(tmp_path):
    script = "import torch, ottfx.backend\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "generate() runs the uncompiled model" in done.stderr


def test_refusals_are_counted_and_told_once(caplog):
    model = ottfx.compile(tiny_model("mistral-sliding"), **EAGER)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    told = [record.getMessage() for record in caplog.records if record.name == "ottfx"]
    assert len(told) == 1
    assert "2 of 2 attentions" in told[0] and "sliding window" in told[0]
