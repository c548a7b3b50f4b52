"""Rewritten programs of every family, run node by node against the model itself: nothing is compiled here."""

import warnings

import pytest
import torch
from plain_decoder import plain_decoder
from tiny_models import FAMILIES, random_tokens, tiny_model

import ottfx
from ottfx.artifacts.export_graph import KINDS, LEADING_INPUTS, flat_program
from ottfx.artifacts.export_model import call_transformers
from ottfx.artifacts.exported_programs import export_again
from ottfx.artifacts.program_cache import ProgramCache
from ottfx.registry import make_config


def call_plain(model, input_ids, attention_mask, past):
    total = attention_mask.shape[1]
    column = torch.arange(total)
    row = column[total - input_ids.shape[1] :]
    mask = (column <= row[:, None]) & attention_mask.bool()[:, None, None, :]
    return model(input_ids, tuple(past) or None, mask)


class Eager:
    """The programs of a model, over one cache, as `Program` runs them; or only one of them."""

    def __init__(self, model, call, scheme, **options):
        config = make_config(scheme, **options)
        self.programs = {kind.name: flat_program(model, call, kind, config) for kind in KINDS}

    def step(self, input_ids, mask, cache):
        past, q_len = cache.length, input_ids.shape[1]
        cache.make_room(past + q_len)
        name = "decode" if q_len == 1 else "extend" if past else "prefill"
        nothing = torch.empty(past, 0, dtype=torch.uint8)
        (logits,) = self.programs[name].gm(input_ids, mask, nothing, cache.lengths(), *cache.tensors().values())
        cache.advance(past + q_len)
        return logits


def chunks_of(tokens, mask, lengths):
    start = 0
    for length in lengths:
        yield tokens[:, start : start + length], mask[:, : start + length]
        start += length


# One of each kind: rotary, learned and offset positions, one KV head, windows. The others are slow ones.
EVERY_TIME = ("llama", "gpt2", "opt", "falcon", "gemma3")


@pytest.mark.parametrize(
    "family", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_programs_compute_what_the_model_does(family):
    model = tiny_model(family)
    eager = Eager(model, call_transformers, "none")
    tokens, mask = random_tokens(2, 48), torch.ones(2, 48, dtype=torch.int64)
    mask[0, :3] = 0
    cache = ProgramCache.allocate(eager.programs["decode"].sites, 2)
    past = []
    for chunk, seen in chunks_of(tokens, mask, [30, 1, 15, 1, 1]):
        with torch.no_grad():
            want, past = call_transformers(model, chunk, seen, past)
        torch.testing.assert_close(eager.step(chunk, seen, cache), want[:, -1:], rtol=1e-4, atol=1e-4)
    for (key, value), (stored_key, stored_value) in zip(past, cache.layers, strict=True):
        torch.testing.assert_close(stored_key.read(48)[1], key[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stored_value.read(48)[1], value[1], rtol=1e-4, atol=1e-4)


def test_plain_decoder():
    model = plain_decoder()
    eager = Eager(model, call_plain, "ott", exempt_layers=())
    assert [site.name for site in eager.programs["decode"].sites] == ["model.attention.0", "model.attention.1"]
    tokens, mask = random_tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    cache, past = ProgramCache.allocate(eager.programs["decode"].sites, 3), []
    for chunk, seen in chunks_of(tokens, mask, [1, 7, 1, 10, 1]):
        with torch.no_grad():
            want, past = call_plain(model, chunk, seen, past)
        torch.testing.assert_close(eager.step(chunk, seen, cache), want[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "options", "packed"),
    [
        ("ott", {"exempt_layers": ()}, 256),
        ("ott+", {"exempt_layers": ()}, 256),
        pytest.param("turbo", {}, 340, marks=pytest.mark.slow),
        pytest.param("polar_pairs", {}, 256, marks=pytest.mark.slow),
        pytest.param("qjl", {}, 256, marks=pytest.mark.slow),
    ],
)
def test_quantized_programs_do_what_the_compiled_model_does(scheme, options, packed):
    model = tiny_model("llama")
    eager = Eager(model, call_transformers, scheme, **options)
    tokens, mask = random_tokens(2, 340), torch.ones(2, 340, dtype=torch.int64)
    cache = ProgramCache.allocate(eager.programs["decode"].sites, 2)
    compiled = ottfx.compile(model, scheme=scheme, lower="eager", **options)
    past = None
    for chunk, seen in chunks_of(tokens, mask, [300, 1, 38, 1]):
        with torch.no_grad():
            output = compiled(input_ids=chunk, attention_mask=seen, past_key_values=past, use_cache=True)
        past = output.past_key_values
        torch.testing.assert_close(eager.step(chunk, seen, cache), output.logits[:, -1:], rtol=1e-4, atol=1e-4)
    assert cache.layers[0][0].packed == past.layers[0].keys.payload.half.packed == packed


def test_inputs_have_one_order_and_sizes_vary():
    program = flat_program(tiny_model("llama"), call_transformers, KINDS[2], make_config("ott"))
    names = [node.name for node in program.gm.graph.find_nodes(op="placeholder")]
    assert tuple(names[:4]) == LEADING_INPUTS and len(names) == len(program.example)
    state = ProgramCache.allocate(program.sites, 4, 700).tensors()
    for fake, tensor in zip(program.example[4:], state.values(), strict=True):
        assert fake.dtype == tensor.dtype
        free = [dim for dim, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)]
        fixed = [dim for dim in range(fake.dim()) if dim not in free]
        assert free[0] == 0 and [fake.shape[dim] for dim in fixed] == [tensor.shape[dim] for dim in fixed]


def test_exported_programs_run_with_any_size_and_see_through():
    model = tiny_model("llama", num_hidden_layers=1)
    program = flat_program(model, call_transformers, KINDS[0], make_config("kivi"))
    exported = export_again(program)
    assert {str(node.target) for node in exported.graph.nodes if "ottfx" in str(node.target)} == {
        "ottfx.kivi_append.default"
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch copies its own tree
        seen_through = exported.run_decompositions({})
    assert not [node for node in seen_through.graph.nodes if "ottfx" in str(node.target)]
    for batch_size, length in ((1, 2), (4, 150)):
        tokens, mask = random_tokens(batch_size, length), torch.ones(batch_size, length, dtype=torch.int64)
        with torch.no_grad():
            want = model(tokens).logits[:, -1:]
        for module in (exported.module(), seen_through.module()):
            cache = ProgramCache.allocate(program.sites, batch_size, length)
            state = cache.tensors()
            logits = module(tokens, mask, torch.empty(0, 0, dtype=torch.uint8), cache.lengths(), *state.values())[0]
            torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
            assert state["layers.0.key.key_residual"].any() or length == 150
            assert bool(state["layers.0.value.value_codes"].any()) == (length == 150)


def test_an_attention_that_cannot_be_stored_is_named():
    with pytest.raises(ottfx.MatchError, match=r"layers\.0\.self_attn: head_dim must be a multiple of 16, got 8"):
        flat_program(tiny_model("llama", head_dim=8), call_transformers, KINDS[0], make_config("ott"))


def test_a_call_that_returns_other_tensors_is_refused():
    def swapped(model, input_ids, attention_mask, past):
        logits, layers = call_transformers(model, input_ids, attention_mask, past)
        return logits, layers[::-1]

    with pytest.raises(ottfx.MatchError, match="keys and values of each of its layers, in order"):
        flat_program(tiny_model("llama"), swapped, KINDS[0], make_config("ott"))
