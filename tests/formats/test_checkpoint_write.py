"""Rewritten checkpoints, held against what PyTorch loads from them."""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch_files import loaded, row_major_bytes

from tieaudit.apply import apply
from tieaudit.change import Plan, Share, Unshare
from tieaudit.cli import main
from tieaudit.deliver import check_receipt, undo
from tieaudit.errors import ParityFailed, RewriteRefused
from tieaudit.formats.torch_checkpoint import beside, torch_checkpoint
from tieaudit.formats.torch_checkpoint.orders import Orders
from tieaudit.formats.torch_checkpoint.write import subject_of, write_file
from tieaudit.load import load_one
from tieaudit.model import Member, Model
from tieaudit.plan import Choices
from tieaudit.plan import plan as make_plan
from tieaudit.scan import look
from tieaudit.storage import MemoryStorage
from tieaudit.verify import prove
from tieaudit.view import AS_STORED, TRANSPOSED

torch = pytest.importorskip("torch")

TABLE = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.arange(60.0).reshape(6, 10)


class Unknown:
    """A class that only its owner has: pickled by name."""

    def __init__(self) -> None:
        self.learning_rate = 0.1


Save = Callable[[Any, Path], None]
LAYOUTS: dict[str, Save] = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "legacy protocol 4": lambda value, path: torch.save(
        value, path, pickle_protocol=4, _use_new_zipfile_serialization=False
    ),
    "protocol 5, framed": lambda value, path: _framed(value, path),
}


def _framed(value: Any, path: Path) -> None:
    """As other writers may do: the archive of torch.save, its pickle in frames as CPython's own pickler makes them."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=5)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                assert data[:2] == b"\x80\x05"
                body = data[2:] if data[2] != 0x95 else data[11:]
                data = data[:2] + b"\x95" + len(body).to_bytes(8, "little") + body
            target.writestr(info.filename, data)


@pytest.fixture(autouse=True)
def _proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for every proof costs a second; `test_proving.py` looks at that."""
    stage = importlib.import_module("tieaudit.apply")
    monkeypatch.setattr(stage, "prove_apart", lambda one: prove(one.before, one.after, one.plan, one.written))


def rewritten(source: Path, target: Path, scheme: str = "dedup", **chosen: Any) -> Path:
    model = load_one(source, key=chosen.pop("key", ""))
    made = make_plan(look(model), Choices(schemes=(scheme,), **chosen))
    assert made.edits, made.refusals
    apply(model, made, target)
    return target


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, map_location="cpu", **{"weights_only": True, **options})


def steps(tensor: Any) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert row_major_bytes(tensor) == row_major_bytes(b[name]), name


def trained() -> dict[str, Any]:
    """A trainer's checkpoint with a copy, a transposed copy, a shared object, a slice, and an average that shares."""
    flat = torch.arange(24.0)
    state = {
        "embed": TABLE.clone(),
        "other": OTHER,
        "head": TABLE.clone(),
        "turned": TABLE.T.contiguous(),
        "first": flat[:12].view(3, 4),
        "second": flat[12:].view(3, 4),
    }
    return {"epoch": 7, "state_dict": state, "ema_state": {"embed": state["embed"], "head": state["head"].clone()}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_names_share_one_storage_and_everything_else_is_what_it_was(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "model.ckpt"
    LAYOUTS[layout](trained(), source)
    weights_only = "protocol" not in layout  # PyTorch's safe loader reads protocol 2 only
    before = load(source, weights_only=weights_only)
    after = load(rewritten(source, tmp_path / "tied.ckpt"), weights_only=weights_only)
    equal(after["state_dict"], before["state_dict"])
    equal(after["ema_state"], before["ema_state"])
    assert after["epoch"] == 7
    state = after["state_dict"]
    where = steps(state["embed"])
    assert steps(state["head"]) == where
    assert steps(state["turned"]) == (where[0], 0, (8, 30), (1, 8))
    assert steps(after["ema_state"]["embed"]) == where
    assert after["ema_state"]["head"].untyped_storage().data_ptr() != where[0]  # not named by the plan
    assert state["first"].untyped_storage().data_ptr() == state["second"].untyped_storage().data_ptr()
    # two copies of 30 · 8 floats go, the average's own copy stays
    gone = source.stat().st_size - (tmp_path / "tied.ckpt").stat().st_size
    assert abs(gone - 2 * 30 * 8 * 4) < 600


@pytest.mark.parametrize("layout", LAYOUTS)
def test_untying_what_was_tied_gives_every_name_its_own_storage_and_the_first_values(
    tmp_path: Path, layout: str
) -> None:
    source = tmp_path / "model.pt"
    LAYOUTS[layout](trained(), source)
    tied = rewritten(source, tmp_path / "tied.pt")
    apart = load(rewritten(tied, tmp_path / "apart.pt", "untie"), weights_only=False)
    equal(apart["state_dict"], load(source, weights_only=False)["state_dict"])
    storages = [apart["state_dict"][name].untyped_storage().data_ptr() for name in ("embed", "head", "turned")]
    assert len(set(storages)) == 3
    assert apart["ema_state"]["embed"].untyped_storage().data_ptr() == storages[0]


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_one_object_under_several_names_is_untied_where_a_pickle_only_recalls_it(
    tmp_path: Path, layout: str, names: tuple[str, ...]
) -> None:
    value = {name: TABLE for name in names}
    LAYOUTS[layout]({**value, "elsewhere": OTHER}, tmp_path / "m.pt")
    found = load(rewritten(tmp_path / "m.pt", tmp_path / "out.pt", "untie"))
    equal(found, {**value, "elsewhere": OTHER})
    assert len({found[name].untyped_storage().data_ptr() for name in names}) == len(names)


def test_a_tied_checkpoint_has_the_pickle_of_the_same_tie_saved_by_torch(tmp_path: Path) -> None:
    """Both pickles read alike: the same storages, offsets, sizes and strides under the same names."""
    torch.save({"a": TABLE, "b": TABLE.clone(), "c": OTHER}, tmp_path / "m.pt")
    tied = rewritten(tmp_path / "m.pt", tmp_path / "tied.pt")
    torch.save({"a": TABLE, "b": TABLE.view(30, 8), "c": OTHER}, tmp_path / "by_torch.pt")
    pickles = []
    for path in (tied, tmp_path / "by_torch.pt"):
        with zipfile.ZipFile(path) as archive:
            name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
            pickles.append(_calls(archive.read(name)))
            n_storages = sum("/data/" in one for one in archive.namelist())
            assert n_storages == 2
    # torch.save numbers storages as it meets them, a rewrite leaves gaps
    renumbered = json.loads(json.dumps(pickles[0]).replace('"2"', '"1"'))
    assert renumbered == json.loads(json.dumps(pickles[1]))


def _calls(data: bytes) -> Any:
    class Reader(pickle.Unpickler):
        def persistent_load(self, saved: Any) -> Any:
            return [saved[0], saved[1].__name__, *saved[2:]]

        def find_class(self, module: str, name: str) -> Any:
            if name == "_rebuild_tensor_v2":
                return lambda *args: list(args[:5])
            return super().find_class(module, name)

    return Reader(io.BytesIO(data)).load()


def test_a_rewritten_archive_can_be_mapped_and_has_every_member_that_torch_writes(tmp_path: Path) -> None:
    torch.save({"a": TABLE, "b": TABLE.clone()}, tmp_path / "m.pt")
    out = rewritten(tmp_path / "m.pt", tmp_path / "out.pt")
    assert torch.equal(load(out, mmap=True)["b"], TABLE)
    members = []
    for path in (tmp_path / "m.pt", out):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            members.append({name.partition("/")[2]: archive.read(name) for name in archive.namelist()})
    assert members[0].keys() - members[1].keys() == {"data/1"}
    assert members[1].keys() <= members[0].keys()
    same = [name for name in members[1] if members[0][name] == members[1][name]]
    assert set(members[1]) - set(same) == {"data.pkl", ".data/serialization_id"}


def test_a_module_that_was_pickled_whole_gets_one_parameter_object(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.ReLU(), torch.nn.Linear(8, 30, bias=False))
    module[2].weight.data.copy_(module[0].weight.data)
    torch.save(module, tmp_path / "m.pt")
    out = load(rewritten(tmp_path / "m.pt", tmp_path / "tied.pt"), weights_only=False)
    assert out[0].weight is out[2].weight
    assert len(list(out.parameters())) == 1
    assert torch.equal(out[0].weight, module[0].weight)
    apart = load(rewritten(tmp_path / "tied.pt", tmp_path / "apart.pt", "untie"), weights_only=False)
    assert apart[0].weight is not apart[2].weight
    assert isinstance(apart[2].weight, torch.nn.Parameter) and apart[2].weight.requires_grad
    equal(dict(apart.state_dict()), dict(module.state_dict()))


def test_what_no_loader_here_knows_stays_and_a_lossy_tie_takes_the_chosen_values(tmp_path: Path) -> None:
    value = {"model": {"embed_tokens.weight": TABLE, "lm_head.weight": TABLE + 1}, "args": Unknown(), "note": "x" * 300}
    torch.save(value, tmp_path / "m.pt")
    (refusal,) = make_plan(look(load_one(tmp_path / "m.pt")), Choices(schemes=("io",))).refusals
    assert "are different tensors" in refusal.because
    out = load(
        rewritten(tmp_path / "m.pt", tmp_path / "out.pt", "io", allow_lossy=True, merge="mean"), weights_only=False
    )
    assert out["args"].learning_rate == 0.1
    assert out["note"] == "x" * 300
    assert torch.allclose(out["model"]["embed_tokens.weight"], TABLE + 0.5)
    assert steps(out["model"]["embed_tokens.weight"]) == steps(out["model"]["lm_head.weight"])


def test_a_lossy_tie_of_a_tensor_that_is_kept_outside_the_model_too_is_refused(tmp_path: Path) -> None:
    head = TABLE + 1
    value = {"model": {"embed_tokens.weight": TABLE, "lm_head.weight": head}, "best": {"lm_head.weight": head}}
    torch.save(value, tmp_path / "m.pt")
    model = load_one(tmp_path / "m.pt", key="model")
    made = make_plan(look(model), Choices(schemes=("io",), allow_lossy=True, merge="keep:embedding"))
    with pytest.raises(RewriteRefused, match="outside of the model too"):
        apply(model, made, tmp_path / "out.pt")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_the_key_chooses_the_state_dict_and_the_other_one_stays(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"a": TABLE.clone(), "b": TABLE.clone()}, "ema": {"a": OTHER, "b": OTHER.clone()}},
        tmp_path / "m.pt",
    )
    done = CliRunner().invoke(main, ["apply", str(tmp_path / "m.pt"), "--key", "ema", "--to", str(tmp_path / "o.pt")])
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "o.pt")
    assert steps(found["ema"]["a"]) == steps(found["ema"]["b"])
    assert steps(found["state_dict"]["a"]) != steps(found["state_dict"]["b"])
    compared = CliRunner().invoke(main, ["verify", str(tmp_path / "m.pt"), str(tmp_path / "o.pt"), "--key", "ema"])
    assert "equal bit for bit" in compared.output


def test_the_structural_proof_is_enough_unless_more_is_asked_for(tmp_path: Path) -> None:
    torch.save({"a": TABLE, "b": TABLE.clone()}, tmp_path / "m.pt")
    out = str(tmp_path / "o.pt")
    refused = CliRunner().invoke(main, ["apply", str(tmp_path / "m.pt"), "--to", out, "--require", "regional"])
    assert refused.exit_code == 2
    assert "could not run: nothing runs" in " ".join(refused.output.split())
    assert not Path(out).exists()
    assert CliRunner().invoke(main, ["apply", str(tmp_path / "m.pt"), "--to", out]).exit_code == 0
    receipt = Path(out + ".receipt.json")
    assert check_receipt(receipt) == []
    assert undo(receipt) == [Path(out)]
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_failed_proof_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": TABLE, "b": OTHER}, tmp_path / "m.pt")
    model = load_one(tmp_path / "m.pt")
    wrong = Plan(model.path, "torch", (), (Share((Member("a"), Member("b"))),), 0, True)
    with pytest.raises(RewriteRefused, match="shape"):
        apply(model, wrong, tmp_path / "o.pt")
    value = MemoryStorage((TABLE + 1).numpy().tobytes(), "x")
    wrong = Plan(model.path, "torch", (), (Share((Member("a"),), value),), 0, True)
    with pytest.raises(ParityFailed, match="structural"):
        apply(model, wrong, tmp_path / "o.pt")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_write_that_fails_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": TABLE, "b": TABLE.clone()}, tmp_path / "m.pt")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tieaudit.formats.torch_checkpoint.zipped.ZipWriter._directory", full)
    with pytest.raises(RewriteRefused, match="No space left"):
        rewritten(tmp_path / "m.pt", tmp_path / "o.pt")
    assert os.listdir(tmp_path) == ["m.pt"]


class _Evil:
    """Would make a file when it is loaded. Not on the list of refused names: only an import and a call."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed-by-pickle"),))


@pytest.mark.parametrize("layout", ["zip", "legacy", "protocol 4"])
def test_code_in_a_checkpoint_is_never_run_and_stays_byte_for_byte(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LAYOUTS[layout]({"state_dict": {"a": TABLE, "b": TABLE.clone()}, "hook": _Evil()}, tmp_path / "m.pt")
    out = rewritten(tmp_path / "m.pt", tmp_path / "o.pt")
    assert not (tmp_path / "executed-by-pickle").exists()
    name = b"touch"
    for path in (tmp_path / "m.pt", out):
        assert path.read_bytes().count(name) == 1
    load(out, weights_only=False)
    assert (tmp_path / "executed-by-pickle").exists()  # it really is code, and still there


def test_a_change_beside_the_model_fails_the_proof(tmp_path: Path) -> None:
    """The proof's own control: each difference between two files is seen."""
    value: dict[str, Any] = {"state_dict": {"a": TABLE}, "ema": {"a": TABLE + 1}, "epoch": 3, "args": Unknown()}
    torch.save(value, tmp_path / "one.pt")
    nobody = frozenset[str]()
    assert beside.differences(tmp_path / "one.pt", tmp_path / "one.pt", "", nobody, nobody) == []
    torch.save(copy.deepcopy(value), tmp_path / "same.pt")
    assert beside.differences(tmp_path / "one.pt", tmp_path / "same.pt", "", nobody, nobody) == []
    for change in ("epoch", "args", "ema", "more", "less", "type"):
        other = copy.deepcopy(value)
        if change == "epoch":
            other["epoch"] = 4
        elif change == "args":
            other["args"].learning_rate = 0.2
        elif change == "ema":
            other["ema"]["a"][0, 0] += 1e-3
        elif change == "more":
            other["new"] = 1
        elif change == "less":
            del other["epoch"]
        else:
            other["epoch"] = 3.0
        torch.save(other, tmp_path / f"{change}.pt")
        found = beside.differences(tmp_path / "one.pt", tmp_path / f"{change}.pt", "", nobody, nobody)
        assert found and not any("member" in one for one in found), (change, found)
    with zipfile.ZipFile(tmp_path / "same.pt", "a") as archive:
        archive.writestr("same/extra", b"1")
    said = ["member extra of the archive: not named by the plan, but it changed"]
    assert beside.differences(tmp_path / "one.pt", tmp_path / "same.pt", "", nobody, nobody) == said


def test_shards_without_a_config_are_rewritten_and_a_tie_across_files_is_refused(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.bin", "m-00002-of-00002.bin"]
    torch.save({"a": TABLE, "b": TABLE.clone()}, tmp_path / names[0])
    torch.save({"c": TABLE.clone(), "d": OTHER, "e": OTHER.clone()}, tmp_path / names[1])
    weight_map = {"a": names[0], "b": names[0], "c": names[1], "d": names[1], "e": names[1]}
    index = {"metadata": {"total_size": 3 * 960 + 480}, "weight_map": weight_map}
    (tmp_path / "m.bin.index.json").write_text(json.dumps(index))
    model = load_one(tmp_path / "m.bin.index.json")
    assert torch_checkpoint.can_realise is not None
    across = torch_checkpoint.can_realise(model, Share((Member("a"), Member("c"))), "torch")
    assert "files cannot share a storage" in str(across)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "n.bin.index.json"
    plan = Plan(model.path, "torch", (), (Share((Member("d"), Member("e"))),), 240, True)
    apply(model, plan, target)
    assert steps(load(tmp_path / "out" / names[1])["d"])[1:] == steps(load(tmp_path / "out" / names[1])["e"])[1:]
    assert (tmp_path / "out" / names[0]).read_bytes() == (tmp_path / names[0]).read_bytes()
    # a storage that two names share counts once: three tables of 960 bytes and one of 240
    assert json.loads(target.read_text())["metadata"]["total_size"] == 3 * 960 + 240
    equal(loaded(tmp_path / "out" / names[1]), loaded(tmp_path / names[1]))


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.Linear(8, 30, bias=False))
    module[1].weight.data.copy_(module[0].weight.data)
    torch.jit.save(torch.jit.script(module), tmp_path / "m.pt")
    done = CliRunner().invoke(main, ["apply", str(tmp_path / "m.pt"), "--to", str(tmp_path / "o.pt")])
    assert done.exit_code == 2
    assert "save it again with torch.jit" in " ".join(done.output.split())


@pytest.mark.parametrize("kind", ["bfloat16", "int64", "float64", "complex64", "float8_e4m3fn"])
def test_every_type_is_tied_and_untied(tmp_path: Path, kind: str) -> None:
    table = (TABLE * 10).to(getattr(torch, kind))
    torch.save({"a": table, "b": table.clone()}, tmp_path / "m.pt")
    tied = load(rewritten(tmp_path / "m.pt", tmp_path / "t.pt"))
    assert steps(tied["a"]) == steps(tied["b"])
    apart = load(rewritten(tmp_path / "t.pt", tmp_path / "u.pt", "untie"))
    assert steps(apart["a"]) != steps(apart["b"])
    assert all(torch.equal(one.view(torch.uint8), table.view(torch.uint8)) for one in apart.values())


def test_a_slice_and_an_order_of_memory_of_its_own_survive_untying(tmp_path: Path) -> None:
    big = torch.arange(400.0).reshape(20, 20)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    value = {"a": big[2:7, 3:9], "b": big[2:7, 3:9], "big": big, "i": image, "j": image}
    torch.save(value, tmp_path / "m.pt")
    found = load(rewritten(tmp_path / "m.pt", tmp_path / "u.pt", "untie"))
    equal(found, value)
    assert steps(found["a"])[2:] == ((5, 6), (20, 1)) and steps(found["b"])[2:] == ((5, 6), (6, 1))
    assert found["j"].stride() == image.stride()
    assert found["j"].untyped_storage().nbytes() == image.numel() * 4


def _model(*weights: tuple[str, Any], path: Path) -> Model:
    torch.save(dict(weights), path)
    return load_one(path)


def test_reasons_against_an_edit_name_it(tmp_path: Path) -> None:
    model = _model(("a", TABLE), ("b", TABLE.to(torch.float64)), ("n", TABLE.numpy()), path=tmp_path / "m.pt")
    assert torch_checkpoint.can_realise is not None
    ask = torch_checkpoint.can_realise
    assert "two types" in str(ask(model, Share((Member("a"), Member("b"))), "torch"))
    assert "no tensor with a storage" in str(ask(model, Share((Member("a"), Member("n"))), "torch"))
    assert "shape" in str(ask(model, Share((Member("a"), Member("a", TRANSPOSED))), "torch"))
    assert "none stored" in str(ask(model, Unshare("a", "zzz"), "torch"))
    assert ask(model, Share((Member("a"), Member("a", AS_STORED))), "torch") is None


def _with_optimizer(path: Path, tied: bool, kind: type[Any] | None = None) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 30, bias=False))
    if tied:
        module[2].weight = module[0].weight
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.arange(5)).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}  # the tie is lost on the way
    state["2.weight"] = state["0.weight"].clone()
    torch.save({"state_dict": state, "optimizer_states": [optimizer.state_dict()]}, path)


@pytest.mark.parametrize(
    ("tied", "said"),
    [
        (True, "one entry for each of the 3 parameters that the result has: it is kept and fits"),
        (False, "does not fit the result: it has one entry for each of 4 parameters, the result has 3"),
    ],
)
def test_an_optimizer_is_kept_and_the_plan_says_whether_it_fits_the_tied_model(
    tmp_path: Path, tied: bool, said: str
) -> None:
    _with_optimizer(tmp_path / "m.ckpt", tied)
    words = ["apply", str(tmp_path / "m.ckpt"), "--optimizer", "keep", "--to", str(tmp_path / "o.ckpt")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert said in " ".join(done.output.split())
    assert ("2·g₁·g₂" in done.output) is not tied
    assert said in (tmp_path / "o.ckpt.receipt.json").read_text()
    before, after = load(tmp_path / "m.ckpt"), load(tmp_path / "o.ckpt")
    assert before["optimizer_states"][0]["param_groups"] == after["optimizer_states"][0]["param_groups"]
    for number, held in before["optimizer_states"][0]["state"].items():
        equal(after["optimizer_states"][0]["state"][number], held)
    # and PyTorch says the same when the state is loaded into an optimizer of the tied model
    module = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 30, bias=False))
    module[2].weight = module[0].weight
    optimizer = torch.optim.AdamW(module.parameters())
    if tied:
        optimizer.load_state_dict(after["optimizer_states"][0])
    else:
        with pytest.raises(ValueError, match="doesn't match the size"):
            optimizer.load_state_dict(after["optimizer_states"][0])


def test_untying_says_that_the_optimizer_of_the_tied_model_no_longer_fits(tmp_path: Path) -> None:
    _with_optimizer(tmp_path / "m.ckpt", tied=True)
    rewritten(tmp_path / "m.ckpt", tmp_path / "tied.ckpt")
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "tied.ckpt"), "--scheme", "untie"])
    said = " ".join(done.output.split())
    assert "it has one entry for each of 3 parameters, the result has 4" in said
    assert "a sum cannot be split again" in said


def test_a_pickle_that_changed_has_no_frames_whose_lengths_would_be_wrong(tmp_path: Path) -> None:
    """CPython's fast unpickler forgives a wrong length, its Python one and others do not."""
    LAYOUTS["protocol 5, framed"](trained(), tmp_path / "m.pt")
    for path, expected in ((tmp_path / "m.pt", 1), (rewritten(tmp_path / "m.pt", tmp_path / "o.pt"), 0)):
        with zipfile.ZipFile(path) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith("data.pkl"))
            opcodes = [opcode.name for opcode, _, _ in pickletools.genops(archive.read(name))]
        assert opcodes.count("FRAME") == expected
        assert "MEMOIZE" not in opcodes or expected


def test_an_optimizer_of_other_parameters_is_kept_and_nothing_is_claimed(tmp_path: Path) -> None:
    state = {"a": TABLE, "b": TABLE.clone()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(OTHER.clone()) for _ in range(3)], momentum=0.9)
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.ckpt")
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "m.ckpt")])
    said = "'optimizer' is kept as it is: its 3 entries cannot be told to belong to the 2 parameters before or the 1"
    assert said in " ".join(done.output.split())


def test_files_of_real_writers_keep_all_their_tensors_whatever_is_rewritten(corpus: Path, tmp_path: Path) -> None:
    """The ties that they have, and, as few have any, the first and the last tensor moved to storages of their own."""
    tied, moved = [], 0
    for path in sorted(corpus.rglob("*")):
        if path.suffix not in (".pt", ".pth", ".ckpt", ".bin") or not path.is_file() or path.stat().st_size > 9_000_000:
            continue
        try:
            before = loaded(path)
            model = load_one(path)
        except Exception:
            continue  # hostile, or not for PyTorch's safe loader
        target = tmp_path / f"out{path.suffix}"
        if model.format == "torch_checkpoint" and (made := make_plan(look(model), Choices())).edits:
            apply(model, made, target)
            equal(loaded(target), before)
            tied.append(path.name)
            target.unlink()
            target.with_name(target.name + ".receipt.json").unlink()
        names = [name for name, (tensor, _) in subject_of(path, "").found.sources.items() if tensor.stored is not None]
        if names:
            write_file(path, "", Orders(own=[names[0], names[-1]]), target, ())
            equal(loaded(target), before)
            target.unlink()
            moved += 1
    assert {"version-RFB-320.pth", "state.pt"} <= set(tied)
    assert moved >= 10


@pytest.mark.parametrize("edit", ["untied in the middle", "tied to the last one", "new values for the first one"])
def test_pytorch_finds_every_storage_where_it_computes_that_it_lies(tmp_path: Path, edit: str) -> None:
    state = {"a": TABLE, "b": OTHER, "c": TABLE if edit.startswith("untied") else TABLE.clone(), "d": OTHER + 1}
    torch.save(state, tmp_path / "model.pt")
    model = load_one(tmp_path / "model.pt")
    orders = Orders(lossless=edit != "new values for the first one")
    if edit == "untied in the middle":
        orders.own.append("c")
    elif edit == "tied to the last one":
        orders.same["a"] = ("c", AS_STORED)
    else:
        orders.values["a"] = MemoryStorage(row_major_bytes(TABLE * 2), "values")
        orders.same["c"] = ("a", AS_STORED)
    write_file(tmp_path / "model.pt", "", orders, tmp_path / "out.pt", model.weights)
    expected = torch.load(tmp_path / "out.pt")

    torch.load(tmp_path / "out.pt", map_location="meta")
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        computed = torch.load(tmp_path / "out.pt", mmap=True)

    twice = 2 if edit.startswith("new") else 1
    assert torch.equal(expected["a"], TABLE * twice)
    assert torch.equal(expected["c"], TABLE * twice)
    assert all(torch.equal(computed[name], expected[name]) for name in state)


def test_a_destination_of_another_kind_is_refused_also_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    torch.save({"a": TABLE, "b": OTHER}, tmp_path / "model.pt")

    ran = CliRunner().invoke(main, ["apply", str(tmp_path / "model.pt"), "--to", str(tmp_path / "out.onnx")])

    assert ran.exit_code == 2
    assert "expected a name that ends in .pt" in ran.output
