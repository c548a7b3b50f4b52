"""A file takes its name whole or not at all."""

import os

import pytest

from ottfx.artifacts.atomic_file import atomic_file


def test_makes_and_replaces(tmp_path):
    path = tmp_path / "cache.pt2"
    for content in (b"one", b"two"):
        with atomic_file(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".pt2"
            temporary.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["cache.pt2"]


def test_takes_the_permissions_that_a_new_file_has(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_file(tmp_path / "cache"):
        pass
    assert (tmp_path / "cache").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_file(path) as temporary:
        temporary.write_bytes(b"ha")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["cache"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "missing" / "cache"):
        raise AssertionError("must not be reached")
