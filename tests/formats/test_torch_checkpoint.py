"""Checkpoints that torch.save wrote, read without PyTorch: names, bytes, aliases and slices are PyTorch's own."""

from __future__ import annotations

import argparse
import io
import json
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.errors import CorruptFile, UnreadableModel, UsageError
from tieaudit.find import find
from tieaudit.load import load_one, locate
from tieaudit.model import Model
from tieaudit.scan import scan
from tieaudit.storage import FileStorage
from tieaudit.verdict import Found

torch = pytest.importorskip("torch")
truth = pytest.importorskip("torch_files")


def ramp(*shape: int, dtype: Any = None, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator)
    return numbers if dtype is None else (numbers * 50).to(dtype)


def saved(path: Path, value: object, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def aliased(found: Found) -> set[frozenset[str]]:
    return {frozenset(tie.ids) for tie in found.ties if tie.origin == "aliased"}


def read_bytes(model: Model, name: str) -> bytes:
    storage = model.by_id[name].storage
    assert storage is not None
    return storage.read_ranges([(0, storage.n_bytes)])[0]


def ways_to_share() -> dict[str, Any]:
    """Every way in which two names meet in one storage, and the nearest way in which they do not."""
    table, gates, qkv = ramp(12, 8), ramp(16, 5, seed=1), ramp(6, 9, seed=2)
    cube, one, square = ramp(3, 4, 5, seed=3), ramp(1, 5, seed=4), ramp(6, 6, seed=7)
    return {
        "table": table,
        "head": table,
        "head.turned": table.t(),
        "head.flat": table.view(-1),
        "head.folded": table.view(4, 3, 8),
        "head.rows": table[:5],
        "head.columns": table[:, 2:4],
        "gates.all": gates,
        "gates.in": gates[:8],
        "gates.out": gates[8:],
        "q": qkv[:, :3],
        "k": qkv[:, 3:6],
        "v": qkv[:, 6:],
        "odd": square[::2],
        "even": square[1::2],
        "cube": cube,
        "cube.moved": cube.permute(2, 0, 1),
        "cube.moved.again": cube.permute(1, 2, 0),
        "cube.slice": cube[1],
        "expanded": one.expand(7, 5),
        "expanded.again": one.expand(7, 5),
        "expanded.source": one,
        "copy": ramp(12, 8).clone(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
    "protocol 4": {"pickle_protocol": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_bytes_aliases_and_slices_are_those_that_pytorch_loads(tmp_path: Path, layout: str) -> None:
    path = saved(tmp_path / "m.pt", ways_to_share(), **LAYOUTS[layout])
    expected = dict(truth.named(torch.load(path, weights_only="protocol 4" not in layout)))
    model = load_one(path)
    found = find(model)
    assert {w.name: (w.dtype, w.shape) for w in model.weights} == {
        name: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in expected.items()
    }
    for name, one in expected.items():
        assert read_bytes(model, name) == truth.row_major_bytes(one), name
    # the expanded pair visits its source's five elements 7 times: the same elements, but no permutation of them
    assert aliased(found) == {ids for ids in truth.one_value(expected)}
    met = {frozenset((a, b)) for one in found.overlaps for a in one.ids for b in one.ids if a < b}
    assert truth.sharing(expected) <= met
    ids_met = {id for pair in met for id in pair}
    assert not ids_met & {"q", "k", "v", "odd", "even", "copy"}  # views that lie between each other never meet


def test_the_views_of_an_alias_turn_the_first_name_into_the_others(tmp_path: Path) -> None:
    shared = ways_to_share()
    model = load_one(saved(tmp_path / "m.pt", shared))
    views = {m.id: m.view for tie in find(model).ties if tie.origin == "aliased" for m in tie.members}
    assert str(views["head.turned"]) == "transposed"
    assert str(views["head.flat"]) == "reshaped to [96]"
    assert str(views["cube.moved"]) == "permuted [2, 0, 1]"
    for name, first in {"head.turned": "table", "head.folded": "table", "cube.moved": "cube"}.items():
        assert np.array_equal(views[name].apply(shared[first].numpy()), shared[name].numpy()), name


def test_a_transposed_alias_is_stored_once_and_its_copy_is_found_through_either_name(tmp_path: Path) -> None:
    table = ramp(64, 32)
    path = saved(tmp_path / "m.pt", {"turned": table.t(), "table": table, "copy": table.t().contiguous()})
    report = scan(load_one(path))
    found = {tie.origin: tie for tie in report.subject.found.ties}
    assert set(found) == {"aliased", "measured"}
    views = {member.id: str(member.view) for member in found["measured"].members}
    assert views == {"turned": "as stored", "table": "transposed", "copy": "as stored"}
    # 64 · 32 · 4 bytes: one copy too many, not two (the two names of one storage are one copy)
    assert report.summary.n_bytes_duplicate == 8192 == found["measured"].n_bytes_saved
    assert report.summary.n_parameters == 2048


def test_flattened_lstm_weights_and_a_split_qkv_are_no_ties(tmp_path: Path) -> None:
    flat = ramp(3000)
    weights = {"w_ih": flat[:1000].view(40, 25), "w_hh": flat[1000:2600].view(40, 40), "b": flat[2600:2640]}
    fused = ramp(24, 8, seed=5)
    parts = {name: fused[:, 2 * n : 2 * n + 2] for n, name in enumerate("qkvo")}
    found = find(load_one(saved(tmp_path / "m.pt", {**weights, **parts})))
    assert found.ties == ()
    assert found.overlaps == ()


def test_overlapping_views_are_slices_and_no_tie(tmp_path: Path) -> None:
    table = ramp(10, 4)
    model = load_one(saved(tmp_path / "m.pt", {"head": table[:6], "table": table, "tail": table[5:]}))
    found = find(model)
    assert found.ties == ()
    (one,) = found.overlaps
    assert set(one.ids) == {"head", "table", "tail"}
    assert one.ids[0] == "table"
    shown = CliRunner().invoke(main, ["scan", str(tmp_path / "m.pt")]).output
    assert "Slices (1)" in shown
    assert "views of parts of table" in shown


@pytest.mark.parametrize(
    "dtype", "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 uint32 "
    "float8_e4m3fn float8_e5m2".split(),
)  # fmt: skip
def test_every_element_type_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    value = (torch.arange(24).reshape(4, 6) % 2 == 0) if dtype == "bool" else torch.arange(24).reshape(4, 6).to(kind)
    model = load_one(saved(tmp_path / "m.pt", {"a": value, "b": value.t()}))
    assert {w.dtype for w in model.weights} == {dtype}
    assert read_bytes(model, "a") == truth.row_major_bytes(value)
    assert read_bytes(model, "b") == truth.row_major_bytes(value.t())


@pytest.mark.parametrize("dtype", ["float32", "int16", "complex64", "uint8"])
def test_a_big_endian_checkpoint_is_read_as_the_numbers_that_it_means(tmp_path: Path, dtype: str) -> None:
    value = torch.arange(1, 13).reshape(3, 4).to(getattr(torch, dtype))
    source = saved(tmp_path / "little.pt", {"w": value, "turned": value.t(), "last": value[2]})
    width = {"float32": 4, "int16": 2, "complex64": 4, "uint8": 1}[dtype]  # each half of a complex number alone
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/data/0"):
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            new.writestr(name, b"big" if name.endswith("/byteorder") else data)
    expected = truth.loaded(tmp_path / "big.pt")
    assert torch.equal(expected["w"], value)  # PyTorch agrees that this is what the file means
    model = load_one(tmp_path / "big.pt")
    assert {w.name: read_bytes(model, w.name) for w in model.weights} == {
        name: truth.row_major_bytes(one) for name, one in expected.items()
    }
    assert aliased(find(model)) == {frozenset({"w", "turned"})}


def test_a_contiguous_tensor_is_a_range_of_the_file_and_nothing_of_it_is_read(tmp_path: Path) -> None:
    model = load_one(saved(tmp_path / "m.pt", {"w": ramp(300, 300)}))
    storage = model.by_id["w"].storage
    assert isinstance(storage, FileStorage)
    assert (tmp_path / "m.pt").read_bytes()[storage.offset :][: storage.n_bytes] == truth.row_major_bytes(
        ramp(300, 300)
    )


def test_a_deflated_checkpoint_is_read_too(tmp_path: Path) -> None:
    """Somebody unpacked it and packed it again with a program that deflates; PyTorch reads that as well."""
    source = saved(tmp_path / "m.pt", ways_to_share())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    expected = truth.loaded(tmp_path / "z.pt")
    model = load_one(tmp_path / "z.pt")
    assert {w.name: read_bytes(model, w.name) for w in model.weights} == {
        name: truth.row_major_bytes(one) for name, one in expected.items()
    }
    assert aliased(find(model)) == truth.one_value(expected)


# --- what a file holds ----------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(20, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.head = torch.nn.Linear(6, 20, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("relative_table", torch.randn(5))


def trained() -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net.head(net.norm(net.emb(torch.arange(8)))).sum().backward()
    optimizer.step()
    return net, optimizer


NESTED = {
    "lightning": ("state_dict", "optimizer_states"),
    "deepspeed": ("module", "optimizer"),
    "plain": ("model", "optimizer"),
    "pytorch tutorial": ("model_state_dict", "optimizer_state_dict"),
}


@pytest.mark.parametrize("kind", NESTED)
def test_the_state_dict_inside_is_the_model_and_the_optimizer_beside_it_is_only_named(
    tmp_path: Path, kind: str
) -> None:
    key, other = NESTED[kind]
    net, optimizer = trained()
    state = [optimizer.state_dict()] if kind == "lightning" else optimizer.state_dict()
    model = load_one(
        saved(tmp_path / "m.ckpt", {"epoch": 3, key: net.state_dict(), other: state, "lr": torch.tensor(0.1)})
    )
    assert [w.name for w in model.weights] == list(net.state_dict())
    assert model.metadata["key"] == key
    # three parameters (the tied matrix once), for each exp_avg, exp_avg_sq and step
    assert model.metadata["beside"] == f"{other} (9 tensors), lr (1 tensor)"
    assert aliased(find(model)) == {frozenset({"emb.weight", "head.weight"})}


def test_an_average_of_the_weights_is_beside_the_model_and_can_be_chosen(tmp_path: Path) -> None:
    net, _ = trained()
    average = {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    path = saved(tmp_path / "m.pt", {"state_dict": net.state_dict(), "state_dict_ema": average})
    assert load_one(path).metadata["beside"] == "state_dict_ema (8 tensors)"
    chosen = load_one(path, key="state_dict_ema")
    assert chosen.metadata["key"] == "state_dict_ema"
    assert read_bytes(chosen, "emb.weight") == truth.row_major_bytes(average["emb.weight"])
    assert len(load_one(path, key=".").weights) == 16
    with pytest.raises(UsageError, match=r"no key 'ema' holds tensors \(there: state_dict, state_dict_ema\)"):
        load_one(path, key="ema")


def test_the_command_line_chooses_a_key_and_says_what_else_there_is(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "m.pt", {"generator": {"w": ramp(4, 4)}, "critic": {"w": ramp(4, 4)}, "step": 7}))
    both = json.loads(CliRunner().invoke(main, ["scan", path, "--format", "json"]).stdout)["models"][0]
    assert [w["id"] for w in both["weights"]] == ["generator.w", "critic.w"]
    one = CliRunner().invoke(main, ["scan", path, "--key", "critic"]).output
    assert "key critic" in one
    assert "not read: generator (1 tensor)" in one
    wrong = CliRunner().invoke(main, ["scan", path, "--key", "nothing"])
    assert wrong.exit_code == 2
    assert "there: generator, critic" in wrong.stderr
    assert "generator.w ← critic.w" in CliRunner().invoke(main, ["plan", path]).output
    assert "nothing to do" in CliRunner().invoke(main, ["plan", path, "--key", "critic"]).output


def test_a_model_beside_a_second_one_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"model": {"w": ramp(2, 2)}, "criterion": {"w": ramp(3, 3)}})
    assert [w.name for w in load_one(path).weights] == ["model.w", "criterion.w"]


def test_nothing_but_optimizer_state_is_still_shown(tmp_path: Path) -> None:
    _, optimizer = trained()
    model = load_one(saved(tmp_path / "state.pt", optimizer.state_dict()))
    assert "state.0.exp_avg" in {w.name for w in model.weights}


def test_a_pickled_module_gives_its_names_without_its_class(tmp_path: Path) -> None:
    net, _ = trained()
    for layout in ("zip", "legacy"):
        with warnings.catch_warnings():  # that a class's source is not found
            warnings.simplefilter("ignore")
            path = saved(tmp_path / f"{layout}.pt", {"model": net, "epoch": 1}, **LAYOUTS[layout])
        model = load_one(path)
        assert {w.name for w in model.weights} == set(net.state_dict())
        assert aliased(find(model)) == {frozenset({"emb.weight", "head.weight"})}
        parameters = {w.name for w in model.weights if w.parameter}
        assert parameters == {name for name, _ in net.named_parameters(remove_duplicate=False)}
        assert "Net ×1" in model.metadata["placeholders"]
        assert scan(model).summary.n_parameters == sum(p.numel() for p in net.parameters())


def test_a_module_registered_twice_has_every_name(tmp_path: Path) -> None:
    shared = torch.nn.Linear(3, 3)
    net = torch.nn.Sequential(shared, torch.nn.Sequential(shared))
    model = load_one(saved(tmp_path / "m.pt", net))
    assert [w.name for w in model.weights] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert len(aliased(find(model))) == 2


def test_a_stray_namespace_hides_no_weight_and_is_named(tmp_path: Path) -> None:
    hparams = argparse.Namespace(lr=1e-3, path=Path("x"), extra=torch.ones(3))
    path = saved(tmp_path / "m.pt", {"state_dict": {"w": ramp(4, 4)}, "args": hparams})
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)
    model = load_one(path)
    assert [w.name for w in model.weights] == ["w"]
    assert "argparse.Namespace ×1" in model.metadata["placeholders"]


def test_parameters_buffers_sizes_and_ordered_dictionaries_are_what_they_say(tmp_path: Path) -> None:
    state = OrderedDict(
        w=torch.nn.Parameter(ramp(3, 3)), b=torch.nn.Buffer(ramp(4)), size=torch.Size([2, 3]), plain=ramp(2, 5)
    )
    model = load_one(saved(tmp_path / "m.pt", state))
    assert {w.name: (w.parameter, w.because) for w in model.weights} == {
        "w": (True, "saved as a Parameter"),
        "b": (False, "saved as a Buffer"),
        "plain": (True, "by its type: float32, and no buffer by its name"),
    }


def test_tensors_of_several_parts_are_named_by_part_and_never_equal_to_dense_ones(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    with (
        warnings.catch_warnings()
    ):  # PyTorch is about to give up the one and calls the other beta; files of them remain
        warnings.simplefilter("ignore")
        codes, rows = torch.quantize_per_tensor(ramp(4, 4), 0.1, 0, torch.qint8), dense.to_sparse_csr()
    sparse = dense.to_sparse().coalesce()
    model = load_one(saved(tmp_path / "m.pt", {"s": sparse, "values": sparse.values().clone(), "r": rows, "q": codes}))
    names = {w.name: w.dtype for w in model.weights}
    assert names["s.indices"] == "int64"
    assert names["s.values"] == "float32"
    assert names["r.rows"] == names["r.columns"] == "int64"
    assert names["q.codes"] == "int8"
    assert model.by_id["q.codes"].parameter is None
    ties = {frozenset(tie.ids) for tie in find(model).ties}
    assert frozenset({"s.values", "r.values"}) in ties
    assert not any("values" in ids for ids in ties)


def test_a_meta_tensor_has_a_shape_and_no_values(tmp_path: Path) -> None:
    model = load_one(saved(tmp_path / "m.pt", {"w": torch.empty(3, 4, device="meta"), "v": ramp(2)}))
    weight = model.by_id["w"]
    assert weight.absent
    assert weight.shape == (3, 4)
    assert "meta" in weight.because


def test_a_lazy_conjugate_and_an_absurd_expansion_are_left_out_and_said(tmp_path: Path) -> None:
    value = {"c": torch.randn(3, dtype=torch.complex64).conj(), "e": torch.zeros(1).expand(2**40), "w": ramp(2, 2)}
    model = load_one(saved(tmp_path / "m.pt", value))
    assert [w.name for w in model.weights] == ["w"]
    assert len(model.notes) == 2
    assert any(note.startswith("c: ") and "conjugates" in note for note in model.notes)
    assert any(note.startswith("e: repeats 4 stored bytes up to 4398046511104") for note in model.notes)


@pytest.mark.parametrize("value", [ramp(3, 2), [ramp(3, 2), ramp(2, 2)], {"a": [{"b": ramp(1, 2)}, ramp(2, 2)]}])
def test_a_lone_tensor_a_list_and_a_nest_are_named_as_they_lie(tmp_path: Path, value: Any) -> None:
    path = saved(tmp_path / "m.pt", value)
    assert [w.name for w in load_one(path).weights] == list(truth.loaded(path))


def test_a_checkpoint_without_tensors_is_no_clean_one(tmp_path: Path) -> None:
    model = load_one(saved(tmp_path / "m.pt", {"epoch": 3}))
    assert model.notes == ("the file holds no tensor",)


def test_numpy_arrays_in_the_pickle_are_weights_too(tmp_path: Path) -> None:
    array = np.arange(40_000, dtype=np.float32).reshape(200, 200)
    value = {"model": {"w": array, "f": np.asfortranarray(array[:3, :5]), "t": torch.from_numpy(array.copy())}}
    for protocol in (2, 4):
        model = load_one(saved(tmp_path / f"{protocol}.pt", value, pickle_protocol=protocol))
        held = {w.name: read_bytes(model, w.name) for w in model.weights}
        assert held.get("w", array.tobytes()) == array.tobytes()
        assert held["t"] == array.tobytes()
        assert held["f"] == array[:3, :5].tobytes()
        assert protocol == 2 or "w" in held


def test_torchscript_names_aliases_and_bytes_are_those_of_the_module(tmp_path: Path) -> None:
    net, _ = trained()
    lstm = torch.nn.LSTM(3, 4)
    module = torch.jit.script(torch.nn.ModuleDict({"e": net.emb, "h": net.head, "r": lstm})["r"])
    torch.jit.save(module, tmp_path / "lstm.pt")
    model = load_one(tmp_path / "lstm.pt")
    assert {w.name: read_bytes(model, w.name) for w in model.weights} == {
        name: truth.row_major_bytes(one) for name, one in lstm.state_dict().items()
    }
    assert find(model).ties == ()

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = net.emb, net.head

        def forward(self, ids: Any) -> Any:
            return self.head(self.emb(ids)) + torch.arange(20.0)

    traced = torch.jit.trace(Tied(), torch.arange(4))
    torch.jit.save(traced, tmp_path / "tied.pt")
    torch.jit.save(torch.jit.freeze(traced.eval()), tmp_path / "frozen.pt")
    model = load_one(tmp_path / "tied.pt")
    assert model.metadata["layout"] == "torchscript"
    assert [w.name for w in load_one(tmp_path / "tied.pt", key="emb").weights] == ["weight"]
    assert aliased(find(model)) == {frozenset({"emb.weight", "head.weight"})}
    frozen = load_one(tmp_path / "frozen.pt")
    assert all(w.name.startswith("CONSTANTS.c") for w in frozen.weights)
    assert truth.row_major_bytes(net.emb.weight) in [read_bytes(frozen, w.name) for w in frozen.weights]


# --- which files --------------------------------------------------------------------------------------------------


def test_shards_belong_to_their_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    saved(tmp_path / names[0], {"a": ramp(4, 4)})
    saved(tmp_path / names[1], {"b": ramp(4, 4), "c": ramp(2, 3, seed=1)})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}))
    for path in (tmp_path, index, tmp_path / names[1]):
        model = load_one(path)
        assert [w.name for w in model.weights] == ["a", "b", "c"]
        assert {frozenset(tie.ids) for tie in find(model).ties} == {frozenset({"a", "b"})}
    index.write_text(json.dumps({"weight_map": {"a": names[1], "b": names[1], "c": names[1]}}))
    with pytest.raises(CorruptFile, match=r"expected tensor 'a' in no shard|found no such tensor|expected tensor 'a'"):
        load_one(index)
    (tmp_path / names[0]).unlink()
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}))
    with pytest.raises(CorruptFile, match="the download is incomplete"):
        load_one(index)


def test_what_a_trainer_leaves_beside_the_weights_is_no_model(tmp_path: Path) -> None:
    net, optimizer = trained()
    saved(tmp_path / "pytorch_model.bin", net.state_dict())
    saved(tmp_path / "optimizer.pt", optimizer.state_dict())
    saved(tmp_path / "rng_state.pth", {"cpu": torch.get_rng_state()})
    saved(tmp_path / "training_args.bin", argparse.Namespace(lr=1))
    (tmp_path / "data.bin").write_bytes(bytes(100))
    sources, errors = locate([str(tmp_path)])
    assert [source.path.name for source in sources] == ["pytorch_model.bin"]
    assert errors == []
    with pytest.raises(UnreadableModel, match=r"optimizer\.pt: a PyTorch file .* rename it"):
        load_one(tmp_path / "optimizer.pt")


def test_zip_files_and_pickles_of_other_makers_are_not_claimed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(UnreadableModel, match="no model in this folder"):
        load_one(tmp_path)


def test_a_checkpoint_read_from_memory_of_another_process_is_the_same(tmp_path: Path) -> None:
    """Storages travel to child processes as pickles of our own."""
    import pickle

    model = load_one(saved(tmp_path / "m.pt", ways_to_share()))
    for weight in model.weights:
        again = pickle.loads(pickle.dumps(weight.storage))
        assert again.read_ranges([(0, weight.n_bytes)]) == [read_bytes(model, weight.name)]
    buffer = io.BytesIO()
    pickle.dump([w.storage for w in model.weights], buffer)
    assert len(buffer.getvalue()) < 10_000  # places, not bytes
