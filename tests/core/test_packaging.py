"""Every way to install or run ottfx, each in fresh interpreters, from the repository root and from elsewhere.

The interpreters run with `-S`, so that an installed ottfx of the environment under test cannot help.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE_FOLDERS = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]

PASSES = sorted(path.stem for path in (ROOT / "passes").glob("*.py"))
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))

CHECK_LAYOUT = f"""
import importlib, importlib.util, json, pathlib, sys
import ottfx
home = pathlib.Path(ottfx.__file__).resolve()
print("HOME", home)
for folder, names in (("passes", {PASSES}), ("kernels", {KERNELS})):
    assert names, folder
    for name in names:
        found = pathlib.Path(importlib.util.find_spec(f"ottfx.{{folder}}.{{name}}").origin).resolve()
        # Beside the package in a checkout, inside it when installed; never a mixture of two copies.
        assert found.parent.parent in (home.parent, home.parents[1]), (found, home)
importlib.import_module(f"ottfx.passes.{PASSES[0] if PASSES else ""}")
top_level = importlib.util.find_spec("kernels")
# A namespace folder at most, or somebody else's package; never one of ours.
assert top_level is None or top_level.origin is None or home.parents[1] not in pathlib.Path(top_level.origin).parents
"""

CHECK_BACKEND = """
import sys
import torch
assert "ott" in torch._dynamo.list_backends()
assert "ottfx" not in sys.modules, "listing the backends imported ottfx"
assert callable(torch._dynamo.lookup_backend("ott"))
"""

CHECK_TRANSFORMERS = """
import importlib.util, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
out = LlamaForCausalLM(LlamaConfig(**sizes))(torch.zeros(1, 4, dtype=torch.long))
assert out.logits.shape == (1, 4, 32)
import ottfx
print("KERNELS", is_kernels_available())
"""

FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return Anything()
    def __call__(self, target=None, *args, **kwargs): return target if callable(target) else Anything()
    def __or__(self, other): return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith(("use_", "replace_")):  # makers of decorators
        return lambda *args, **kwargs: lambda target: target
    return Anything()
"""


def run(code: str, *, cwd: Path, path: list[Path | str], expect: str = "") -> str:
    """Run code in a fresh interpreter whose path is the given folders and the libraries', and nothing else."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *SITE_FOLDERS])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert expect in done.stdout
    return done.stdout


def build(source: Path, out: Path, call: str) -> Path:
    """Call one hook of the build backend, and return what it built."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import setuptools.build_meta as b; print('BUILT', b.{call})".replace("OUT", repr(str(out)))
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split("BUILT ")[-1].strip()


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def files_of(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files under version control or about to be, so that building writes nothing into the checkout."""
    copy = tmp_path_factory.mktemp("source") / "ottfx-checkout"
    skipped = {".git", "build", "dist"}
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if skipped & set(relative.parts) or "__pycache__" in relative.parts or not path.is_file():
            continue
        if relative.parts[0].startswith(".") and relative.parts[0] != ".ci" or ".egg-info" in str(relative):
            continue
        (copy / relative).parent.mkdir(parents=True, exist_ok=True)
        (copy / relative).write_bytes(path.read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"), "build_wheel(OUT)")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("installed"))


def test_wheel_holds_every_module_and_nothing_at_top_level(wheel):
    names = files_of(wheel)
    assert {name.split("/")[0] for name in names} == {"ottfx", "ottfx-0.1.0.dist-info"}
    for folder, inside in (
        ("ottfx", ""),
        ("ottfx/artifacts", "artifacts/"),
        ("ottfx/schemes", "schemes/"),
        ("passes", "passes/"),
        ("kernels", "kernels/"),
    ):
        modules = {f"ottfx/{inside}{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert modules, folder
        assert modules <= names
    assert {"ottfx/py.typed", "ottfx/data/persuasion.txt"} <= names
    assert {f"ottfx/kernels/cpu/{path.name}" for path in (ROOT / "kernels" / "cpu").iterdir()} <= names
    assert "ottfx-0.1.0.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name]


def test_no_package_is_forgotten():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "ottfx").rglob("*.py")}
    assert folders == {"ottfx", "ottfx/artifacts", "ottfx/schemes"}, "list the new folder in setup.cfg and here"
    for folder in ("passes", "kernels"):
        assert {path.parent.name for path in (ROOT / folder).rglob("*.py")} == {folder}
        assert not (ROOT / folder / "__init__.py").exists(), f"a top-level package {folder!r} would shadow others"


def test_sdist_builds_the_same_wheel_and_holds_what_a_packager_needs(source, wheel, tmp_path):
    sdist = build(source, tmp_path / "sdist", "build_sdist(OUT)")
    names = files_of(sdist)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg"} <= names
    assert "tests/core/test_packaging.py" in names
    assert {"examples/quickstart.py", "examples/cpp/CMakeLists.txt", "examples/cpp/json.h"} <= names
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = build(tmp_path / "ottfx-0.1.0", tmp_path / "again", "build_wheel(OUT)")
    assert files_of(again) == files_of(wheel)


def test_wheel_works_elsewhere(installed, tmp_path):
    out = run(CHECK_LAYOUT + CHECK_TRANSFORMERS, cwd=tmp_path, path=[installed])
    assert f"HOME {installed}" in out


def test_wheel_works_from_the_repository_root(installed):
    # `python -c` puts the root first: the checkout wins, and its passes and kernels must win with it.
    out = run(CHECK_LAYOUT, cwd=ROOT, path=[installed])
    assert f"HOME {ROOT}" in out


def test_backend_is_found_without_importing_ottfx(installed, tmp_path):
    run(CHECK_BACKEND, cwd=tmp_path, path=[installed])


def test_uninstalled_checkout_works(tmp_path):
    assert f"HOME {ROOT}" in run(CHECK_LAYOUT, cwd=ROOT, path=[])
    assert f"HOME {ROOT}" in run(CHECK_LAYOUT, cwd=tmp_path, path=[ROOT])


@pytest.mark.parametrize("mode", ["default", "strict"])
def test_editable_install_works(mode, source, tmp_path):
    settings = {} if mode == "default" else {"editable_mode": "strict"}
    wheel = build(source, tmp_path / "editable", f"build_editable(OUT, {settings!r})")
    site = unpack(wheel, tmp_path / "site")
    # What `site` does with a real site-packages: it reads the .pth files.
    activate = f"import site; site.addsitedir({str(site)!r})\n"
    for cwd in (tmp_path, source):
        out = run(activate + CHECK_LAYOUT, cwd=cwd, path=[site])
        assert f"HOME {source}" in out


def test_hugging_face_kernels_package_is_not_shadowed(tmp_path):
    """From the root of a checkout, `import kernels` must still give the installed distribution of that name."""
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    package = tmp_path / "kernels"
    package.mkdir()
    # Any name that is asked for exists: what matters is that this package is the one that answers.
    package.joinpath("__init__.py").write_text(f"__version__ = {version!r}\n" + FAKE_KERNELS)
    metadata = tmp_path / f"kernels-{version}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    metadata.joinpath("RECORD").write_text("kernels/__init__.py,,\n")
    code = "import kernels; print('FOUND', kernels.__file__)\nimport ottfx.kernels\nimport transformers.integrations\n"
    out = run(code + CHECK_TRANSFORMERS, cwd=ROOT, path=[tmp_path])
    assert f"FOUND {package}" in out
    assert "KERNELS True" in out
