"""Checkpoints that want to run code, to fill the memory, or to be read as another thing: one line, nothing executed."""

from __future__ import annotations

import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.errors import TieAuditError
from tieaudit.formats.torch_checkpoint import pickles
from tieaudit.load import load_one
from tieaudit.scan import scan

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
ROOT = Path(__file__).resolve().parent.parent.parent


def storage(count: bytes = b"K\x06") -> bytes:
    """The persistent id of six floats under the key 0."""
    return b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"


def tensor(
    offset: bytes = b"K\x00", size: bytes = b"K\x02K\x03", stride: bytes = b"K\x03K\x01", of: bytes = b""
) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage()) + offset
        + b"(" + size + b"t(" + stride + b"t\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state_dict(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


def zipped(path: Path, data: bytes, members: dict[str, bytes] | None = None, **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
        for name, content in (members or {"archive/data/0": struct.pack("<6f", *range(6))}).items():
            file.writestr(name, content)
    return path


def legacy(
    path: Path, data: bytes, system: bytes | None = None, keys: object = ("0",), after: bytes | None = None
) -> Path:
    head = MAGIC + pickle.dumps(1001, 2) + (system or pickle.dumps({"little_endian": True}, 2))
    content = struct.pack("<q6f", 6, *range(6)) if after is None else after
    path.write_bytes(head + data + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + content)
    return path


def refused(path: Path, *, within: float = 20) -> str:
    """The one line that the command prints about a file that it refuses."""
    begin = time.process_time()
    result = CliRunner().invoke(main, ["scan", str(path)])
    assert result.exit_code == 2, result.output
    assert time.process_time() - begin < within
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "fault in tieaudit" not in lines[0]
    return lines[0]


def test_the_pickles_of_this_file_are_right_where_nothing_is_wrong(tmp_path: Path) -> None:
    for path in (zipped(tmp_path / "z.pt", state_dict(tensor())), legacy(tmp_path / "l.pt", state_dict(tensor()))):
        (weight,) = load_one(path).weights
        assert weight.storage is not None
        assert weight.storage.read_ranges([(0, 24)]) == [struct.pack("<6f", *range(6))]


# --- code -----------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def evil(marker: Path) -> list[Call]:
    return [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(subprocess.Popen, ["touch", str(marker)]),
        Call(__import__, "webbrowser"),
    ]


def spelled(name: str, args: bytes) -> list[bytes]:
    """One call in every way that the pickle machine knows."""
    module, function = name.encode().rsplit(b".", 1)
    both = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(function)]) + function
    named = b"c" + module + b"\n" + function + b"\n"
    return [
        b"\x80\x02" + named + b"(" + args + b"tR.",
        b"\x80\x04" + both + b"\x93(" + args + b"tR.",
        b"(" + args + b"i" + module + b"\n" + function + b"\n.",
        b"(" + named + args + b"o.",
        b"\x80\x02" + named + b"(" + args + b"t\x81.",
        b"\x80\x04" + named + b"(" + args + b"t}\x92.",
        b"\x80\x02" + named + b")\x81}X\x01\x00\x00\x00a" + args + b"sb.",
    ]


def test_a_pickle_that_would_run_code_is_refused_in_every_layout_and_spelling(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"touch {marker}".encode()
    args = b"X" + struct.pack("<I", len(text)) + text
    bombs = [pickle.dumps({"w": one}, protocol) for one in evil(marker) for protocol in (0, 2, 4)]
    bombs += [one for name in ("posix.system", "builtins.eval", "os.execv") for one in spelled(name, args)]
    for number, bomb in enumerate(bombs):
        good = state_dict(tensor())
        paths = [
            zipped(tmp_path / f"{number}.pt", bomb),
            zipped(tmp_path / f"{number}.jit", good, {"archive/data/0": bytes(24), "archive/constants.pkl": bomb}),
            legacy(tmp_path / f"{number}.pth", bomb),
            legacy(tmp_path / f"{number}.bin", good, system=bomb),
            legacy(tmp_path / f"{number}.ckpt", good, keys=Call(os.system, f"touch {marker}")),
        ]
        for path in paths:
            assert "runs code" in refused(path), bomb
            path.unlink()
    assert not marker.exists()


def test_an_unknown_class_is_a_placeholder_and_its_module_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(*args): pass\n")
    path = zipped(tmp_path / "m.pt", state_dict(tensor())[:-1] + b"X\x01\x00\x00\x00ecevil_module\nrun\n(tRs.")
    code = "import sys; from tieaudit.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, "scan", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not loaded, only named: evil_module.run" in " ".join(done.stdout.split())
    assert not (tmp_path / "ran").exists()


# --- sizes ----------------------------------------------------------------------------------------------------------

TENSORS: dict[str, bytes] = {
    "negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "negative stride": tensor(stride=b"J\xfd\xff\xff\xffK\x01"),
    "negative size": tensor(size=b"K\x02J\xff\xff\xff\xff"),
    "offset beyond": tensor(offset=b"K\x01"),
    "size beyond": tensor(size=b"K\x03K\x03"),
    "stride beyond": tensor(stride=b"K\x04K\x01"),
    "size of 2 to the 300": tensor(size=b"K\x02\x8a\x26" + bytes(37) + b"\x01"),
    "more sizes than strides": tensor(size=b"K\x01K\x02K\x03"),
    "no sizes but a text": tensor(size=b"X\x01\x00\x00\x00a", stride=b"K\x01"),
    "a bool for a size": tensor(size=b"\x88K\x03"),
    "65 axes": tensor(size=b"K\x01" * 65, stride=b"K\x01" * 65),
    "a storage that is none": tensor(of=b"N"),
    "a storage larger than its member": tensor(of=storage(b"K\x07")),
    "a storage of 2 to the 62 elements": tensor(of=storage(b"\x8a\x08" + struct.pack("<q", 2**62))),
    "a storage of negative length": tensor(of=storage(b"J\xff\xff\xff\xff")),
    "a storage of an unknown type": tensor(of=storage().replace(b"FloatStorage", b"ThingStorage")),
    "a storage that is not there": tensor(of=storage().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")),
    "a storage outside the archive": tensor(of=storage().replace(b"X\x01\x00\x00\x000", b"X\x09\x00\x00\x00../../etc")),
    "too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(tR",
    "a persistent id that is no storage": b"X\x01\x00\x00\x00aQ",
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_steps_outside_its_storage_is_refused(tmp_path: Path, what: str) -> None:
    for path in (
        zipped(tmp_path / "z.pt", state_dict(TENSORS[what])),
        legacy(tmp_path / "l.pt", state_dict(TENSORS[what])),
    ):
        line = refused(path)
        assert "expected" in line or "does not fit" in line
        assert len(line) < 1000


def test_the_storages_of_a_legacy_file_must_be_those_that_it_says(tmp_path: Path) -> None:
    good = state_dict(tensor())
    cases: dict[str, Path] = {
        "expected 6 elements": legacy(tmp_path / "a.pt", good, after=struct.pack("<q6f", 7, *range(6))),
        "truncated": legacy(tmp_path / "b.pt", good, after=struct.pack("<q5f", 6, *range(5))),
        "found '1'": legacy(tmp_path / "c.pt", good, keys=("1",)),
        "once, found '0'": legacy(tmp_path / "d.pt", good, keys=("0", "0")),
        "expected storage '0'": legacy(tmp_path / "e.pt", good, keys=()),
        "expected the keys": legacy(tmp_path / "f.pt", good, keys=7),
        "expected protocol 1001": legacy(tmp_path / "g.pt", good),
    }
    data = cases["expected protocol 1001"].read_bytes()
    cases["expected protocol 1001"].write_bytes(data.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)))
    for mark, path in cases.items():
        assert mark in refused(path)


# --- archives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "archive/../../evil", "/etc/passwd", "archive\\..\\evil"])
def test_a_member_whose_name_leads_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "m.pt", state_dict(tensor()), {"archive/data/0": bytes(24), name: b"x"})
    assert "leads out of it" in refused(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_bomb_of_zeros_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    huge = storage(b"\x8a\x05" + struct.pack("<q", 2**26)[:5])
    member = {"archive/data/0": bytes(2**28)}
    path = zipped(tmp_path / "m.pt", state_dict(tensor(of=huge)), member, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**19
    assert "deflated" in refused(path, within=5)


def test_a_bomb_that_lies_about_its_size_is_refused_without_inflating_it(tmp_path: Path) -> None:
    member = {"archive/data/0": bytes(2**27)}
    path = zipped(tmp_path / "m.pt", state_dict(tensor()), member, compression=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    at = data.rindex(b"archive/data/0") - 46
    path.write_bytes(data[: at + 24] + struct.pack("<I", 24) + data[at + 28 :])
    tracemalloc.start()
    try:
        assert "expected 24 bytes as the directory says, found more" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    """One range of the file under two names would look like a tie that PyTorch never makes."""
    two = {"archive/data/0": bytes(24), "archive/data/1": bytes(24)}
    path = zipped(tmp_path / "m.pt", state_dict(tensor()), two)
    data = path.read_bytes()
    first, second = (data.rindex(f"archive/data/{n}".encode()) - 46 for n in (0, 1))
    path.write_bytes(data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :])
    assert "overlap" in refused(path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "m.pt", state_dict(tensor()), {"archive/data/0": bytes(24), "archive/data.pkl": b"N."})
    assert "expected every name once" in refused(path)


def test_encryption_unknown_methods_and_false_headers_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "m.pt", state_dict(tensor()))
    data = path.read_bytes()
    entry, local = data.rindex(b"archive/data/0") - 46, data.index(b"archive/data/0") - 30
    for mark, at, value in (("encrypted", entry + 8, 1), ("method 99", entry + 10, 99), ("local header", local, 0)):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        assert mark in refused(path)


def test_a_checkpoint_without_a_pickle_says_what_it_is_instead(tmp_path: Path) -> None:
    for members, mark in (({"m/archive_format": b"pt2"}, "exported program"), ({"m/notes.txt": b"x"}, "no PyTorch")):
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        assert mark in refused(tmp_path / "m.pt")


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, layout: str) -> None:
    make = zipped if layout == "zip" else legacy
    data = make(tmp_path / "m.pt", state_dict(tensor())).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "m.pt").write_bytes(data[:length])
        assert "m.pt" in refused(tmp_path / "m.pt")


# --- pickles that are meant to take forever --------------------------------------------------------------------------


def laughs(container: bytes, depth: int) -> bytes:
    """Each level holds the one below ten times; only names would multiply, the file stays small."""
    data = b"\x80\x02" + tensor() + b"q\x00"
    for level in range(depth):
        data += container.replace(b"?", b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return data + b"."


BOMBS: dict[str, tuple[bytes, str]] = {
    "billion laughs of lists": (laughs(b"(" + b"?" * 10 + b"l", 12), "tensors of names"),
    "billion laughs of tuples": (laughs(b"(" + b"?" * 10 + b"t", 12), "tensors of names"),
    "a key that takes forever to hash": (laughs(b"???\x87", 100)[:-1] + b"}h\x63K\x01s.", ""),
    "lists nested deeply": (b"\x80\x02" + b"(" * 200_000 + tensor() + b"l" * 200_000 + b".", "levels of names"),
    "tuples nested deeply": (b"\x80\x02" + tensor() + b"\x85" * 200_000 + b".", "levels of names"),
    "a key nested deeply": (b"\x80\x02}" + b")" + b"\x85" * 200_000 + tensor() + b"s.", ""),
    "marks without end": (b"\x80\x02" + b"(" * 500_000, "expected"),
    "a huge integer": (b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(100), "integer of at most"),
    "a huge written integer": (b"L" + b"9" * 4000 + b"L\n.", "short integer"),
    "a huge text": (b"\x80\x02X\xff\xff\xff\xff", "more bytes"),
    "a text of 2 to the 63": (b"\x80\x04\x8d" + b"\xff" * 8, "more bytes"),
    "a line without end": (b"c" + b"a" * 100_000, "line of at most"),
    "a memo that is not there": (b"\x80\x02h\x07.", "does not fit"),
    "an empty stack": (b"\x80\x02R.", "does not fit"),
    "no value": (b"\x80\x02.", "expected a value"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "opcode"),
    "a list that is no list": (b"\x80\x02NNa.", "does not fit"),
    "an odd number of items": (b"\x80\x02}(Nu.", "does not fit"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_pickle_that_is_meant_to_take_forever_is_answered_soon(tmp_path: Path, what: str) -> None:
    data, mark = BOMBS[what]
    for path in (zipped(tmp_path / "z.pt", data), legacy(tmp_path / "l.pt", data)):
        if mark:
            assert mark in refused(path)
            continue
        begin = time.process_time()
        assert "Traceback" not in CliRunner().invoke(main, ["scan", str(path)]).output
        assert time.process_time() - begin < 10


def test_a_container_that_holds_itself_ends(tmp_path: Path) -> None:
    data = b"\x80\x02]q\x00(h\x00" + tensor() + b"e."
    assert [w.name for w in load_one(zipped(tmp_path / "m.pt", data)).weights] == ["1"]


def test_the_steps_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    assert "at most 1,000 steps" in refused(zipped(tmp_path / "m.pt", b"\x80\x02" + b"}0" * 600 + b"."))


def test_a_checkpoint_with_any_byte_changed_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    sources = [zipped(tmp_path / "z.pt", state_dict(tensor())), legacy(tmp_path / "l.pt", state_dict(tensor()))]
    messages: list[str] = []
    for source in sources:
        data = source.read_bytes()
        for _ in range(400):
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                changed[rng.randrange(4 if source.name == "z.pt" else 20, len(changed))] = rng.randrange(256)
            source.write_bytes(changed)
            try:
                scan(load_one(source))
            except TieAuditError as error:
                messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert 100 < len(messages) < 800


def test_torch_load_is_never_needed_for_any_of_this() -> None:
    """Reading imports neither torch nor numpy."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tieaudit.formats.torch_checkpoint import read\n"
        "print({'torch', 'numpy', 'pickle'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pkl", "pytorch_model.bin"])
@pytest.mark.parametrize("data", [b"\x80", b"\x80\x02", b"P", b"PK\x03\x04", b"PK\x03\x04" + bytes(22)])
def test_a_file_of_a_few_bytes_is_one_clear_line(name: str, data: bytes, tmp_path: Path) -> None:
    """Found by fuzzing: one byte that begins like a pickle."""
    (tmp_path / name).write_bytes(data)
    result = CliRunner().invoke(main, ["scan", str(tmp_path / name)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) <= 2
    assert "fault of" not in result.stderr and "Error" not in result.stderr
