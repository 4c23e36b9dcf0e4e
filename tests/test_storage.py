"""Locators of bytes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tieaudit.errors import CorruptFile
from tieaudit.storage import FileStorage, MemoryStorage, blocks


def test_a_file_storage_reads_only_its_own_range(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(100)))
    storage = FileStorage(str(path), 10, 20)
    assert storage.read_ranges([(0, 2), (18, 2)]) == [b"\x0a\x0b", b"\x1c\x1d"]
    assert b"".join(blocks(storage, 7)) == bytes(range(10, 30))


def test_a_truncated_file_is_named_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(12))
    with pytest.raises(CorruptFile, match=r"expected 20 bytes at byte 10, found 2: the file is truncated"):
        FileStorage(str(path), 10, 20).read_ranges([(0, 20)])


def test_storages_can_be_pickled_and_mean_the_same_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(100)))
    for storage in (FileStorage(str(path), 3, 5), MemoryStorage(b"abcde", "here")):
        again = pickle.loads(pickle.dumps(storage))
        assert again == storage
        assert again.read_ranges([(1, 3)]) == storage.read_ranges([(1, 3)])
