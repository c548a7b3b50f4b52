"""`ottfx.artifacts.part_hash`: the same hash in pieces, from a file, and by its definition."""

import hashlib

import pytest

from ottfx.artifacts import part_hash

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(part_hash, "BLOCK", BLOCK)
    monkeypatch.setattr(part_hash, "READ", 24)


def defined(content):
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    if len(blocks) <= 1:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("piece", [1, 7, 64, 200, 1000])
def test_pieces_and_a_file_give_the_defined_hash(tmp_path, size, piece):
    content = bytes(index * 37 % 251 for index in range(size))
    pieces = [content[start : start + piece] for start in range(0, size, piece)]
    assert part_hash.hash_pieces(pieces) == defined(content)
    path = tmp_path / "file"
    path.write_bytes(b"12345" + content + b"end")
    with open(path, "rb") as file:
        assert part_hash.hash_stored(file, 5, size) == defined(content)


@pytest.mark.parametrize("position", [0, 63, 64, 130, 199])
def test_each_byte_counts(position):
    content = bytearray(200)
    before = part_hash.hash_pieces([content])
    content[position] ^= 1
    assert part_hash.hash_pieces([content]) != before


def test_blocks_in_another_order_have_another_hash():
    first, second = bytes(BLOCK), bytes([1]) * BLOCK
    assert part_hash.hash_pieces([first, second]) != part_hash.hash_pieces([second, first])
