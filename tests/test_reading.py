"""How much of a model is read to know its ties: counted where it is read, and here once more."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tieaudit.find import find
from tieaudit.load import load_one
from tieaudit.model import Model, Part, Weight
from tieaudit.storage import FileStorage, fill, next_stored, reading

MEGABYTE = 1 << 20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the system was asked for and gave, read by read: a count of our own, below the tool's."""
    counts: list[int] = []
    pread, preadv = os.pread, os.preadv

    def counted_pread(handle: int, length: int, offset: int) -> bytes:
        data = pread(handle, length, offset)
        counts.append(len(data))
        return data

    def counted_preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        n_bytes = preadv(handle, buffers, offset)
        counts.append(n_bytes)
        return n_bytes

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    return counts


def distinct(folder: Path, n_tensors: int, shape: tuple[int, ...] = (512, 512)) -> Path:
    rng = np.random.default_rng(0)
    tensors = {f"w{n}": rng.standard_normal(shape[:: 1 - 2 * (n % 2)]).astype(np.float32) for n in range(n_tensors)}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("shape", [(512, 512), (1024, 256), (64, 64, 64)])
def test_of_a_model_without_duplicates_less_than_one_percent_is_read(
    tmp_path: Path, asked: list[int], shape: tuple[int, ...]
) -> None:
    path = distinct(tmp_path, 24, shape)
    found = find(load_one(path))
    assert found.ties == ()
    assert found.n_bytes_read == sum(asked) > 0
    assert found.n_bytes_read < path.stat().st_size / 100


def test_a_pair_is_read_once_more_and_the_rest_is_not(tmp_path: Path, asked: list[int]) -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((512, 768)).astype(np.float32)
    tensors = {f"w{n}": rng.standard_normal((512, 768)).astype(np.float32) for n in range(16)}
    save_file({**tensors, "one": one, "other": np.ascontiguousarray(one.T)}, tmp_path / "model.safetensors")
    found = find(load_one(tmp_path / "model.safetensors"))
    assert [sorted(tie.ids) for tie in found.ties] == [["one", "other"]]
    assert 2 * one.nbytes <= found.n_bytes_read == sum(asked) < 2.1 * one.nbytes


def test_many_tensors_that_differ_in_one_element_are_told_apart_in_linear_time(tmp_path: Path) -> None:
    """Causal masks, one-hot tables: every probe collides, and each against each would read far more."""
    read = {}
    for n_tensors in (40, 160):
        masks = np.zeros((n_tensors, 96, 96), np.float32)
        for index in range(n_tensors):
            masks[index, 40 + index // 40, 11 + index % 40] = 1
        save_file({f"m{n}": mask for n, mask in enumerate(masks)}, tmp_path / f"{n_tensors}.safetensors")
        found = find(load_one(tmp_path / f"{n_tensors}.safetensors"))
        read[n_tensors] = found.n_bytes_read
        pairs = {(40 + n // 40, 11 + n % 40) for n in range(n_tensors)}
        expected = {frozenset([(a, b), (b, a)]) for a, b in pairs if (b, a) in pairs and a != b}
        assert len(found.ties) == len(expected)
    assert read[160] < 5 * read[40]


def test_what_a_sparse_file_does_not_store_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "holes.bin"
    n_bytes = 1 << 36
    with path.open("wb") as file:
        file.truncate(3 * n_bytes)
        file.seek(2 * n_bytes + n_bytes // 2)
        file.write(b"\x01")
    if path.stat().st_blocks * 512 > MEGABYTE:
        pytest.skip("this file system stores holes")
    weights = [
        Weight(name, name, (n_bytes // 4,), "float32", FileStorage(str(path), n * n_bytes, n_bytes), parameter=True)
        for n, name in enumerate(("zero", "zero_too", "one_byte"))
    ]
    found = find(Model("m", "safetensors", (Part("", (str(path),)),), tuple(weights)))
    assert found.constants == {"zero", "zero_too"}
    assert found.constant_classes == (("zero", "zero_too"),)
    assert found.ties == ()
    assert found.n_bytes_read < 64 * MEGABYTE


def test_a_hole_is_known_by_its_offset_and_the_rest_reads_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "holes.bin"
    with path.open("wb") as file:
        file.truncate(64 * MEGABYTE)
        file.seek(32 * MEGABYTE)
        file.write(b"x" * MEGABYTE)
    storage = FileStorage(str(path), MEGABYTE, 60 * MEGABYTE)
    known = next_stored(storage, 0)
    assert known in (0, 31 * MEGABYTE)  # a file system without holes says that everything is stored
    assert next_stored(storage, 31 * MEGABYTE + 5) == 31 * MEGABYTE + 5
    assert next_stored(storage, storage.n_bytes) is None


def test_reads_fill_buffers_exactly_and_a_short_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(bytes(range(100)))
    buffer = bytearray(20)
    fill(FileStorage(str(path), 10, 50), [(0, memoryview(buffer)[:10]), (40, memoryview(buffer)[10:])])
    assert bytes(buffer) == bytes((*range(10, 20), *range(50, 60)))
    with pytest.raises(Exception, match=r"f\.bin: expected 10 bytes at byte 100, found 0"):
        fill(FileStorage(str(path), 90, 20), [(5, memoryview(bytearray(15)))])


def test_files_stay_open_only_inside(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"abcdef")
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with reading() as files:
        storage = FileStorage(str(path), 0, 6)
        assert storage.read_ranges([(0, 2)]) == [b"ab"]
        assert storage.read_ranges([(2, 2), (4, 2)]) == [b"cd", b"ef"]
        assert files.n_bytes == 6
    assert opened is None or len(os.listdir("/proc/self/fd")) == opened


def test_more_files_than_may_be_open_are_read_all_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(450)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n % 256]) * 4)
    with reading():
        for _ in range(2):
            for n, path in enumerate(paths):
                assert FileStorage(str(path), 0, 4).read_ranges([(1, 2)]) == [bytes([n % 256]) * 2]
        if Path("/proc/self/fd").exists():
            assert len(os.listdir("/proc/self/fd")) < 300
