"""The zip writer against PyTorch's own: byte for byte the same archive from the same members."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from tieaudit.formats.torch_checkpoint.zipped import ZipWriter, write_archive
from tieaudit.storage import FileStorage, MemoryStorage

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("size", [0, 1, 15, 16, 1000])
def test_an_archive_of_the_same_members_is_the_file_that_torch_save_wrote_byte_for_byte(
    tmp_path: Path, size: int
) -> None:
    source, copy = tmp_path / "model.pt", tmp_path / "copy.pt"
    torch.save({"a": torch.arange(size, dtype=torch.float32), "bé": torch.ones(3, 5)}, source)
    with zipfile.ZipFile(source) as archive, ZipWriter(copy, "model/") as writer:
        for info in archive.infolist():
            writer.add(info.filename.removeprefix("model/"), archive.read(info))
    assert copy.read_bytes() == source.read_bytes()


def test_content_in_pieces_and_from_files_is_joined_and_every_member_begins_at_a_multiple_of_64(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 9000)  # more than the writer gathers: copied by the kernel
    pieces = [b"ab", FileStorage(str(tmp_path / "raw"), 256, 256 * 8000), MemoryStorage(b"yz", "x")]
    write_archive(tmp_path / "out.pt", "top/", [("first", b"1"), ("data/0", pieces), ("empty", b"")])
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        assert archive.read("top/data/0") == b"ab" + bytes(range(256)) * 8000 + b"yz"
        assert archive.namelist() == ["top/first", "top/data/0", "top/empty", "top/.data/serialization_id"]
        data = (tmp_path / "out.pt").read_bytes()
        for info in archive.infolist():
            lengths = [int.from_bytes(data[info.header_offset + at :][:2], "little") for at in (26, 28)]
            assert (info.header_offset + 30 + sum(lengths)) % 64 == 0


def test_two_archives_that_differ_in_one_bit_have_different_serialization_ids(tmp_path: Path) -> None:
    found = set()
    for n, content in enumerate((b"\0", b"\1", b"\0")):
        write_archive(tmp_path / f"{n}.pt", "top/", [("data/0", content)])
        with zipfile.ZipFile(tmp_path / f"{n}.pt") as archive:
            found.add(archive.read("top/.data/serialization_id"))
    assert len(found) == 2
    assert all(len(one) == 40 and one.isdigit() for one in found)


def test_torch_maps_what_was_written(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(100)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = [(info.filename.partition("/")[2], archive.read(info)) for info in archive.infolist()]
    write_archive(tmp_path / "m.pt", "archive/", [one for one in members if one[0] != ".data/serialization_id"])
    assert torch.load(tmp_path / "m.pt", mmap=True, weights_only=True)["w"].tolist() == list(range(100))
