"""From one container to another: every tie that the container can keep is kept, and whatever is not is said."""

from __future__ import annotations

import importlib
import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tieaudit.cli import main

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch_files import loaded, one_value, row_major_bytes, sharing  # noqa: E402  torch is optional

import tieaudit  # noqa: E402
from tieaudit.errors import RewriteRefused, UsageError  # noqa: E402
from tieaudit.formats.torch_checkpoint.zipped import ZipWriter  # noqa: E402


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def convert(source: Path, to: Path, *words: object) -> str:
    """The text that is printed for a conversion that is delivered."""
    result = run("apply", source, "--to", to, *words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(source: Path, to: Path, *words: object) -> str:
    """The one line for a conversion that is not, which leaves nothing behind."""
    before = sorted(to.parent.iterdir())
    result = run("apply", source, "--to", to, *words)
    assert result.exit_code == 2, result.output
    assert sorted(to.parent.iterdir()) == before
    assert "Traceback" not in result.output
    return result.output


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert plain_bytes(tensor) == plain_bytes(other[name]), name


def plain_bytes(tensor: Any) -> bytes:
    """Whatever the strides are: PyTorch views a single element as bytes only if its stride is 1."""
    return row_major_bytes(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor))


def table(dtype: torch.dtype) -> dict[str, Any]:
    """Six elements of random bits, a number, one without elements, and one with an empty axis in the middle."""
    item = dtype.itemsize
    bits = torch.arange(6 * item, dtype=torch.uint8).mul_(37)
    bits = bits.remainder_(2) if dtype == torch.bool else bits
    x = bits.view(dtype).reshape(2, 3)
    return {"x": x, "number": x[1, 2].clone(), "none": x[:0].clone(), "empty": torch.empty(2, 0, 3, dtype=dtype)}


BOTH = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int64 "
    "int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64"
).split()


@pytest.mark.parametrize("name", BOTH)
def test_every_type_that_both_hold_survives_the_way_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    state = table(getattr(torch, name))
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert_same(safetensors.load_file(tmp_path / "b.safetensors"), state)
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert_same(loaded(tmp_path / "c.pt"), state)


UNLIKE: dict[str, tuple[Any, str]] = {
    "complex128": (lambda ones: ones.to(torch.complex128), "no element type complex128"),
    "quantised": (lambda ones: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "quantised tensor"),
    "sparse": (lambda ones: ones.to_sparse(), "sparse tensor"),
    "meta": (lambda ones: ones.to("meta"), "meta device"),
    "four bits": (lambda ones: ones.to(torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
    "half complex": (lambda ones: ones.to(torch.complex32), "complex32"),
    "conjugated": (lambda ones: ones.to(torch.complex64).conj(), "conjugates"),
    "repeated": (lambda ones: ones[0, 0].expand(20_000_000), "repeats 4 stored bytes"),
}


@pytest.mark.parametrize("kind", list(UNLIKE))
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_the_container_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    make, because = UNLIKE[kind]
    torch.save({"fine": torch.ones(2), "odd.one": make(torch.ones(2, 3))}, tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert "'odd.one" in said and because in said


def raw(path: Path, dtype: str, shape: list[int], n_bytes: int) -> Path:
    """A safetensors file with one tensor of a type for which PyTorch may have none."""
    header = json.dumps({"odd.one": {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(n_bytes))
    return path


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_sub_byte_types_of_safetensors_are_refused_for_a_checkpoint(tmp_path: Path, dtype: str) -> None:
    source = raw(tmp_path / "a.safetensors", dtype, [2, 4], 4 if dtype == "F4" else 6)
    said = refused(source, tmp_path / "b.pt")
    assert "'odd.one'" in said and "no element type float" in said


@pytest.mark.parametrize("name", ["__metadata__", "lone \udc80 half"])
def test_a_name_that_a_header_cannot_spell_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.ones(2)}, tmp_path / "a.pt")
    assert "cannot spell" in refused(tmp_path / "a.pt", tmp_path / "b.safetensors")


class Tied(torch.nn.Module):
    """The weight of the table under two names, the bias of the head under two others, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 11)
        self.head.weight = self.table.weight
        self.bias = self.head.bias


def untied() -> Tied:
    module = Tied()
    module.head.weight = torch.nn.Parameter(module.table.weight.detach().clone())
    module.bias = torch.nn.Parameter(module.head.bias.detach().clone())
    return module


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def test_a_tied_state_dict_becomes_the_file_that_save_model_writes(tmp_path: Path) -> None:
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    said = convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    safetensors.save_model(module, str(tmp_path / "theirs.safetensors"), {"format": "pt"})
    ours, theirs = header(tmp_path / "b.safetensors"), header(tmp_path / "theirs.safetensors")
    assert ours["__metadata__"] == theirs["__metadata__"]
    assert ours["__metadata__"] == {"table.weight": "head.weight", "head.bias": "bias", "format": "pt"}
    assert_same(
        safetensors.load_file(tmp_path / "b.safetensors"), safetensors.load_file(tmp_path / "theirs.safetensors")
    )
    assert "load_model restores that in a module that ties the names itself" in " ".join(said.split())


def test_who_restores_a_name_that_a_lone_file_leaves_out_is_as_the_note_says(tmp_path: Path) -> None:
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    fresh = Tied()
    safetensors.load_model(fresh, tmp_path / "b.safetensors")
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
    with pytest.raises(RuntimeError, match="Missing key"):
        safetensors.load_model(untied(), tmp_path / "b.safetensors")
    assert "table.weight" not in safetensors.load_file(tmp_path / "b.safetensors")
    convert(tmp_path / "a.pt", tmp_path / "c.safetensors", "--scheme", "untie")
    assert_same(safetensors.load_file(tmp_path / "c.safetensors"), dict(module.state_dict()))
    safetensors.load_model(untied(), tmp_path / "c.safetensors")


def test_an_alias_map_becomes_aliases_again(tmp_path: Path) -> None:
    module = Tied()
    safetensors.save_model(module, str(tmp_path / "a.safetensors"))
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert one_value(state) == one_value(module.state_dict()) == {
        frozenset({"table.weight", "head.weight"}), frozenset({"bias", "head.bias"}),
    }  # fmt: skip
    assert_same(state, dict(module.state_dict()))
    Tied().load_state_dict(state)


def test_an_alias_map_that_names_different_tensors_ties_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 2), "b": torch.zeros(2, 2) + torch.eye(2)}
    safetensors.save_file(tensors, tmp_path / "a.safetensors", {"b": "a", "format": "pt", "a": "nowhere"})
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    state = loaded(tmp_path / "b.pt")
    assert_same(state, tensors)
    assert one_value(state) == set()


def views() -> dict[str, Any]:
    """Every way in which names can lie in one storage."""
    whole, packed = torch.arange(24.0).reshape(4, 6), torch.arange(100.0, 112.0)
    return {
        "whole": whole,
        "again": whole.view_as(whole),
        "turned": whole.t(),
        "flat": whole.reshape(-1),
        "rows": whole[1:3],
        "columns": whole[:, 2:4],
        "left": packed[:4],  # beside each other: no tie
        "right": packed[4:8],
        "overlapping": packed[6:10],
        "bits": torch.arange(6, dtype=torch.int32),
        "repeated": torch.ones(1, 3).expand(4, 3),
    }


def test_every_kind_of_alias_is_written_out_for_safetensors_with_a_word_about_each(tmp_path: Path) -> None:
    torch.save(views(), tmp_path / "a.pt")
    said = " ".join(convert(tmp_path / "a.pt", tmp_path / "b.safetensors").split())
    found = safetensors.load_file(tmp_path / "b.safetensors")
    expected = views()
    del expected["whole"]  # `again` comes first in the order of names
    assert_same(found, expected)
    assert header(tmp_path / "b.safetensors")["__metadata__"] == {"whole": "again", "format": "pt"}
    for words in ("turned and again are one tensor", "flat and again are one tensor", "holds no views"):
        assert words in said
    assert "right, overlapping share some of their bytes" in said
    assert "rows" in said and "columns" in said and "written out in full" in said


def test_a_fresh_checkpoint_steps_through_its_storages_as_the_old_one_did(tmp_path: Path) -> None:
    torch.save(views(), tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.pt", "--container", "torch")
    before, after = loaded(tmp_path / "a.ckpt"), loaded(tmp_path / "b.pt")
    assert_same(before, after)
    assert one_value(before) == one_value(after) != set()
    assert sharing(before) == sharing(after) != set()
    assert after["turned"].stride() == (1, 6)
    # disjoint halves of one storage are no tie: each gets a storage of its own
    assert after["left"].untyped_storage().nbytes() == 16 and before["left"].untyped_storage().nbytes() == 48


@pytest.mark.parametrize("seed", range(6))
def test_random_views_of_random_storages_share_as_before(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    stores = [torch.randn(chance.randint(30, 60)) for _ in range(3)]
    state = {}
    for number in range(14):
        store = chance.choice(stores)
        shape = tuple(chance.randint(0 if chance.random() < 0.1 else 1, 3) for _ in range(chance.randint(0, 3)))
        strides = tuple(chance.randint(0, 4) for _ in shape)
        state[f"t{number}"] = store.as_strided(shape, strides, chance.randint(0, 8))
    torch.save(state, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.pt", "--container", "torch")
    convert(tmp_path / "a.ckpt", tmp_path / "c.safetensors", "--scheme", "untie")
    before, after = loaded(tmp_path / "a.ckpt"), loaded(tmp_path / "b.pt")
    assert_same(before, after)
    assert one_value(before) == one_value(after)
    assert sharing(before) == sharing(after)
    assert_same(before, safetensors.load_file(tmp_path / "c.safetensors"))


def test_legacy_files_and_big_endian_ones_are_sources_like_any_other(tmp_path: Path) -> None:
    state = {name: one for name, one in views().items() if name != "repeated"}
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as archive, ZipWriter(tmp_path / "big.ckpt", "big/") as writer:
        for info in archive.infolist():
            data, name = archive.read(info), info.filename.partition("/")[2]
            if name == "byteorder":
                data = b"big"
            elif name.startswith("data/"):  # all of four bytes
                data = b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4))
            writer.add(name, data)
    for source in ("old.ckpt", "big.ckpt"):
        to = tmp_path / f"{source}.pt"
        convert(tmp_path / source, to, "--container", "torch")
        assert_same(loaded(to), state)
        assert one_value(loaded(to)) == one_value(state)
        assert sharing(loaded(to)) == sharing(state)


def test_torch_can_map_the_file_and_compute_where_each_storage_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.serialization import config

    safetensors.save_file({f"t{n}": torch.randn(n, 7) for n in range(9)}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch checks what it computed
    with config.patch({"load.calculate_storage_offsets": True}):
        found = torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)
    assert_same(dict(found), safetensors.load_file(tmp_path / "a.safetensors"))


def test_the_file_is_the_one_that_torch_save_writes_but_for_its_id(tmp_path: Path) -> None:
    module = Tied()
    torch.save(module.state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.ckpt", tmp_path / "out" / "model.pt", "--container", "torch")
    theirs, ours = (zipfile.ZipFile(path) for path in (tmp_path / "model.ckpt", tmp_path / "out" / "model.pt"))
    assert ours.namelist() == theirs.namelist()
    for name in theirs.namelist():
        if not name.endswith(("data.pkl", "serialization_id")):  # the pickle memoizes less
            assert ours.read(name) == theirs.read(name), name


def test_versions_of_modules_come_along_and_keep_their_meaning(tmp_path: Path) -> None:
    module = Tied()
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.pt", "--container", "torch")
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert state._metadata == module.state_dict()._metadata
    assert state._metadata["norm"] == {"version": 2}


def trainers(path: Path) -> Path:
    """What a trainer leaves: the model, an average of it, an optimizer, and its own counters."""
    module = Tied()
    optimizer = torch.optim.Adam(module.parameters())
    sum(one.sum() for one in module.parameters()).backward()
    optimizer.step()
    average = {name: torch.zeros_like(one) + 0.5 for name, one in module.state_dict().items()}
    torch.save(
        {"epoch": 7, "state_dict": module.state_dict(), "ema": average, "optimizer": optimizer.state_dict()}, path
    )
    return path


def test_of_a_training_checkpoint_the_model_is_carried_and_the_rest_is_named(tmp_path: Path) -> None:
    source = trainers(tmp_path / "last.ckpt")
    said = " ".join(convert(source, tmp_path / "model.safetensors").split())
    assert "not carried, as only tensors are: epoch, ema, optimizer of last.ckpt" in said
    assert "table.weight" in header(tmp_path / "model.safetensors")["__metadata__"]
    convert(source, tmp_path / "average.safetensors", "--key", "ema")
    found = safetensors.load_file(tmp_path / "average.safetensors")
    assert_same(found, torch.load(source, weights_only=True)["ema"])
    assert refused(source, tmp_path / "no.safetensors", "--key", "nowhere").count("\n") == 2


def test_entries_of_the_state_dict_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "steps": 3, "layer._extra_state": None}, tmp_path / "a.pt")
    said = " ".join(convert(tmp_path / "a.pt", tmp_path / "b.safetensors").split())
    assert "not carried, as only tensors are: steps, layer._extra_state of a.pt" in said


def test_schemes_tie_on_the_way(tmp_path: Path) -> None:
    w = torch.randn(5, 7)
    safetensors.save_file(
        {"a": w, "b": w.clone(), "turned": w.t().contiguous(), "c": torch.ones(3)}, tmp_path / "a.safetensors"
    )
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt", "--scheme", "dedup")
    found = loaded(tmp_path / "b.pt")
    assert_same(found, safetensors.load_file(tmp_path / "a.safetensors"))
    assert one_value(found) == {frozenset({"a", "b", "turned"})}
    assert found["turned"].stride() == (1, 7)
    convert(tmp_path / "a.safetensors", tmp_path / "c.pt")  # without a scheme nothing is tied
    assert one_value(loaded(tmp_path / "c.pt")) == set()


def test_a_lossy_tie_on_the_way_has_the_merged_value_under_both_names(tmp_path: Path) -> None:
    w = torch.randn(50, 8)
    state = {"model.embed_tokens.weight": w, "lm_head.weight": w + 0.01}
    safetensors.save_file(state, tmp_path / "a.safetensors")
    words = ("--scheme", "io", "--allow-lossy", "--merge", "mean")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt", *words)
    found = loaded(tmp_path / "b.pt")
    assert one_value(found) == {frozenset(state)}
    torch.testing.assert_close(found["model.embed_tokens.weight"], w + 0.005, rtol=0, atol=1e-6)


def test_without_a_destination_the_plan_and_the_command_are_printed(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    result = run("apply", tmp_path / "a.pt", "--container", "safetensors")
    assert result.exit_code == 0
    assert "plan (convert to safetensors" in result.output
    assert f"write it with: tieaudit apply {tmp_path / 'a.pt'} --container safetensors --to OUT" in result.output
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.pt"]
    result = run("apply", tmp_path / "a.pt", "--container", "safetensors", "--to", tmp_path / "OUT")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "OUT" / "a.safetensors").is_file()
    assert run("verify", "--receipt", tmp_path / "OUT" / "tieaudit.receipt.json").exit_code == 0


def test_a_receipt_is_checked_and_undone_like_that_of_every_rewrite(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    receipt = tmp_path / "b.safetensors.receipt.json"
    assert run("verify", "--receipt", receipt).exit_code == 0
    assert json.loads(receipt.read_text())["plan"]["into"]["form"] == "safetensors"
    assert run("apply", "--undo", receipt).exit_code == 0
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_text("mine")
    assert "exists already" in refused(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_text() == "mine"

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("tieaudit.copying.NewFile.write", full)
    assert "No space left on device" in refused(tmp_path / "a.pt", tmp_path / "c.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr("tieaudit.rewrite.shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    assert "free bytes" in refused(tmp_path / "a.pt", tmp_path / "c.safetensors")


def test_a_source_that_ends_too_early_or_changes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.randn(1000)}, tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:3000])
    assert "truncated" in refused(tmp_path / "cut.pt", tmp_path / "b.safetensors")

    real = importlib.import_module("tieaudit.apply").rewrite

    def disturbed(*args: Any) -> Any:
        found = real(*args)
        data = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return found

    monkeypatch.setattr(importlib.import_module("tieaudit.apply"), "rewrite", disturbed)
    assert "changed meanwhile" in refused(tmp_path / "a.pt", tmp_path / "b.safetensors")


def test_a_byte_that_is_written_wrongly_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.randn(1000), "v": torch.ones(3)}, tmp_path / "a.pt")
    module = importlib.import_module("tieaudit.formats.safetensors.create")
    real = module.write_safetensors

    def wrong(entries: Any, metadata: Any, path: Path) -> None:
        real(entries, metadata, path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(module, "write_safetensors", wrong)
    result = run("apply", tmp_path / "a.pt", "--to", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "its bytes changed" in result.output
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_a_tie_that_is_written_as_two_storages_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.save_model(Tied(), str(tmp_path / "a.safetensors"))
    module = importlib.import_module("tieaudit.formats.torch_checkpoint.create")
    monkeypatch.setattr(module, "_blobs", lambda weights: [module._alone(weight) for weight in weights])
    result = run("apply", tmp_path / "a.safetensors", "--to", tmp_path / "b.pt")
    assert result.exit_code == 1
    assert "expected one stored tensor, found 2" in result.output


def test_words_that_contradict_each_other_are_usage_errors(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt", tmp_path / "b.safetensors", "--container", "torch")
    assert "expected a name for the container torch, found one for safetensors" in said


# a live module ----------------------------------------------------------------------------------------------------


class Views(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in views().items():
            self.register_buffer(name, tensor)
        self.register_buffer("forgotten", torch.ones(5), persistent=False)
        self.register_buffer("last_channels", torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last))
        self.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
        self.rnn = torch.nn.LSTM(3, 3, 2)


def test_a_live_module_is_written_as_torch_save_would_and_not_changed(tmp_path: Path) -> None:
    module = Views()
    before = {name: (one.data_ptr(), plain_bytes(one)) for name, one in module.state_dict().items()}
    done = tieaudit.apply(module, to=tmp_path / "a.pt")
    torch.save(module.state_dict(), tmp_path / "theirs.pt")
    ours, theirs = loaded(tmp_path / "a.pt"), loaded(tmp_path / "theirs.pt")
    assert_same(ours, theirs)
    assert one_value(ours) == one_value(theirs)
    assert sharing(ours) == sharing(theirs)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state._metadata == module.state_dict()._metadata
    assert [level.outcome for level in done.proof.levels] == ["held", "not run", "not run"]
    assert before == {name: (one.data_ptr(), plain_bytes(one)) for name, one in module.state_dict().items()}
    assert "forgotten" not in ours


def test_a_live_module_is_written_as_save_model_would(tmp_path: Path) -> None:
    module = Tied()
    tieaudit.apply(module, to=tmp_path / "a.safetensors")
    assert header(tmp_path / "a.safetensors")["__metadata__"] == {
        "table.weight": "head.weight", "head.bias": "bias", "format": "pt",
    }  # fmt: skip
    fresh = Tied()
    safetensors.load_model(fresh, tmp_path / "a.safetensors")
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_scheme_ties_the_copy_that_is_written_and_not_the_module(tmp_path: Path, ending: str) -> None:
    module = untied()
    done = tieaudit.apply(module, to=tmp_path / f"a{ending}", scheme="dedup")
    assert module.head.weight is not module.table.weight
    assert done.plan.n_bytes_saved == 11 * 4 * 4 + 11 * 4
    if ending == ".pt":
        assert one_value(loaded(tmp_path / "a.pt")) == one_value(Tied().state_dict())
    else:
        fresh = Tied()
        safetensors.load_model(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh.head.weight, module.head.weight)


def test_a_live_module_that_is_untied_on_the_way_has_a_tensor_for_every_name(tmp_path: Path) -> None:
    module = Tied()
    tieaudit.apply(module, to=tmp_path / "a.pt", scheme="untie")
    assert one_value(loaded(tmp_path / "a.pt")) == set()
    assert_same(loaded(tmp_path / "a.pt"), dict(module.state_dict()))
    assert module.head.weight is module.table.weight


class Extra(torch.nn.Linear):
    def get_extra_state(self) -> object:
        return {"step": 3}


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (lambda: torch.nn.Linear(2, 2, device="meta"), "'weight' cannot be written: it is on the meta device"),
        (lambda: torch.nn.LazyLinear(2), "'weight' is not made before the lazy module is called"),
        (lambda: Extra(2, 2), "'_extra_state': expected a tensor in the state dict, found a dict"),
        (lambda: _with(torch.eye(2).to_sparse()), "'odd' cannot be written: its layout is sparse_coo"),
        (
            lambda: _with(torch.zeros(2, dtype=torch.complex32)),
            "'odd' cannot be written: elements of torch type complex32",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_a_live_module_without_plain_values_is_refused_by_name(tmp_path: Path, make: Any, because: str) -> None:
    with pytest.raises(RewriteRefused) as caught:
        tieaudit.apply(make(), to=tmp_path / "a.pt")
    assert because in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _with(tensor: Any) -> Any:
    module = torch.nn.Module()
    module.register_buffer("odd", tensor)
    return module


def test_a_wrapper_such_as_a_dtensor_is_refused(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(RewriteRefused, match="'odd' cannot be written: it is a TwoTensor"):
        tieaudit.apply(_with(TwoTensor(torch.ones(2), torch.ones(2))), to=tmp_path / "a.pt")


def test_a_name_that_says_no_container_is_a_usage_error_and_the_only_copy_is_not_undone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a name that ends in \.safetensors, \.pt"):
        tieaudit.apply(Tied(), to=tmp_path / "a.onnx")
    tieaudit.apply(Tied(), to=tmp_path / "a.pt")
    result = run("apply", "--undo", tmp_path / "a.pt.receipt.json")
    assert result.exit_code == 2
    assert "may be the only copy" in result.output
    assert (tmp_path / "a.pt").is_file()


def test_a_complex128_parameter_goes_into_a_checkpoint_and_not_into_safetensors(tmp_path: Path) -> None:
    module = _with(torch.ones(2, dtype=torch.complex128))
    tieaudit.apply(module, to=tmp_path / "a.pt")
    assert loaded(tmp_path / "a.pt")["odd"].dtype == torch.complex128
    with pytest.raises(RewriteRefused, match="'odd' cannot be written to a safetensors file"):
        tieaudit.apply(module, to=tmp_path / "a.safetensors")


def test_saving_to_memory_is_not_mistaken_for_a_path() -> None:
    with pytest.raises(TypeError):
        tieaudit.apply(Tied(), to=io.BytesIO())  # type: ignore[arg-type]
