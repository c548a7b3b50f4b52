"""A manifest comes back equal from its JSON, is read strictly, and says why programs cannot run here."""

import dataclasses
import json

import pytest
import torch

from ottfx.artifacts import machine, manifest
from ottfx.artifacts.manifest import (
    Manifest,
    ModelEntry,
    PartEntry,
    ProgramEntry,
    WeightsEntry,
    entry_from_site,
    site_from_entry,
    state_entries,
)
from ottfx.artifacts.program_cache import CacheSite, ProgramCache
from ottfx.errors import ArtifactError, ConfigError
from ottfx.registry import make_config, scheme_names
from ottfx.schemes.base import ROLES

LAYERS = 3


def sites(scheme="ott", dtype=torch.bfloat16):
    config = make_config(scheme)
    return [
        CacheSite(name=f"layer {i}", config=config.at_layer(i), num_kv_heads=2, head_dim=64, dtype=dtype)
        for i in range(LAYERS)
    ]


def make(scheme="ott", **changes):
    layers = sites(scheme)
    state = state_entries(layers)
    made = Manifest(
        versions=machine.versions_here(),
        device_type="cpu",
        cpu_isa=machine.cpu_isa_here(),
        dtype="bfloat16",
        model=ModelEntry(class_name="Llama", config={"name": "é", "list": [1, None]}, generation_config=None),
        sites=tuple(map(entry_from_site, layers)),
        state=state,
        programs={"decode": ProgramEntry(inputs=("input_ids",), outputs=("logits",), constants={"w_0": "w"})},
        weights=WeightsEntry(file="w", sha256="ab", bytes=3, aliases={"v": "w"}, strides={"w": (1, 3)}),
        parts={"data/x": PartEntry(sha256="00", bytes=1)},
    )
    return dataclasses.replace(made, **changes)


def changed(**changes):
    return json.dumps({**json.loads(make().to_json()), **changes})


@pytest.mark.parametrize("scheme", scheme_names())
def test_comes_back_and_runs_here(scheme):
    text = make(scheme).to_json()
    again = Manifest.from_json(text)
    assert again.to_json() == text
    assert [site_from_entry(entry) for entry in again.sites] == sites(scheme)
    assert dataclasses.replace(again, sites=make(scheme).sites) == make(scheme)
    again.check_here("cpu")
    again.check_here()


@pytest.mark.parametrize("scheme", scheme_names())
def test_state_is_that_of_the_cache(scheme):
    pages, batch = 3, 2
    cache = ProgramCache.allocate(sites(scheme), batch, max_length=pages * 128)
    entries = state_entries(sites(scheme))
    assert [entry.name for entry in entries] == list(cache.tensors())
    sizes = {"batch": batch, "pages": pages} | {f"{n}*pages": n * pages for n in range(2, 129)}
    for entry, tensor in zip(entries, cache.tensors().values(), strict=True):
        assert tuple(sizes.get(size, size) for size in entry.shape) == tensor.shape
        assert getattr(torch, entry.dtype) == tensor.dtype
        assert (tensor == entry.fill).all()
    paged = [entry for entry in entries if any("pages" in str(size) for size in entry.shape)]
    assert len(paged) >= 2 * LAYERS


@pytest.mark.parametrize("scheme", scheme_names())
def test_schedule_says_how_many_tokens_are_packed(scheme):
    for site, entry in zip(sites(scheme), json.loads(make(scheme).to_json())["sites"], strict=True):
        for role in ROLES:
            packed = due = 0
            for length in range(1, 400):
                packed = site.scheme.packed_length(site.config, role, length, packed)
                if entry["schedule"][role] is not None:
                    window, step = entry["schedule"][role]
                    due = max(due, (length - window) // step * step)
                assert due == packed
            assert (packed > 0) == (scheme != "none")


def test_what_json_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="dtype is not JSON"):
        make(model=ModelEntry(class_name="M", config={"dtype": torch.float16}, generation_config=None)).to_json()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "format_version must be 2.*Got None"),
        ("{}", "format_version must be 2.*Got None"),
        (changed(format_version=3), "format_version must be 2.*Got 3"),
        (changed(format_version=True), "format_version must be 2.*Got True"),
        (changed(format_version=2.0), r"format_version must be 2.*Got 2\.0"),
        (changed(surprise=1), "with .'surprise'. besides"),
        (changed(versions=["torch"]), "versions: must be an object"),
        (changed(versions={"torch": 2}), "versions, 'torch': must be a string. Got 2"),
        (changed(device_type=None), "device_type: must be a string. Got None"),
        (changed(sites={}), "sites: must be an array"),
        (changed(sites=[1]), "sites, number 0: must be an object"),
        (changed(model={"class_name": "M"}), "model: must be an object with the fields"),
        (changed(weights={**json.loads(make().to_json())["weights"], "location": "cloud"}), "location: must be one of"),
        (changed(weights={**json.loads(make().to_json())["weights"], "bytes": True}), "bytes: must be an integer"),
        (changed(parts={"a": {"sha256": "", "bytes": "9"}}), "parts, 'a', bytes: must be an integer. Got '9'"),
        (
            changed(state=[{"name": "n", "dtype": "d", "shape": [1.5], "part": "p", "fill": 0}]),
            "an integer or a string",
        ),
    ],
)
def test_bad_json_is_refused(text, reason):
    with pytest.raises(ArtifactError, match=f"(?s)file.pt2: .*{reason}"):
        Manifest.from_json(text, "file.pt2: manifest")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Manifest)])
def test_every_field_is_demanded(name):
    content = json.loads(make().to_json())
    del content[name]
    with pytest.raises(ArtifactError, match=name):
        Manifest.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 3}, "format version 3. Here it is 2"),
        ({"versions": {"torch": "1.9.1"}}, r"torch 1\.9. Here it is 2\."),
        ({"versions": {}}, "torch an unknown release"),
        ({"cpu_isa": "x86_64 avx4096"}, "a CPU with avx4096|a CPU with x86_64, avx4096"),
        ({"state": ()}, "tensor 0 of the cache none. Here it is TensorEntry"),
        ({"sites": ()}, "tensor 0 of the cache TensorEntry.* Here it is none"),
    ],
)
def test_other_surroundings_are_refused(changes, reason):
    with pytest.raises(ArtifactError, match=f"{reason}.*[Ee]xport the model again"):
        make(**changes).check_here("cpu")


def test_a_patch_release_and_a_lesser_cpu_are_accepted():
    major, minor, *_ = torch.__version__.split(".")
    isa = machine.cpu_isa_here().split()
    make(versions={"torch": f"{major}.{minor}.99"}, cpu_isa=" ".join(isa[:-1])).check_here("cpu")
    make(cpu_isa="").check_here("cpu")


def test_another_layout_of_the_state_is_refused():
    state = list(make().state)
    state[2] = dataclasses.replace(state[2], dtype="float32")
    with pytest.raises(ArtifactError, match=f"tensor 2 of the cache .*{state[2].name}.*float32"):
        make(state=tuple(state)).check_here("cpu")


def test_another_schedule_is_refused():
    first, *others = make().sites
    changed = dataclasses.replace(first, schedule={"key": (32, 128), "value": None})
    with pytest.raises(ArtifactError, match=r"schedule of 'layer 0' .*None.*Here it is .*\(32, 128\)"):
        make(sites=(changed, *others)).check_here("cpu")


def test_devices(monkeypatch):
    built = dataclasses.replace(make(), device_type="cuda", compute_capability="9.0")
    with pytest.raises(ArtifactError, match="of the type 'cuda'.*Got 'cpu'.*export the model again for 'cpu'"):
        built.check_here("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match="torch finds none here"):
        built.check_here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ArtifactError, match=r"compute capability 9\.0. Here it is 8\.6"):
        built.check_here("cuda:0")
    dataclasses.replace(built, compute_capability="8.6").check_here("cuda:0")
    dataclasses.replace(built, compute_capability="").check_here("cuda:0")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": "zip"}, "'zip'.*scheme must be one of"),
        ({"options": {"bits": 5}}, "bits must be one of"),
        ({"options": {"depth": 5}}, "Got depth"),
        ({"options": {"layer_bits": 7}}, "with its options. Got"),
        ({"options": {"residual_length": "long"}}, "residual_length must be"),
        ({"options": {"scheme": "ott"}}, "with its options. Got"),
        ({"dtype": "complex64"}, "dtype must be float16, bfloat16 or float32, got complex64"),
        ({"dtype": "nn"}, "dtype must be one of torch's. Got 'nn'"),
        ({"head_dim": 20}, "multiple of 16, got 20"),
    ],
)
def test_sites_that_cannot_be_stored_here_are_refused(changes, reason):
    entry = dataclasses.replace(make().sites[0], **changes)
    with pytest.raises(ArtifactError, match=f"layer 0.*{reason}.*export the model again"):
        site_from_entry(entry)


def test_cpu_isa_names_what_compilers_use():
    architecture, *abilities = machine.cpu_isa_here().split()
    assert architecture and not set(abilities) & machine.NOT_FOR_COMPILERS
    assert abilities == sorted(abilities)
    if torch.cpu.get_capabilities().get("avx2"):
        assert "avx2" in abilities


def test_versions():
    versions = machine.versions_here()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "python"} <= set(versions) <= {*machine.PACKAGES, "python"}
    assert manifest.FORMAT_VERSION == 2
