"""Bytes from file to file: by the kernel where it can, in blocks where it cannot, and never more than there are."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tieaudit import copying
from tieaudit.copying import NewFile, copy_file
from tieaudit.errors import CorruptFile
from tieaudit.storage import FileStorage, MemoryStorage

MIB = 1024 * 1024
DATA = bytes(range(256)) * (5 * MIB // 256) + b"the odd end"


def denied(code: int) -> Callable[..., int]:
    def ask(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    return ask


def written(tmp_path: Path, *storages: FileStorage | MemoryStorage) -> bytes:
    with NewFile(tmp_path / "new") as new:
        for storage in storages:
            new.write(b"<")
            assert new.copy(storage) == new.n_bytes - storage.n_bytes
            new.write(b">")
    return (tmp_path / "new").read_bytes()


def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("ways", ["both", "sendfile", "blocks", "stops half way"])
def test_ranges_arrive_whatever_the_kernel_refuses(ways: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = copying._copy_file_range
    if ways == "stops half way":  # one request is honoured in part, then the way is closed

        def once(one: int, other: int, begin: int, n_bytes: int) -> int:
            if taken:
                raise OSError(errno.EXDEV, "no")
            taken.append(begin)
            return real(one, other, begin, min(n_bytes, 777_777))

        monkeypatch.setattr(copying, "_copy_file_range", once)
    elif ways != "both":
        monkeypatch.setattr(copying, "_copy_file_range", denied(errno.EXDEV))
    if ways in ("blocks", "stops half way"):
        monkeypatch.setattr(copying, "_sendfile", denied(errno.EINVAL))
    path = str(source(tmp_path))
    large, small = FileStorage(path, 12345, 5 * MIB - 20000), FileStorage(path, 7, 300)
    expected = b"<" + DATA[12345 : 5 * MIB - 7655] + b"><" + DATA[7:307] + b"><" + b"memory" + b">"
    assert written(tmp_path, large, small, MemoryStorage(b"memory", "m")) == expected
    assert bool(taken) == (ways == "stops half way")


@pytest.mark.skipif(sys.platform != "linux", reason="the calls are Linux's")
def test_a_large_range_of_a_file_is_not_read_by_us_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path)

    def read(*args: Any) -> list[bytes]:
        raise AssertionError("read")

    monkeypatch.setattr(FileStorage, "read_ranges", read)
    copy_file(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


@pytest.mark.parametrize("way", ["_copy_file_range", "_sendfile"])
def test_a_full_disk_is_an_error_and_not_a_reason_to_copy_otherwise(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_copy_file_range", denied(errno.EXDEV))
    monkeypatch.setattr(copying, way, denied(errno.ENOSPC))
    path = source(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        copy_file(path, tmp_path / "copy")


@pytest.mark.parametrize("n_missing", [1, 2 * MIB])
def test_a_range_beyond_the_end_of_its_file_is_a_corrupt_file(n_missing: int, tmp_path: Path) -> None:
    path = source(tmp_path)
    with pytest.raises(CorruptFile, match="the file is truncated or changed"):
        written(tmp_path, FileStorage(str(path), 0, len(DATA) + n_missing))


def test_a_file_that_shrinks_while_the_kernel_copies_is_a_corrupt_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path)
    real = copying._by_kernel

    def shrink(*args: int) -> int:
        os.truncate(path, 2 * MIB)
        return real(*args)

    monkeypatch.setattr(copying, "_by_kernel", shrink)
    with pytest.raises(CorruptFile, match="the file is truncated or changed"):
        copy_file(path, tmp_path / "copy")


@pytest.mark.parametrize("at_the_end", [False, True])
def test_the_holes_of_a_sparse_file_stay_holes(at_the_end: bool, tmp_path: Path) -> None:
    path, n_bytes = tmp_path / "source", 256 * MIB
    with path.open("wb") as file:
        file.write(b"head" * 1000)
        file.truncate(n_bytes)
        if not at_the_end:
            file.seek(n_bytes - 4)
            file.write(b"tail")
    if path.stat().st_blocks * 512 > n_bytes // 2:
        pytest.skip("the file system stores holes")
    copy_file(path, tmp_path / "copy")
    copy = (tmp_path / "copy").stat()
    assert copy.st_size == n_bytes
    assert copy.st_blocks * 512 < 8 * MIB
    with (tmp_path / "copy").open("rb") as file:
        assert file.read(5000) == b"head" * 1000 + bytes(1000)
        file.seek(n_bytes - 4)
        assert file.read() == (bytes(4) if at_the_end else b"tail")


def test_what_is_there_is_never_written_over_and_a_link_becomes_a_file(tmp_path: Path) -> None:
    path = source(tmp_path)
    (tmp_path / "link").symlink_to(path)
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").lstat().st_nlink == 1
    with pytest.raises(FileExistsError):
        copy_file(path, tmp_path / "link")
    assert path.read_bytes() == DATA


def test_zeros_come_before_what_is_aligned(tmp_path: Path) -> None:
    with NewFile(tmp_path / "new") as new:
        new.write(b"abc")
        assert new.align(64) == 64
        assert new.align(64) == 64
        new.write(b"d")
    assert (tmp_path / "new").read_bytes() == b"abc" + bytes(61) + b"d"
