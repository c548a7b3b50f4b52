"""The commands about compiled programs: what they pass on, what they print, and how they say what is wrong."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from dense_program import DenseCache, DenseProgram
from tiny_models import tiny_model
from typer.testing import CliRunner

import ottfx
from ottfx.artifacts.archive import read_archive, write_archive
from ottfx.artifacts.commands import parse_options
from ottfx.artifacts.manifest import (
    Manifest,
    ModelEntry,
    ProgramEntry,
    WeightsEntry,
    entry_from_site,
    state_entries,
)
from ottfx.artifacts.program_cache import CacheSite, ProgramCache
from ottfx.artifacts.report import bytes_per_token, describe
from ottfx.cli import app
from ottfx.errors import ArtifactError, ConfigError
from ottfx.registry import make_config

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LETTERS_ONLY = {"suppress_tokens": list(range(94, 256))}


SITES = [
    CacheSite(
        name=f"layers.{layer}", config=make_config("ott").at_layer(layer), num_kv_heads=2, head_dim=64,
        dtype=torch.bfloat16,
    )
    for layer in range(5)
]  # fmt: skip
STATE = state_entries(SITES)
INPUTS = ("input_ids", "attention_mask", *(tensor.name for tensor in STATE))
MANIFEST = Manifest(
    versions={"ottfx": "0.1.0", "torch": "2.13.0"},
    device_type="cuda",
    compute_capability="9.0",
    dtype="bfloat16",
    model=ModelEntry(class_name="TinyForCausalLM", config=None, generation_config=None),
    sites=tuple(map(entry_from_site, SITES)),
    state=STATE,
    programs={name: ProgramEntry(inputs=INPUTS, outputs=("logits",), constants={"c": "w"}) for name in ("a", "decode")},
)


def write_file(path, manifest=MANIFEST):
    """Write an archive whose programs are no programs; return its manifest."""
    path.with_suffix(".so").write_bytes(b"program")
    programs = {name: [path.with_suffix(".so")] for name in manifest.programs}
    return write_archive(path, manifest, programs, {"w": torch.zeros(300, 300)}, {})  # 351.69 KiB with a header


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def model():
    model = tiny_model("llama", vocab_size=256)
    model.generation_config.update(**LETTERS_ONLY)
    return model


@pytest.fixture
def program(model, monkeypatch):
    """The program that `ottfx run` loads."""
    program = DenseProgram(model, tokenizer=byte_tokenizer())
    monkeypatch.setattr(ottfx, "load", lambda path: program, raising=False)
    return program


def answer(program, text, **options):
    """The new text that the model itself gives."""
    ids = program.tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = program.model.generate(ids, **{"max_new_tokens": 8, **options})
    return program.tokenizer.decode(tokens[0, ids.shape[1] :])


def test_run_prints_the_answer_and_what_it_took(program):
    result = invoke("run", "model.pt2", "--prompt", "hello there", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(answer(program, "hello there") + "\n")
    assert "11 tokens of prompt" in result.output and "8 new tokens" in result.output
    # Two layers, keys and values, two heads of 16 channels, 4 bytes; the last token is not stored.
    assert f"cache of 18 tokens: {18 * 2 * 2 * 2 * 16 * 4 / 1024:.2f} KiB (dense 9.00 KiB)" in result.output


@pytest.mark.parametrize(("flags", "text"), [((), "<user>hello"), (("--raw",), "hello")])
def test_run_uses_the_chat_template(program, flags, text):
    program.tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    result = invoke("run", "model.pt2", "--prompt", "hello", "--max-new-tokens", 8, *flags)
    assert result.output.startswith(answer(program, text) + "\n")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--temperature", 2.5), {"temperature": 2.5}),
        (("--temperature", 2.5, "--top-k", 200, "--top-p", 0.95), {"temperature": 2.5, "top_k": 200, "top_p": 0.95}),
        ((), {}),
    ],
)
def test_run_samples(program, flags, options):
    result = invoke("run", "model.pt2", "--prompt", "hello", "--max-new-tokens", 8, "--seed", 3, *flags)
    torch.manual_seed(3)
    expected = answer(program, "hello", do_sample=True, **options)
    assert expected != answer(program, "hello")
    assert result.output.startswith(expected + "\n"), result.output


def test_run_at_temperature_0_is_greedy(program):
    flags = ("--temperature", 0, "--top-k", 50, "--seed", 3)
    result = invoke("run", "model.pt2", "--prompt", "hello", "--max-new-tokens", 8, *flags)
    assert result.output.startswith(answer(program, "hello") + "\n")


def test_run_continues_what_it_saved(program, monkeypatch):
    files = {}
    monkeypatch.setattr(ottfx, "save_cache", lambda cache, path: files.update({str(path): cache}), raising=False)
    monkeypatch.setattr(ottfx, "load_cache", lambda path, device: files[str(path)], raising=False)
    result = invoke("run", "model.pt2", "--prompt", "hello", "--max-new-tokens", 8, "--save-cache", "a.cache")
    assert result.exit_code == 0, result.output
    assert files["a.cache"].length == 5 + 8, "the last token of the answer is in it, too"
    first = answer(program, "hello")
    program.steps.clear()
    result = invoke("run", "model.pt2", "--prompt", " world", "--max-new-tokens", 8, "--cache", "a.cache")
    assert result.output.startswith(answer(program, f"hello{first} world") + "\n")
    assert program.steps[0] == (6, False), "what is stored is not read again"


@pytest.mark.parametrize("stored", [DenseCache(2), [(torch.zeros(1), torch.zeros(1))]], ids=["batch", "kind"])
def test_run_needs_a_cache_of_one_sequence(program, monkeypatch, stored):
    monkeypatch.setattr(DenseCache, "__repr__", lambda self: "DenseCache")
    monkeypatch.setattr(ottfx, "load_cache", lambda path, device: stored, raising=False)
    result = invoke("run", "model.pt2", "--prompt", "hello", "--cache", "a.cache")
    assert result.exit_code == 1
    assert "'a.cache' must hold the cache of one sequence" in result.output


def test_run_needs_a_tokenizer(program):
    program.tokenizer = None
    result = invoke("run", "model.pt2", "--prompt", "hello")
    assert result.exit_code == 1
    assert "'model.pt2' must hold a tokenizer" in result.output


def test_run_says_what_is_wrong_with_a_file(monkeypatch):
    def fail(path):
        raise ArtifactError(f"ottfx.load: {path} is not one.")

    monkeypatch.setattr(ottfx, "load", fail, raising=False)
    result = invoke("run", "model.pt2", "--prompt", "hello")
    assert result.exit_code == 1
    assert result.output == "ottfx.load: model.pt2 is not one.\n"


def test_memory_is_what_a_cache_of_that_length_holds():
    got = bytes_per_token(MANIFEST)
    assert list(got) == [1024, 8192, 32768]
    for length, count in got.items():
        assert count * length == ProgramCache.allocate(SITES, 1, length).nbytes


def test_inspect_tells_what_is_in_a_file(tmp_path):
    path = tmp_path / "m.pt2"
    written = write_file(path)
    result = invoke("inspect", path)
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.replace("│", " ").split()) for line in result.output.splitlines()]
    memory = bytes_per_token(MANIFEST)[8192]
    for expected in (
        "model TinyForCausalLM, bfloat16",
        "built for cuda, 9.0",
        "built with ottfx 0.1.0, torch 2.13.0",
        "weights 351.69 KiB in the file",
        f"8k {memory:.1f} 2560 {2560 / memory:.2f}x",
        "key.key_codes int32 (batch, 2, pages, 512) codes",
        "value.outlier_value bfloat16 (batch, 2, 35, 64) pool",
        f"decode input_ids, attention_mask, and {len(STATE)} of state logits 1",
    ):
        assert expected in rows, expected
    text = " ".join(rows)
    assert "0-1 2 64 bfloat16 ott" in text and "2-4 2 64 bfloat16 ott" in text, "equal layers are one row"
    assert "outlier_capacity=0" in text and "outlier_capacity=3" in text
    assert all(part.sha256[:16] in text for part in written.parts.values())


def test_layers_that_alternate_are_grouped(tmp_path):
    sites = tuple(MANIFEST.sites[layer] for layer in (0, 2, 3, 0, 4))
    write_file(tmp_path / "m.pt2", dataclasses.replace(MANIFEST, sites=sites))
    result = invoke("inspect", tmp_path / "m.pt2")
    assert "│ 0, 3 " in result.output and "│ 1-2, 4 " in result.output


def test_inspect_prints_the_manifest_itself(tmp_path):
    path = tmp_path / "m.pt2"
    write_file(path)
    result = invoke("inspect", path, "--json")
    assert Manifest.from_json(result.output) == read_archive(path).manifest


def test_inspect_names_external_weights(tmp_path):
    path = tmp_path / "m.pt2"
    write_file(path, dataclasses.replace(MANIFEST, weights=WeightsEntry(location="external")))
    assert "351.69 KiB in m.safetensors" in invoke("inspect", path).output


def test_inspect_checks_every_part_if_asked(tmp_path):
    path = tmp_path / "m.pt2"
    write_file(path)
    path.write_bytes(path.read_bytes().replace(b"program", b"Program", 1))
    assert invoke("inspect", path).exit_code == 0
    result = invoke("inspect", path, "--verify")
    assert result.exit_code == 1
    assert "SHA-256" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("change", "text"), [({"shape": ("batch", "3*lines")}, "shape must be of"), ({"dtype": "int33"}, "Got 'int33'")]
)
def test_state_that_says_nothing_is_an_error(change, text):
    state = (dataclasses.replace(STATE[0], **change), *STATE[1:])
    with pytest.raises(ArtifactError, match=text):
        describe(dataclasses.replace(MANIFEST, state=state), "m.pt2")


def test_inspect_says_what_is_wrong_with_a_file(tmp_path):
    result = invoke("inspect", tmp_path / "absent.pt2")
    assert result.exit_code == 1
    assert "absent.pt2" in result.output and "Traceback" not in result.output


def test_inspect_imports_no_transformers(tmp_path):
    write_file(tmp_path / "m.pt2")
    code = "import sys; from ottfx.cli import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; assert 'transformers' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", tmp_path / "m.pt2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "TinyForCausalLM" in done.stdout


@pytest.fixture
def export(monkeypatch, model):
    """Stand in for `ottfx.export` and the model it gets; returns what it was called with."""
    calls = {}

    def fake(model, path, bits=2, *, on_stage, format, weights, **options):
        calls.update(model=model, path=path, bits=bits, format=format, weights=weights, **options)
        on_stage("capture decode", 0, 2)
        on_stage("write", 1, 2)
        if format == "aoti":
            write_file(path, dataclasses.replace(MANIFEST, weights=WeightsEntry(location=weights)))
        else:
            path.mkdir()
            (path / "decode.pt2").write_bytes(bytes(2048))

    monkeypatch.setattr(ottfx, "export", fake, raising=False)
    monkeypatch.setattr("ottfx.models.load_smollm2", lambda dtype, notify: (model.to(dtype), "tokenizer"))
    return calls


def test_export_passes_on_what_it_is_told(export, model, tmp_path):
    path = tmp_path / "m.pt2"
    flags = "--bits 4 --scheme kivi --dtype float16 --device cpu --option group-size=64 --option name=text".split()
    result = invoke("export", "smollm2", "-o", path, *flags)
    assert result.exit_code == 0, result.output
    assert export == {
        "model": model, "path": path, "bits": 4, "scheme": "kivi", "format": "aoti", "weights": "inside",
        "tokenizer": "tokenizer", "group_size": 64, "name": "text",
    }  # fmt: skip
    assert model.dtype == torch.float16
    memory = bytes_per_token(MANIFEST)
    assert f"{path.stat().st_size / 1024:.2f} KiB\n" in result.output
    assert f"{memory[1024]:.1f} at 1k, {memory[8192]:.1f} at 8k, {memory[32768]:.1f} at 32k" in result.output


def test_export_leaves_defaults_to_the_scheme(export, tmp_path):
    assert invoke("export", "smollm2", "-o", tmp_path / "m.pt2", "--device", "cpu").exit_code == 0
    assert export["bits"] is None and export["scheme"] == "ott+"
    assert export["model"].dtype == torch.bfloat16


def test_export_names_external_weights(export, tmp_path):
    path = tmp_path / "m.pt2"
    result = invoke("export", "smollm2", "-o", path, "--device", "cpu", "--weights", "external")
    assert "351.69 KiB of weights in m.safetensors" in result.output


def test_export_may_write_a_folder(export, tmp_path):
    result = invoke("export", "smollm2", "-o", tmp_path / "m", "--device", "cpu", "--format", "exported")
    assert result.exit_code == 0, result.output
    assert "2.00 KiB" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["smollm2", "--option", "group_size"], "--option must be name=value"),
        (["smollm2", "--dtype", "int8"], "Got 'int8'"),
        (["no/such/folder"], "Got 'no/such/folder'"),
    ],
)
def test_export_says_what_is_wrong(export, arguments, text):
    result = invoke("export", *arguments, "--device", "cpu")
    assert result.exit_code == 1
    assert text in result.output and "Traceback" not in result.output
    assert not export


def test_options_of_a_scheme_are_read():
    pairs = ["group-size=64", "mask_replaced=false", "exempt_layers=0,1", "replacement=rest", "scale=-1.5", "text=a=b"]
    assert parse_options(pairs) == {
        "group_size": 64,
        "mask_replaced": False,
        "exempt_layers": (0, 1),
        "replacement": "rest",
        "scale": -1.5,
        "text": "a=b",
    }


@pytest.mark.parametrize("pairs", [["group_size"], ["=3"], ["a b=3"], ["bits=2"], ["a=1", "a=2"]])
def test_wrong_options_are_refused(pairs):
    with pytest.raises(ConfigError, match="must be name=value"):
        parse_options(pairs)
