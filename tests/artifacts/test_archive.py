"""An archive comes back whole or not at all, holds weights once, and never runs what it did not list."""

import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ottfx.artifacts import machine
from ottfx.artifacts.archive import MANIFEST, WEIGHTS, read_archive, write_archive
from ottfx.artifacts.manifest import Manifest, ModelEntry, PartEntry, ProgramEntry, WeightsEntry
from ottfx.artifacts.part_hash import hash_pieces
from ottfx.artifacts.tensor_file import DTYPES
from ottfx.artifacts.zip_members import STEM, find_members
from ottfx.errors import ArtifactError, ConfigError

ROOT = Path(__file__).parents[2]
EXTRA = {"tokenizer/tokenizer.json": b'{"a": 1}', "tokenizer/spiece.model": bytes(range(256)), "empty": b""}


def make_manifest(location="inside", constants=None):
    return Manifest(
        versions=machine.versions_here(),
        device_type="cpu",
        dtype="float32",
        model=ModelEntry(class_name="M", config=None, generation_config=None),
        sites=(),
        state=(),
        programs={"decode": ProgramEntry(inputs=("x",), outputs=("y",), constants=constants or {"w0": "wide"})},
        weights=WeightsEntry(location=location),
    )


def make_weights():
    wide = torch.randn(40, 24)
    return {
        "wide": wide,
        "odd": torch.randn(3, 5),
        "flags": torch.tensor([True, False, True]),
        "tied": wide,
        "also tied": wide.view(40, 24),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "none of it": torch.empty(0, 4),
        "transposed": torch.randn(6, 8).t(),
        "slice": torch.randn(6, 8)[:, 2:5],
    }


def write(folder, location="inside", weights=None, extra=None, name="model.pt2"):
    source = folder / "built"
    source.mkdir(exist_ok=True)
    files = {"c1.wrapper.cpp": b"int x;", "c1.wrapper_metadata.json": b"{}", "c1.wrapper.so": b"\x7fELF" + bytes(999)}
    for file, content in files.items():
        (source / file).write_bytes(content)
    path = folder / name
    programs = {program: [source / file for file in files] for program in ("prefill", "decode")}
    weights = make_weights() if weights is None else weights
    written = write_archive(path, make_manifest(location), programs, weights, EXTRA if extra is None else extra)
    return path, written


def assert_equal_weights(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        assert tensor.is_contiguous() == got[name].is_contiguous()
        if not tensor.is_contiguous():
            assert got[name].stride() == tensor.stride(), name


def spans_of(path):
    with open(path, "rb") as file:
        return find_members(path, file)


def run(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def refuses(path, text, verify=True):
    with pytest.raises(ArtifactError, match=f"(?s){text}") as caught:
        read_archive(path, verify=verify)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("location", ["inside", "external"])
@pytest.mark.parametrize("verify", [True, False])
def test_comes_back(tmp_path, location, verify):
    weights = make_weights()
    path, written = write(tmp_path, location, weights)
    archive = read_archive(path, verify=verify)
    assert archive.manifest == written
    assert archive.path == path
    assert_equal_weights(archive.weights(), weights)
    assert archive.names() == list(EXTRA)
    for name, content in EXTRA.items():
        assert archive.read(name) == archive.read(f"extra/{name}") == content
    assert archive.read("data/aotinductor/decode/c1.wrapper.so") == b"\x7fELF" + bytes(999)
    with pytest.raises(ArtifactError, match="must be one of .*Got 'tokenizer'"):
        archive.read("tokenizer")
    assert written.weights.file == ("model.safetensors" if location == "external" else WEIGHTS)
    inside = {path.name, "built"} | ({"model.safetensors"} if location == "external" else set())
    assert set(os.listdir(tmp_path)) == inside


def test_every_part_is_stored_aligned_and_listed(tmp_path):
    path, written = write(tmp_path)
    spans = spans_of(path)
    assert set(spans) == {*written.parts, MANIFEST}
    assert all(span.offset % 64 == 0 for span in spans.values())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as package:
        assert package.testzip() is None
        infos = package.infolist()
        assert infos[-1].filename == STEM + MANIFEST
        for info in infos[:-1]:
            part = written.parts[info.filename.removeprefix(STEM)]
            assert info.compress_type == zipfile.ZIP_STORED
            assert part == PartEntry(sha256=hash_pieces([package.read(info)]), bytes=info.file_size)
            offset = spans[info.filename.removeprefix(STEM)].offset
            assert content[offset : offset + info.file_size] == package.read(info)


def test_equal_content_gives_equal_bytes(tmp_path):
    weights = make_weights()
    first, _ = write(tmp_path, weights=weights)
    second, _ = write(tmp_path, weights=weights, name="other.pt2")
    assert first.read_bytes() == second.read_bytes()


def test_weights_are_safetensors(tmp_path):
    weights = make_weights()
    write(tmp_path, "external", weights)
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(read) == set(weights) - {"tied", "also tied"}
    assert all(torch.equal(read[name], weights[name]) for name in read)
    path, _ = write(tmp_path, weights=weights)
    inside = safetensors.torch.load(read_archive(path).read(WEIGHTS))
    assert all(torch.equal(inside[name], read[name]) for name in read)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensor = torch.randint(0, 2, (5, 3)).to(dtype)
    path, _ = write(tmp_path, weights={"wide": tensor})
    got = read_archive(path).weights()["wide"]
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_tied_weights_are_written_once(tmp_path):
    weight = torch.randn(64, 64)
    path, written = write(
        tmp_path, weights={"wide": weight, "head": weight, "part": weight[:32], "equal": weight.clone()}
    )
    assert written.weights.aliases == {"head": "wide"}
    got = read_archive(path).weights()
    assert got["head"] is got["wide"]
    assert written.weights.bytes < 3 * weight.nbytes


def test_weights_are_mapped_and_private(tmp_path):
    path, _ = write(tmp_path, weights={"wide": torch.zeros(32, 32), "small": torch.zeros(3)})
    archive = read_archive(path)
    weights = archive.weights()
    again = archive.weights()
    assert weights["wide"].data_ptr() == again["wide"].data_ptr()
    assert weights["wide"].data_ptr() % 64 == 0
    before = path.read_bytes()
    weights["wide"].add_(1)
    assert again["wide"].sum() == 32 * 32
    assert path.read_bytes() == before
    del archive, again
    assert weights["wide"].sum() == 32 * 32


def test_weights_are_never_held_twice(tmp_path):
    script = f"""
import resource, sys, torch
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests/artifacts")!r}]
import test_archive
weights = {{"wide": torch.ones(4 << 20)}} | {{str(i): torch.full((4 << 20,), float(i)) for i in range(7)}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for location in ("inside", "external"):
    path, _ = test_archive.write(Path({str(tmp_path)!r}), location, weights)
    archive = test_archive.read_archive(path)
    mapped = archive.weights()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10, "KiB, beside the 128 MiB of weights"


def test_renamed_files_are_read(tmp_path):
    weights = make_weights()
    path, _ = write(tmp_path, "external", weights)
    renamed = path.rename(tmp_path / "other name.pt2")
    assert_equal_weights(read_archive(renamed).weights(), weights)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, dtype=torch.complex64), "be of a dtype .*Got torch.complex64"),
        (torch.zeros(2, device="meta"), "with data.*meta"),
        (torch.eye(2).to_sparse(), "ordinary tensor.*sparse"),
        (torch.zeros(1).expand(3), "not be expanded"),
    ],
)
def test_weights_that_cannot_be_written(tmp_path, tensor, reason):
    with pytest.raises(ConfigError, match=f"weight 'wide' must .*{reason}"):
        write(tmp_path, weights={"wide": tensor})
    assert os.listdir(tmp_path) == ["built"]


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a\\b", "", "c:x", "ottfx.json", "a/./b", "a\0b"])
def test_names_that_cannot_be_written(tmp_path, name):
    with pytest.raises(ConfigError, match="names of parts must be relative and differ"):
        write(tmp_path, extra={name: b""})
    assert os.listdir(tmp_path) == ["built"]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(ArtifactError, match="no/model.pt2: must be a place where a file can be written.*No such file"):
        write_archive(tmp_path / "no" / "model.pt2", make_manifest(), {}, make_weights(), {})


# ---- damage


def test_cut_short(tmp_path):
    path, _ = write(tmp_path)
    content = path.read_bytes()
    ends = [0, 1, 100, len(content) // 2, len(content) - 1000, len(content) - 1]
    ends += [span.offset + span.bytes // 2 for span in spans_of(path).values()]
    for end in ends:
        path.write_bytes(content[:end])
        refuses(path, "complete and unaltered.*Copy it again")


@pytest.mark.parametrize("location", ["inside", "external"])
def test_one_byte_altered_in_each_part(tmp_path, location):
    path, _ = write(tmp_path, location)
    content = path.read_bytes()
    spans = {name: span for name, span in spans_of(path).items() if span.bytes}
    assert MANIFEST in spans and len(spans) >= 10
    for name, span in spans.items():
        for offset in (0, span.bytes // 2, span.bytes - 1):
            altered = bytearray(content)
            altered[span.offset + offset] ^= 1
            path.write_bytes(altered)
            refuses(path, "CRC-32" if name == MANIFEST else f"{name}: must have the SHA-256 .* was altered")


def test_external_weights_missing_or_altered(tmp_path):
    path, _ = write(tmp_path, "external")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(path, "model.safetensors: must have the SHA-256")
    read_archive(path, verify=False)
    for other in (content[:-1], content + b"x", b""):
        file.write_bytes(other)
        refuses(path, "model.safetensors: must be the .* bytes of weights that model.pt2 names. Got", verify=False)
    file.unlink()
    refuses(path, "model.safetensors: must be a file that can be read. Got: No such file")
    file.mkdir()
    refuses(path, "model.safetensors: must be a file that can be read. Got: Is a directory")


def test_not_an_archive(tmp_path):
    path = tmp_path / "model.pt2"
    refuses(path, "must be a file that can be read. Got: No such file")
    for content in (b"", b"x" * 10_000, pickle.dumps([1])):
        path.write_bytes(content)
        refuses(path, "must be a file that ottfx.export wrote")
    torch.save({"a": torch.zeros(3)}, path)
    refuses(path, "must hold a manifest, 'model/extra/ottfx.json'. Got an archive without one")


def rewrite(path, change_members, change_manifest=None):
    """Write the archive again with other members; `change_manifest` gets its JSON as a dict."""
    with zipfile.ZipFile(path) as package:
        members = [(info.filename, package.read(info)) for info in package.infolist()]
    members = change_members(members)
    if change_manifest is not None:
        members = [
            (name, json.dumps(change_manifest(json.loads(data))).encode() if name == STEM + MANIFEST else data)
            for name, data in members
        ]
    with zipfile.ZipFile(path, "w") as package:
        for name, data in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            package.writestr(info, data)


def test_rewriting_alone_is_accepted(tmp_path):
    """What the tests below refuse is not refused for how they write it."""
    weights = make_weights()
    path, _ = write(tmp_path, weights=weights)
    rewrite(path, lambda members: members, lambda manifest: manifest)
    assert_equal_weights(read_archive(path).weights(), weights)


def test_manifest_missing_or_wrong(tmp_path):
    path, _ = write(tmp_path)
    content = path.read_bytes()

    def with_manifest(change, text):
        path.write_bytes(content)
        rewrite(path, lambda members: members, change)
        refuses(path, text)

    rewrite(path, lambda members: members[:-1])
    refuses(path, "must hold a manifest, 'model/extra/ottfx.json'. Got an archive without one")
    path.write_bytes(content)
    rewrite(path, lambda members: [*members[:-1], (members[-1][0], b"not JSON")])
    refuses(path, "manifest: must be JSON")
    with_manifest(lambda m: m | {"format_version": 7}, "format_version must be 2.*Got 7")
    with_manifest(lambda m: {name: m[name] for name in m if name != "sites"}, "without .'sites'.")
    with_manifest(lambda m: m | {"parts": 3}, "parts: must be an object. Got 3")
    with_manifest(lambda m: m | {"parts": {}}, "must hold what its manifest lists, and nothing else")
    with_manifest(lambda m: m | {"parts": m["parts"] | {"x": {"sha256": "", "bytes": 0}}}, "and no .'x'.")
    longer = {"byteorder": {"sha256": "", "bytes": 7}}
    with_manifest(lambda m: m | {"parts": m["parts"] | longer}, "byteorder must have 7 bytes. Got 6")
    with_manifest(lambda m: m | {"weights": m["weights"] | {"sha256": "0"}}, "weights: must be one of the parts")
    with_manifest(lambda m: m | {"weights": m["weights"] | {"file": "nowhere"}}, "weights: must be one of the parts")
    with_manifest(lambda m: m | {"weights": m["weights"] | {"aliases": {"a": "b"}}}, "must include .'b'.")
    with_manifest(lambda m: m | {"weights": m["weights"] | {"strides": {"wide": [1]}}}, "strides of 'wide': must fit")
    programs = {"decode": {"inputs": [], "outputs": [], "constants": {"w": "gone"}}}
    with_manifest(lambda m: m | {"programs": programs}, "must include .'gone'.")
    for name in ("../model.safetensors", "/etc/hosts", ""):
        entry = {"location": "external", "file": name}
        with_manifest(lambda m, entry=entry: m | {"weights": m["weights"] | entry}, "must be a file beside the archive")


@pytest.mark.parametrize(
    "name", ["model/../x", "/model/x", "x", "model/a//b", "model/a\\b", "model/", "other/x", "model/a\0b"]
)
def test_names_outside_the_stem(tmp_path, name):
    path, _ = write(tmp_path)
    rewrite(path, lambda members: [*members, (name, b"")])
    refuses(path, "not a plain path below 'model/'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path):
    path, _ = write(tmp_path)
    rewrite(path, lambda members: [*members, members[0]])
    refuses(path, "two members 'archive_format'")


def test_compressed_members(tmp_path):
    path, _ = write(tmp_path)
    with zipfile.ZipFile(path, "a") as package:
        package.writestr(STEM + "extra/x", b"0" * 1000, zipfile.ZIP_DEFLATED)
    refuses(path, "'extra/x', which is compressed")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_seen_or_harmless(tmp_path, data):
    path = tmp_path / "fuzzed.pt2"
    if not path.exists():
        torch.manual_seed(0)
        write(tmp_path)
        read_archive(tmp_path / "model.pt2")
    content = bytearray((tmp_path / "model.pt2").read_bytes())
    directory = content.rindex(b"PK\1\2" + content[content.index(b"PK\1\2") + 4 : content.index(b"PK\1\2") + 6])
    anywhere = st.integers(0, len(content) - 1) | st.integers(directory - 1500, len(content) - 1)
    for place in data.draw(st.lists(anywhere, min_size=1, max_size=3, unique=True)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    good = read_archive(tmp_path / "model.pt2")
    try:
        archive = read_archive(path)
    except ArtifactError:
        return
    assert archive.manifest == good.manifest
    assert_equal_weights(archive.weights(), good.weights())
    assert {name: archive.read(name) for name in archive.manifest.parts} == {
        name: good.read(name) for name in good.manifest.parts
    }


# ---- pickles


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


PICKLES = [
    "data.pkl",
    "data/weights/weight_0",
    "data/weights/model.pt",
    "data/weights/model_weights_config.json",
    "data/constants/opaque_obj_0",
    "data/constants/custom_obj_0",
    "data/constants/tensor_0",
    "constants.pkl",
    "data/sample_inputs/model.pt",
    "data/aotinductor/decode/custom_objs_config.json",
    "extra/state.pkl",
    "code/x.py",
]


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_never_read(tmp_path, name):
    path, _ = write(tmp_path)
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    rewrite(path, lambda members: [*members, (STEM + name, bomb)])
    refuses(path, f"must hold what its manifest lists, and nothing else. Got .'{name}'. besides")
    refuses(path, "nothing else", verify=False)
    part = {"sha256": hash_pieces([bomb]), "bytes": len(bomb)}
    rewrite(path, lambda members: members, lambda m: m | {"parts": m["parts"] | {name: part}})
    archive = read_archive(path)
    archive.weights()
    assert archive.read(name) == bomb
    assert not fired.exists()
    pickle.loads(bomb).close()
    assert fired.exists(), "the bomb of this test is none"


@pytest.mark.parametrize("location", ["inside", "external"])
def test_weights_that_are_a_pickle(tmp_path, location):
    path, written = write(tmp_path, location)
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    part = {"sha256": hash_pieces([bomb]), "bytes": len(bomb)}

    def change(manifest):
        if location == "inside":
            manifest["parts"][WEIGHTS] = part
        return manifest | {"weights": manifest["weights"] | part}

    (tmp_path / "model.safetensors").write_bytes(bomb)
    rewrite(path, lambda members: [(n, bomb if n == STEM + WEIGHTS else d) for n, d in members], change)
    refuses(path, "must be a safetensors file")
    assert not fired.exists()


def header(table):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        header(b"{"),
        header(b"[]"),
        header(b"[" * 100_000),
        header({"a": 1}),
        header({"a": {"dtype": "F32", "shape": [1]}}) + bytes(4),
        header({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}) + bytes(5),
        header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + bytes(4),
    ],
)
def test_weights_whose_table_does_not_fit(tmp_path, content):
    path, _ = write(tmp_path, "external")
    part = {"sha256": hash_pieces([content]), "bytes": len(content)}
    (tmp_path / "model.safetensors").write_bytes(content)
    rewrite(path, lambda members: members, lambda m: m | {"weights": m["weights"] | part})
    refuses(path, "model.safetensors: must be a safetensors file")


# ---- replacing files


def test_external_weights_never_change_under_another_archive(tmp_path):
    first = {"wide": torch.zeros(4)}
    path, _ = write(tmp_path, "external", first)
    copy = tmp_path / "copy.pt2"
    copy.write_bytes(path.read_bytes())
    second = {"wide": torch.ones(4)}
    for _ in range(2):
        _, written = write(tmp_path, "external", second)
        assert written.weights.file == f"model-{written.weights.sha256[:12]}.safetensors"
        assert_equal_weights(read_archive(path).weights(), second)
        assert_equal_weights(read_archive(copy).weights(), first)
    plain = tmp_path / "model.safetensors"
    before = plain.stat().st_mtime_ns
    _, written = write(tmp_path, "external", first)
    assert written.weights.file == "model.safetensors"
    assert plain.stat().st_mtime_ns == before, "equal weights were written again"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("location", ["inside", "external"])
@pytest.mark.parametrize("old", [False, True])
def test_a_killed_process_leaves_the_old_file(tmp_path, location, old):
    path = tmp_path / "model.pt2"
    weights = make_weights()
    if old:
        write(tmp_path, location, weights)
        before = path.read_bytes()
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests/artifacts")!r}]
import ottfx.artifacts.archive, test_archive

write_member = ottfx.artifacts.archive.write_member
def write_and_die(package, file, name, size, pieces):
    if name == "extra/empty":
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_member(package, file, name, size, pieces)

ottfx.artifacts.archive.write_member = write_and_die
test_archive.write(Path({str(tmp_path)!r}), {location!r})
"""
    done = run(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [name for name in os.listdir(tmp_path) if name.startswith(".model.") and name.endswith(".pt2")]
    assert len(left) == 1 and (tmp_path / left[0]).stat().st_size > 0, "it was not killed in the middle"
    if old:
        assert path.read_bytes() == before
        assert_equal_weights(read_archive(path).weights(), weights)
    else:
        assert not path.exists()


# ---- torch


@pytest.mark.slow
# Of copy.deepcopy, about a class of torch.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_torch_opens_it(tmp_path):
    import torch._inductor.package
    from torch.export.pt2_archive._package import load_pt2

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # Programs are compiled for these strides.
            self.weight = torch.nn.Parameter(torch.randn(8, 6).t(), requires_grad=False)

        def forward(self, x):
            return x @ self.weight + self.weight.sum(0)

    module = Module().eval()
    x = torch.randn(3, 6)
    exported = torch.export.export(module, (x,))
    options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
    files = torch._inductor.aot_compile(exported.module(), (x,), options=options)
    path = tmp_path / "model.pt2"
    manifest = make_manifest(constants={"weight": "weight"})
    weights = {"weight": module.weight.detach()}
    written = write_archive(path, manifest, {"prefill": files, "decode": files}, weights, EXTRA)
    sources = [part for name, part in written.parts.items() if name.endswith(".cpp")]
    assert sources and not any(part.bytes for part in sources)

    renamed = path.rename(tmp_path / "renamed.pt2")
    archive = read_archive(renamed)
    for program in ("prefill", "decode"):
        loader = torch._C._aoti.AOTIModelPackageLoader(str(renamed), program, False, 1, -1)
        assert loader.get_metadata()["AOTI_DEVICE_KEY"] == "cpu"
        (name,) = loader.get_constant_fqns()
        loader.load_constants({name: archive.weights()["weight"]}, False, True, True)
        torch.testing.assert_close(loader.boxed_run([x])[0], module(x))
    write_archive(path, manifest, {"decode": files}, weights, {"note": b"text"})
    content = load_pt2(str(path))
    assert set(content.aoti_runners) == {"decode"} and content.extra_files["note"] == "text"
