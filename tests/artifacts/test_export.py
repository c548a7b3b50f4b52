"""An artifact from end to end: exported once, loaded, run, generated from, in this process and in another."""

import subprocess
import sys

import pytest
import torch
from plain_decoder import plain_decoder
from tiny_models import random_tokens, tiny_model
from torch import nn
from typer.testing import CliRunner

import ottfx
from ottfx.artifacts.export_graph import KINDS, flat_program
from ottfx.artifacts.export_model import call_transformers
from ottfx.artifacts.program_cache import ProgramCache
from ottfx.cli import app
from ottfx.registry import make_config

pytestmark = pytest.mark.xdist_group("artifact")

OPTIONS = {"bits": 2, "exempt_layers": ()}


@pytest.fixture(scope="module")
def program(tiny_artifact):
    return ottfx.load(tiny_artifact)


@pytest.fixture(scope="module")
def definition(program):
    """The same programs, run node by node."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=256).to(program.device)
    config = make_config("ott", **OPTIONS)
    return {kind.name: flat_program(model, call_transformers, kind, config).gm for kind in KINDS}


def padded(program, batch_size, length, padding=0):
    tokens, mask = random_tokens(batch_size, length), torch.ones(batch_size, length, dtype=torch.int64)
    mask[-1, :padding] = 0
    return tokens.to(program.device), mask.to(program.device)


@pytest.mark.parametrize(
    ("batch_size", "past", "q_len", "padding"),
    [
        (1, 0, 1, 0), (1, 1, 1, 0), (1, 127, 1, 3), (1, 128, 1, 0), (4, 300, 1, 1), (1, 0, 2, 0), (1, 0, 300, 2),
        (5, 0, 130, 70), (2, 1, 9, 1), (1, 300, 140, 2), (3, 7, 2, 3),
    ],
)  # fmt: skip
def test_programs_equal_their_definition_for_any_size(program, definition, batch_size, past, q_len, padding):
    tokens, mask = padded(program, batch_size, past + q_len, padding)
    cache = program.new_cache(batch_size)
    if past:
        program.prefill(tokens[:, :past], cache, mask[:, :past])
    expected = cache.clone()
    logits = program.prefill(tokens[:, past:], cache, mask)
    expected.make_room(past + q_len)
    name = "decode" if q_len == 1 else "extend" if past else "prefill"
    nothing = torch.empty(past, 0, dtype=torch.uint8, device=program.device)
    state = expected.tensors()
    (want,) = definition[name](tokens[:, past:], mask, nothing, expected.lengths(), *state.values())
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert cache.length == past + q_len
    for name, tensor in cache.tensors().items():
        if tensor.dtype == torch.int32 and "codes" in name:
            # A value on the border of two codes may fall to either side.
            assert (tensor != state[name]).float().mean() < 1e-3, name
        else:
            torch.testing.assert_close(tensor, state[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(("batch_size", "length", "padding"), [(1, 5, 0), (5, 60, 30)])
def test_long_generation_follows_the_compiled_model(program, batch_size, length, padding):
    tokens, mask = padded(program, batch_size, length + 256, padding)
    model = ottfx.compile(
        tiny_model("llama", num_hidden_layers=1, vocab_size=256).to(program.device),
        lower="eager",
        scheme="ott",
        **OPTIONS,
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, past, start = program.new_cache(batch_size), None, 0
    first_pages, differences, errors = cache.layers[0][0].shape.pages, [], []
    dense = tiny_model("llama", num_hidden_layers=1, vocab_size=256).to(program.device)
    full = dense(tokens, attention_mask=mask, position_ids=positions).logits
    for stop in range(length, length + 257):
        chunk = slice(start, stop)
        logits = program.prefill(tokens[:, chunk], cache, mask[:, :stop])[:, 0]
        with torch.no_grad():
            output = model(
                input_ids=tokens[:, chunk],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, chunk],
                past_key_values=past,
                use_cache=True,
            )
        past, start = output.past_key_values, stop
        differences.append((logits - output.logits[:, -1]).abs().mean())
        errors.append((output.logits[:, -1] - full[:, stop - 1]).abs().mean())
    assert cache.layers[0][0].shape.pages > first_pages, "the cache was to grow"
    assert cache.layers[0][0].packed >= 128
    # Rounding may move a value into the next code; what that changes is small beside what quantization changes.
    assert torch.stack(differences).mean() < 0.05 * torch.stack(errors).mean()


def test_generate_equals_a_greedy_loop(program):
    tokens, mask = padded(program, 3, 20, 4)
    got = program.generate(tokens, mask, max_new_tokens=40, do_sample=False)
    cache, step, want = program.new_cache(3, 60), tokens, tokens
    for _ in range(40):
        logits = program.prefill(step, cache, mask)
        step = logits[:, -1].argmax(-1, keepdim=True)
        want, mask = torch.cat([want, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
    assert torch.equal(got, want)


def test_another_process_needs_only_torch(program, tiny_artifact):
    tokens, _ = padded(program, 1, 150)
    script = f"""
import sys
for name in ("transformers", "accelerate", "rich", "typer"):
    sys.modules[name] = None
import torch, ottfx
program = ottfx.load({str(tiny_artifact)!r})
cache, step, out = program.new_cache(1), torch.tensor({tokens.tolist()}, device=program.device), []
for _ in range(20):
    step = program.prefill(step, cache)[:, -1].argmax(-1, keepdim=True)
    out.append(step.item())
print(out)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    want = program.generate(tokens, max_new_tokens=20, do_sample=False)[0, 150:]
    assert result.stdout.strip() == str(want.tolist())


def test_cache_is_saved_restored_and_branched(program, tmp_path):
    tokens, _ = padded(program, 2, 300)
    cache = program.new_cache(2)
    program.prefill(tokens[:, :280], cache)
    ottfx.save_cache(cache, tmp_path / "prompt.safetensors")
    want = [program.prefill(tokens[:, 280 : 281 + n], cache.clone()) for n in (0, 15)]
    for n, expected in zip((0, 15), want, strict=True):
        restored = ottfx.load_cache(tmp_path / "prompt.safetensors", device=program.device)
        assert torch.equal(program.prefill(tokens[:, 280 : 281 + n], restored), expected)


def test_parts_of_the_file(program, tiny_artifact):
    assert set(program.manifest.programs) == {"prefill", "extend", "decode"}
    assert program.tokenizer.decode(program.tokenizer("some text").input_ids) == "some text"
    text = program._archive.read("data/aotinductor/decode/" + metadata_of(program)).decode()
    assert "ottfx" not in text
    assert str(program).startswith("Program(LlamaForCausalLM, device=")
    names = [name for name in program.manifest.parts if name.endswith(".json") and "aotinductor" in name]
    assert names and not [name for name in names if b"ottfx::" in program.read(name)]


def metadata_of(program):
    prefix = "data/aotinductor/decode/"
    return next(
        name.removeprefix(prefix)
        for name in program.manifest.parts
        if name.startswith(prefix) and name.endswith("_metadata.json")
    )


def test_commands_on_a_real_file(tiny_artifact, tmp_path):
    shown = CliRunner().invoke(app, ["inspect", str(tiny_artifact)])
    assert shown.exit_code == 0 and "LlamaForCausalLM" in shown.output, shown.output
    ran = CliRunner().invoke(app, ["run", str(tiny_artifact), "--prompt", "Once upon", "--max-new-tokens", "8"])
    assert ran.exit_code == 0 and "tokens/s" in ran.output, ran.output


def test_a_wrong_cache_or_shape_is_refused(program):
    tokens, mask = padded(program, 2, 5)
    with pytest.raises(ottfx.ConfigError, match=r"attention_mask must be .* = \[2, 5\]. Got \[2, 4\]"):
        program.prefill(tokens, program.new_cache(2), mask[:, :4])
    with pytest.raises(ottfx.ConfigError, match="same batch size. Got 2 and 3"):
        program.prefill(tokens, program.new_cache(3))
    with pytest.raises(ottfx.ConfigError, match=r"\[batch, 1\]. Got \[2, 5\]"):
        program.decode(tokens, program.new_cache(2))
    with pytest.raises(ottfx.ConfigError, match="token ids"):
        program.prefill(tokens.float(), program.new_cache(2))
    with pytest.raises(ottfx.ConfigError, match="must be a ProgramCache"):
        program.prefill(tokens, None)
    others = [*program.sites, *program.sites]
    with pytest.raises(ottfx.CacheError, match="one of this program's"):
        program.prefill(tokens, ProgramCache.allocate(others, 2, device=program.device))


def test_a_file_for_another_device_is_refused(tiny_artifact):
    with pytest.raises(ottfx.ArtifactError, match="for which the programs were made"):
        ottfx.load(tiny_artifact, device="meta")


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (lambda: tiny_model("llama"), {"weights": "nowhere"}, r"weights must be one of \['inside', 'external'\]"),
        (lambda: tiny_model("llama"), {"format": "onnx"}, r"format must be one of \['aoti', 'exported'\]"),
        (lambda: tiny_model("llama"), {"bits": 5}, "bits must be one of"),
        (lambda: tiny_model("llama"), {"colour": 1}, r"options of scheme 'ott\+' must be among"),
        (plain_decoder, {}, "call must be given"),
        (lambda: "gpt2", {}, "must be a torch.nn.Module. Got str"),
        (lambda: nn.ModuleList([Module(), Module().to("meta")]), {"call": call_transformers}, "on one device. Got"),
    ],
)
def test_wrong_arguments_of_export(tmp_path, model, options, text):
    with pytest.raises(ottfx.ConfigError, match=text):
        ottfx.export(model(), tmp_path / "model.pt2", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_exported_format_is_a_folder_that_torch_opens(tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    model.train()
    stages = []
    path = ottfx.export(
        model, tmp_path / "programs", scheme="none", format="exported",
        on_stage=lambda name, index, total: stages.append((name, index, total)),
    )  # fmt: skip
    assert model.training
    assert stages == [
        (name, i, 4) for i, name in enumerate(["capture prefill", "capture extend", "capture decode", "write"])
    ]
    assert sorted(file.name for file in path.iterdir()) == ["decode.pt2", "extend.pt2", "ottfx.json", "prefill.pt2"]
    decode = torch.export.load(path / "decode.pt2").module()
    cache = ProgramCache.allocate(flat_program(model.eval(), call_transformers, KINDS[2], make_config("none")).sites, 1)
    tokens = random_tokens(1, 1)
    nothing = torch.empty(0, 0, dtype=torch.uint8)
    logits = decode(tokens, torch.ones_like(tokens), nothing, cache.lengths(), *cache.tensors().values())[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
