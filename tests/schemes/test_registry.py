"""Names, options and registration of schemes."""

import subprocess
import sys

import pytest
import torch

from ottfx import registry
from ottfx.errors import ConfigError
from ottfx.registry import get_scheme, make_config, register_scheme, scheme_names
from ottfx.schemes.base import CacheShape
from ottfx.schemes.kivi import KIVI, KIVIConfig
from ottfx.schemes.ott import OTTConfig


def shape(**sizes) -> CacheShape:
    defaults = {"batch_size": 1, "num_kv_heads": 2, "head_dim": 64, "pages": 2, "dtype": torch.float16}
    return CacheShape(**{**defaults, "device": torch.device("cpu"), **sizes})


def test_the_built_in_schemes_are_found():
    assert {"none", "kivi", "ott"} <= set(scheme_names())
    for name in scheme_names():
        scheme = get_scheme(name)
        assert scheme.name == scheme.config_class.scheme == name
        assert scheme.citation
        config = make_config(name)
        assert hash(config) == hash(make_config(name))
        assert config.at_layer(3).at_layer(9) == config.at_layer(3)
        assert config.describe().startswith(name)


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"scheme must be one of \[.*'kivi', 'none', 'ott'.*\]. Got 'kvi'"):
        get_scheme("kvi")


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"options of scheme 'kivi' must be among \['bits', .*Got outlier_capacity"):
        make_config("kivi", outlier_capacity=3)
    with pytest.raises(ConfigError, match=r"scheme 'none' must be among \[\]. Got bits"):
        make_config("none", bits=2)


def test_a_config_passes_through_and_takes_no_options():
    config = OTTConfig(bits=4)
    assert make_config(config) is config
    with pytest.raises(ConfigError, match=r"options must be in the config"):
        make_config(config, bits=2)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("kivi", {"bits": 5}, r"ottfx.kivi: bits must be one of \[2, 3, 4, 8\]. Got bits=5"),
        ("kivi", {"key_bits": 0}, r"key_bits must be one of"),
        ("kivi", {"group_size": 48}, r"group_size must be one of \[32, 64, 128\]. Got group_size=48"),
        ("kivi", {"residual_length": 100}, r"residual_length must be a positive multiple of group_size 32"),
        ("kivi", {"value_group_size": 8}, r"value_group_size must be None or a positive multiple of 16"),
        ("kivi", {"layer_bits": {0: 7}}, r"layer_bits must be layer -> bits"),
        ("ott", {"residual_length": -1}, r"residual_length must be 0 or a positive"),
        ("ott", {"outlier_capacity": 200}, r"outlier_capacity must be from 0 to group_size 128"),
        ("ott", {"spill_capacity": -1}, r"spill_capacity must be"),
        ("ott", {"score_norm": 3}, r"score_norm must be 1 or 2"),
        ("ott", {"replacement": "zero"}, r"replacement must be one of \['rest', 'group'\]. Got replacement='zero'"),
    ],
)
def test_values_that_cannot_work_are_refused(scheme, options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(scheme, **options)


def test_bits_by_layer_and_half():
    config = KIVIConfig(bits=2, value_bits=4, layer_bits={0: 8, 3: (4, 2)})
    assert hash(config) == hash(KIVIConfig(bits=2, value_bits=4, layer_bits=[[3, [4, 2]], (0, 8)]))
    assert [config.at_layer(layer).widths() for layer in range(4)] == [(8, 8), (2, 4), (2, 4), (4, 2)]


@pytest.mark.parametrize(
    ("group_size", "head_dim", "channels"),
    [(128, 128, 128), (128, 64, 64), (128, 80, 80), (128, 256, 128), (32, 80, 16), (64, 96, 48), (32, 96, 32)],
)
def test_default_value_groups_divide_the_head(group_size, head_dim, channels):
    assert OTTConfig(group_size=group_size).value_channels(head_dim) == channels


def test_sites_that_cannot_be_stored_are_explained():
    scheme, config = get_scheme("kivi"), KIVIConfig()
    assert scheme.check(config, shape()) is None
    assert scheme.check(config, shape(head_dim=40)) == "head_dim must be a multiple of 16, got 40"
    assert "dtype must be float16" in scheme.check(config, shape(dtype=torch.int8))
    assert "must divide head_dim 80, got 64" in scheme.check(KIVIConfig(value_group_size=64), shape(head_dim=80))
    assert "dtype must be a float" in get_scheme("none").check(make_config("none"), shape(dtype=torch.int8))


def test_a_name_belongs_to_one_scheme():
    register_scheme(KIVI)
    impostor = type("Impostor", (KIVI,), {})
    with pytest.raises(ConfigError, match=r"name must be unique. Got 'kivi'"):
        register_scheme(impostor)


def test_schemes_of_other_packages_are_found(monkeypatch):
    class OtherConfig(KIVIConfig):
        scheme = "other"

    class Other(KIVI):
        name = "other"
        config_class = OtherConfig

    class Entry:
        def load(self):
            return Other

    monkeypatch.setattr(registry, "_schemes", dict(registry._schemes))
    monkeypatch.setattr(registry, "_discovered", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "ottfx.schemes" else [])
    assert "other" in scheme_names()
    assert isinstance(get_scheme("other"), Other)


@pytest.mark.parametrize("module", ["registry", "affine_read", "schemes.ott"])
def test_modules_can_be_imported_first(module):
    subprocess.run([sys.executable, "-c", f"import ottfx.{module}"], check=True, timeout=60)
