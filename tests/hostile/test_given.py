"""Files that a user is handed together with a model: inputs, stored test data, receipts."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main

pytest.importorskip("onnxruntime")
IDS = np.zeros((2, 3), np.int64)


def run(*words: object) -> Result:
    """The command as a user runs it; nothing but its own exit may come out."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a fault in tieaudit" not in result.output
    return result


class Evil:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def header(shape: str) -> bytes:
    text = "{'descr': '<i8', 'fortran_order': False, 'shape': " + shape + ", }"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


CASES: dict[str, Any] = {
    "a wrong name": {"idz": IDS},
    "no array": {},
    "ids beyond the table": {"ids": IDS + 10**9},
    "floats": {"ids": IDS.astype(np.float32)},
    "another rank": {"ids": np.zeros((2, 3, 4, 5), np.int64)},
    "a record": {"ids": np.zeros(2, dtype=[("a", "i4")])},
    "dates": {"ids": np.array(["2020-01-01"], dtype="M8[D]")},
    "raw bytes": {"ids": np.zeros(2, "V2")},
    "a member that is no array": b"garbage",
    "a size beyond any memory": header("(1099511627776,)"),
    "a header that is no Python": header("(1((((((("),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_that_cannot_be_used_are_never_reported_as_equal(tmp_path: Path, case: str) -> None:
    # the same model twice is equal bit for bit, so an answer that ignores the inputs would be "equal", exit 0
    model, given = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "given.npz"
    if isinstance(CASES[case], bytes):
        with zipfile.ZipFile(given, "w") as archive:
            archive.writestr("ids.npy", CASES[case])
    else:
        np.savez(given, **CASES[case])
    result = run("verify", model, model, "--inputs", given, "--device", "cpu")
    assert result.exit_code == 2
    assert str(given) in result.output
    to = tmp_path / "out.onnx"
    assert run("apply", model, "--to", to, "--inputs", given, "--device", "cpu").exit_code == 2
    assert not to.exists()


def test_pickled_objects_in_inputs_are_never_run(tmp_path: Path) -> None:
    model, given, proof = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "given.npz", tmp_path / "ran"
    np.savez(given, ids=np.array([Evil(proof)], dtype=object))
    assert run("verify", model, model, "--inputs", given).exit_code == 2
    assert not proof.exists()


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tieaudit import inputs

    monkeypatch.setattr(inputs, "_N_MOST_BYTES", 1000)
    given = tmp_path / "given.npz"
    np.savez_compressed(given, ids=np.zeros(10_000, np.int64))
    assert given.stat().st_size < 1000
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    result = run("verify", model, model, "--inputs", given)
    assert result.exit_code == 2
    assert "at most 1,000 bytes" in result.output


def test_every_damaged_archive_is_one_line(tmp_path: Path) -> None:
    from tieaudit.errors import UsageError
    from tieaudit.inputs import read_inputs

    given = tmp_path / "given.npz"
    np.savez_compressed(given, ids=np.arange(50), more=IDS)
    whole = given.read_bytes()
    for at in range(0, len(whole), 3):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]):
            given.write_bytes(damaged)
            try:
                read_inputs(given)
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017 - some damage goes unnoticed, and that is fine


def test_stored_test_data_is_not_read_out_of_another_file(tmp_path: Path) -> None:
    import onnx

    model = tiny_onnx.lost(tmp_path / "m.onnx")
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "test_data_set_0").mkdir()
    tensor = onnx.TensorProto(name="ids", data_type=7, dims=[1, 2], data_location=1)
    tensor.external_data.add(key="location", value=str(tmp_path / "secret"))
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
    result = run("verify", model, model, "--device", "cpu")
    assert result.exit_code == 2
    assert "another file" in result.output


def receipt(path: Path, inputs: dict[str, str], outputs: dict[str, str]) -> Path:
    sides = {"input": {"path": "x", "files": inputs}, "output": {"path": "y", "files": outputs}}
    path.write_text(json.dumps({"schema": "tieaudit/receipt/1", **sides}))
    return path


@pytest.mark.parametrize("spelling", ["m.onnx", "./m.onnx", "link.onnx"])
def test_an_undo_never_removes_what_its_receipt_calls_the_input(tmp_path: Path, spelling: str) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    os.link(model, tmp_path / "link.onnx")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    for inputs in ({str(model): digest}, {}):
        result = run("apply", "--undo", receipt(tmp_path / "r.json", inputs, {spelling: digest}))
        assert result.exit_code == 2
        assert "nothing was removed" in result.output
        assert model.exists()
        assert (tmp_path / "link.onnx").exists()


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 5000, "."])
def test_names_in_a_receipt_that_no_file_can_have_are_one_line(tmp_path: Path, name: str) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    path = receipt(tmp_path / "r.json", {str(model): digest}, {name: digest})
    assert run("verify", "--receipt", path).exit_code in (1, 2)
    assert run("apply", "--undo", path).exit_code == 2
    assert path.exists()
    assert model.exists()


def test_a_receipt_of_any_size_or_kind_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit import deliver

    path = tmp_path / "r.json"
    for content in (b"[" * 10**6, b"\xff", b"1", b'{"schema":' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        assert run("verify", "--receipt", path).exit_code == 2
    monkeypatch.setattr(deliver, "MAX_RECEIPT_BYTES", 10)
    assert "at most 10 bytes" in run("verify", "--receipt", path).output
