"""examples/cpp runs an artifact without Python, and gives the tokens that `Program.generate` gives."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import cmake
import ninja
import pytest
import torch
from tiny_models import random_tokens

import ottfx
from ottfx.artifacts.archive import MANIFEST, PROGRAMS, WEIGHTS
from ottfx.artifacts.zip_members import STEM, write_member

pytestmark = pytest.mark.xdist_group("artifact")

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
WITHOUT_PYTHON = {"PATH": "/nonexistent", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def artifact(tiny_artifact) -> Path:
    if torch.cuda.is_available():
        pytest.skip("the example is for the CPU, and the artifact for the GPU")
    return tiny_artifact


@pytest.fixture(scope="module")
def program(artifact) -> ottfx.Program:
    return ottfx.load(artifact)


@pytest.fixture(scope="module")
def executable(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("cpp")
    tools = os.pathsep.join([cmake.CMAKE_BIN_DIR, ninja.BIN_DIR, os.environ["PATH"]])
    for command in (
        ["cmake", "-G", "Ninja", "-S", SOURCE, "-B", build, "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -Werror"]
        + [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "generate"


def run(executable: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(executable), *map(str, arguments)]
    return subprocess.run(command, env=WITHOUT_PYTHON, capture_output=True, text=True, timeout=120)


def generate(executable: Path, model: Path, rows: list[list[int]], count: int, *more: object) -> list[list[int]]:
    tokens = [word for row in rows for word in ("--tokens", ",".join(map(str, row)))]
    done = run(executable, model, *tokens, "--max-new-tokens", count, *more)
    assert (done.returncode, done.stderr) == (0, "")
    return [[int(word) for word in line.split(",")] for line in done.stdout.splitlines()]


def expected(program: ottfx.Program, rows: list[list[int]], count: int, **options: object) -> list[list[int]]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    result = program.generate(ids, mask, do_sample=False, max_new_tokens=count, **options)
    return result[:, longest:].tolist()


def edited(artifact: Path, target: Path, change: Callable[[dict], None], without: str = "") -> Path:
    """Copy an artifact with another manifest."""
    with zipfile.ZipFile(artifact) as old, open(target, "wb") as file, zipfile.ZipFile(file, "w") as new:
        for name in (name.removeprefix(STEM) for name in old.namelist()):
            content = old.read(STEM + name)
            if name == MANIFEST:
                manifest = json.loads(content)
                change(manifest)
                content = json.dumps(manifest).encode()
            if name != without:
                write_member(new, file, name, len(content), [content])
    return target


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([170], 20),  # packs a group in the prompt
        ([1], 3),  # no prefill: one token is a decode step
        ([150, 9, 64], 40),  # padded on the left; packs a group on the way
        ([250, 180], 300),  # grows the cache, twice
    ],
)
def test_tokens_are_those_of_the_program(executable, artifact, program, lengths, count):
    rows = prompts(*lengths)
    got = generate(executable, artifact, rows, count)
    assert got == expected(program, rows, count)
    assert len({tuple(row) for row in got}) == len(rows)


def test_a_prompt_in_chunks(executable, artifact, program):
    [row] = prompts(310)
    cache = program.new_cache(1)
    for begin in (0, 150):
        program.prefill(torch.tensor([row[begin : begin + 150]]), cache)
    assert generate(executable, artifact, [row], 20, "--chunk", 150) == expected(program, [row], 20, cache=cache)


def test_a_row_ends_with_its_end_token(executable, artifact, program, tmp_path):
    rows = prompts(150, 9)
    first, second = expected(program, rows, 12)
    end = next(token for token in first[3:] if token not in first[:3] and token not in second)

    def give_end(manifest):
        manifest["model"]["generation_config"]["eos_token_id"] = [end]

    ended = edited(artifact, tmp_path / "ended.pt2", give_end)
    assert generate(executable, ended, rows, 12) == [first[: first.index(end) + 1], second]
    assert generate(executable, ended, rows[:1], 12) == [first[: first.index(end) + 1]]


def test_external_weights_aliases_and_strides(executable, artifact, tmp_path):
    """The head is the embedding under another name, and that one has strides that no program expects."""
    name = "weights 1.safetensors"

    def move(manifest):
        (head,) = (weight for weight in manifest["programs"]["decode"]["constants"].values() if "lm_head" in weight)
        (embedding,) = (weight for weight in manifest["programs"]["decode"]["constants"].values() if "embed" in weight)
        for program in manifest["programs"].values():
            program["constants"] = {k: "tied" if v == head else v for k, v in program["constants"].items()}
        del manifest["parts"][WEIGHTS]
        manifest["weights"] |= {"location": "external", "file": name}
        manifest["weights"] |= {"aliases": {"tied": embedding}, "strides": {embedding: [1, 256]}}

    moved = edited(artifact, tmp_path / "moved.pt2", move, without=WEIGHTS)
    rows = prompts(40, 30)
    done = run(executable, moved, "--tokens", "1", "--max-new-tokens", 1)
    assert (done.returncode, done.stdout) == (1, "") and f"{name}: must be the weights" in done.stderr
    with zipfile.ZipFile(artifact) as package:
        (tmp_path / name).write_bytes(package.read(STEM + WEIGHTS))
    got = generate(executable, moved, rows, 12)
    assert got == expected(ottfx.load(moved), rows, 12)
    assert got != generate(executable, artifact, rows, 12)


def test_needs_no_python(executable, artifact, tmp_path):
    with zipfile.ZipFile(artifact) as package:
        package.extractall(tmp_path)
    programs = sorted((tmp_path / STEM / PROGRAMS).rglob("*.so"))
    assert {path.parent.name for path in programs} == {"prefill", "extend", "decode"}
    for binary in (executable, *programs):
        needed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu" in needed
        assert "python" not in needed.replace(str(Path(torch.__file__).parent), "")
    linked = subprocess.run(["ldd", str(executable)], capture_output=True, text=True, check=True).stdout
    assert "not found" not in linked


def test_no_operator_of_ottfx_is_left_in_the_package(artifact):
    """An operator in Python would be named where it is called, in the code or in its `extern_kernel` JSON."""
    with zipfile.ZipFile(artifact) as package:
        members = {name: package.read(name) for name in package.namelist() if PROGRAMS in name}
    assert {Path(name).suffix for name in members} >= {".so", ".json"}
    for name, content in members.items():
        assert b"ottfx::" not in content, name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 3}, "format_version must be 2. Got 3."),
        ({"device_type": "cuda"}, "must be an artifact for the CPU. Got one for 'cuda'."),
        ({"versions": {"torch": "1.9.1"}}, "Got 1.9.1. Export the model again here."),
        ({"cpu_isa": "x86_64 avx4096"}, "was made for a CPU with avx4096"),
        ({"programs": {"decode": {"constants": {"a": "missing"}}}}, "must include 'missing'"),
        ({"sites": [{"name": "without a schedule"}]}, "must have a field 'schedule'"),
    ],
)
def test_artifacts_that_cannot_run_here_are_refused(executable, artifact, tmp_path, change, reason):
    other = edited(artifact, tmp_path / "other.pt2", lambda manifest: manifest.update(change))
    done = run(executable, other, "--tokens", "1,2", "--max-new-tokens", 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("generate: ") and reason in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gone.pt2", "--tokens", "1", "--max-new-tokens", 1], "gone.pt2: must be a file"),
        ([__file__, "--tokens", "1", "--max-new-tokens", 1], "Got one that is no archive"),
        (["a.pt2", "--tokens", "1"], "usage: generate"),
        (["a.pt2", "--tokens", "1,x", "--max-new-tokens", 1], "must be a number from 0 on. Got 'x'"),
        (["a.pt2", "--tokens", "1", "--max-new-tokens"], "Got '--max-new-tokens'"),
    ],
)
def test_wrong_arguments_are_refused(executable, arguments, reason):
    done = run(executable, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("generate: ") and reason in done.stderr


def test_tokens_outside_the_vocabulary_are_refused(executable, artifact):
    done = run(executable, artifact, "--tokens", "1,256", "--max-new-tokens", 1)
    assert done.returncode == 1 and "must be below 256, the model's vocabulary. Got 256." in done.stderr
