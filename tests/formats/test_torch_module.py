"""Live modules: every name, exact aliases, structure without memory, bytes in blocks, uses from the exported graph."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from tests.torch_modules import Autoencoder, TiedLM, Twice, Universal  # noqa: E402
from tieaudit.apply import apply  # noqa: E402
from tieaudit.depth import Repeated, shared_across_depth  # noqa: E402
from tieaudit.errors import RewriteRefused, UnreadableModel  # noqa: E402
from tieaudit.formats.torch_module import tensors  # noqa: E402
from tieaudit.formats.torch_module.answer import built  # noqa: E402
from tieaudit.formats.torch_module.factory import Builder, load  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402
from tieaudit.outcome import planned  # noqa: E402
from tieaudit.plan import Choices  # noqa: E402
from tieaudit.plan import plan as make_plan  # noqa: E402
from tieaudit.scan import look, scan  # noqa: E402
from tieaudit.verdict import Report  # noqa: E402
from tieaudit.view import TRANSPOSED  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent


def identity_groups(module: nn.Module) -> set[frozenset[str]]:
    """The truth: names of one Parameter object."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def aliased(report: Report) -> set[frozenset[str]]:
    return {frozenset(tie.ids) for tie in report.subject.found.ties if tie.origin == "aliased" and len(tie.ids) > 1}


def measured(report: Report) -> set[frozenset[str]]:
    return {frozenset(tie.ids) for tie in report.subject.found.ties if tie.origin == "measured"}


def of(**parameters: Any) -> nn.Module:
    module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    return module


def test_a_tied_head_is_one_region_and_counts_once() -> None:
    module = TiedLM(50, 8)
    report = scan(read_module(module))
    assert aliased(report) == {frozenset({"embed.weight", "head.weight"})} == identity_groups(module)
    # 50·8 embedding + LSTM (8·32 + 8·32 + 2·32) + bias 50; with the head counted again 1,426
    assert report.summary.n_parameters == 400 + 576 + 50 == sum(p.numel() for p in module.parameters())
    assert report.summary.n_parameters_named == 1426
    roles = {id: role.kind for id, role in report.subject.roles.items()}
    assert (roles["embed.weight"], roles["head.weight"], roles["head.bias"]) == (
        "token_embedding",
        "output_head",
        "output_head_bias",
    )


def test_a_buffer_that_is_not_saved_is_told_from_one_that_is() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(2))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert {w.name: w.because for w in read_module(module).weights} == {
        "kept": "a buffer",
        "scratch": "a buffer that is not saved",
    }


def test_a_module_at_two_paths_shows_under_both_with_its_buffers() -> None:
    model = read_module(Twice())
    names = {weight.name for weight in model.weights}
    assert {"first.0.weight", "second.0.weight", "first.1.running_mean", "second.1.running_mean"} <= names
    assert frozenset({"first.0.weight", "second.0.weight"}) in aliased(scan(model))
    assert frozenset({"first.1.running_var", "second.1.running_var"}) in aliased(scan(model))
    assert {weight.parameter for weight in model.weights if "running" in weight.name} == {False}


@pytest.mark.parametrize("shape", [(4, 7), (5, 5)])
def test_swapped_strides_over_one_storage_are_a_transposed_alias(shape: tuple[int, int]) -> None:
    value = torch.randn(shape)
    module = of(a=value, b=value.T)
    report = scan(read_module(module))
    (tie,) = report.subject.found.ties
    assert tie.origin == "aliased"
    assert [member.view for member in tie.members] == [tie.members[0].view, TRANSPOSED]
    assert report.summary.n_bytes == value.numel() * 4  # stored once; the tempting answer is twice
    assert report.summary.n_parameters == 2 * value.numel()  # two Parameter objects: what the live module counts


def test_swapped_strides_are_told_without_any_bytes() -> None:
    value = torch.empty(4, 7, device="meta")
    report = scan(read_module(of(a=value, b=value.T, c=torch.empty(4, 7, device="meta"))))
    assert aliased(report) == {frozenset({"a", "b"})}


def test_a_transposed_alias_of_a_copy_joins_the_copy_through_both_views() -> None:
    value = torch.randn(6, 9)
    module = of(a=value.T.contiguous(), b=value, c=value.T)
    found = scan(read_module(module)).subject.found
    (tie,) = [tie for tie in found.ties if tie.origin == "measured"]
    views = {member.id: str(member.view) for member in tie.members}
    assert views == {"a": "as stored", "b": "transposed", "c": "as stored"}
    assert tie.n_bytes_saved == 6 * 9 * 4


def test_disjoint_views_of_one_storage_are_no_tie() -> None:
    qkv = torch.randn(9, 4)
    module = of(q=qkv[:3], k=qkv[3:6], v=qkv[6:])
    report = scan(read_module(module))
    assert report.subject.found.ties == ()
    assert report.summary.n_bytes == qkv.numel() * 4


def test_flattened_lstm_weights_are_no_tie() -> None:
    flat = torch.randn(200)
    rnn = nn.LSTM(3, 2)
    begin = 0
    for name, parameter in list(rnn.named_parameters()):
        end = begin + parameter.numel()
        setattr(rnn, name, nn.Parameter(flat[begin:end].view(parameter.shape)))
        begin = end
    assert len({p.untyped_storage().data_ptr() for p in rnn.parameters()}) == 1
    assert scan(read_module(rnn)).subject.found.ties == ()


def test_overlapping_slices_are_no_tie_but_are_mentioned() -> None:
    value = torch.randn(10, 4)
    found = scan(read_module(of(a=value[:6], b=value[4:]))).subject.found
    assert found.ties == ()
    assert [set(one.ids) for one in found.overlaps] == [{"a", "b"}]


def test_elements_with_gaps_are_told_apart_by_their_strides() -> None:
    base = torch.arange(24.0)
    module = of(a=base[0:23:2], b=base[0:23:2], c=base[1:24:2])
    report = scan(read_module(module))
    assert aliased(report) == {frozenset({"a", "b"})}
    # elements 0, 1, 6, 7 and 0, 2, 5, 7: they begin and end alike, and are not the same
    a, b = base.as_strided((2, 2), (6, 1)), base.as_strided((2, 2), (5, 2))
    assert scan(read_module(of(a=a, b=b))).subject.found.ties == ()


def test_two_storages_over_one_memory_are_one_tensor() -> None:
    array = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    a, b = torch.from_numpy(array), torch.from_numpy(array)
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
    assert aliased(scan(read_module(of(a=a, b=b)))) == {frozenset({"a", "b"})}


def test_freed_addresses_make_no_tie_because_tensors_are_held() -> None:
    """Two tensors that live one after the other often have one address: holding them keeps them apart."""

    class Fresh(nn.Module):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            for index in range(8):  # made while we walk and kept by nobody else
                yield f"p{index}", nn.Parameter(torch.full((4, 4), float(index)) + torch.eye(4))

    gc.collect()
    report = scan(read_module(Fresh()))
    assert aliased(report) == set()
    assert len(report.subject.model.weights) == 8


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_structure_without_memory_keeps_its_ties_and_cannot_tell_copies(kind: str) -> None:
    if kind == "meta":
        with torch.device("meta"):
            module = TiedLM()
    else:
        with FakeTensorMode():
            module = TiedLM()
    report = scan(read_module(module))
    assert aliased(report) == {frozenset({"embed.weight", "head.weight"})}
    assert measured(report) == set()
    assert report.summary.n_parameters == 1026
    assert any("equal copies cannot be told" in unsure.because for unsure in report.cannot_tell)
    assert not report.subject.found.unreadable


KINDS = ["float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "bool", "uint16"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_as_its_own_bytes_in_any_range(kind: str) -> None:
    dtype = getattr(torch, kind)
    value = (torch.randn(7, 5) * 3).to(dtype)
    for seen in (value, value.T, value[1:6, ::2], value.unsqueeze(0).transpose(0, 2), value[0].expand(3, 5)):
        (storage,) = tensors.locate([seen])
        whole = seen.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert storage.n_bytes == len(whole)
        assert storage.read_ranges([(0, len(whole)), (3, 11), (len(whole) - 1, 1), (5, 0)]) == [
            whole,
            whole[3:14],
            whole[-1:],
            b"",
        ]


def test_lazily_conjugated_values_are_read_as_what_they_are() -> None:
    value = torch.randn(3, 3, dtype=torch.complex64)
    (storage,) = tensors.locate([value.conj()])
    expected = value.conj().resolve_conj().numpy().tobytes()
    assert storage.read_ranges([(0, storage.n_bytes)]) == [expected]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_lazy_conjugate_of_a_tensor_is_another_tensor(device: str) -> None:
    value = torch.randn(3, 4, dtype=torch.complex64, device=device)
    module = nn.Module()
    for name, one in {
        "a": value,
        "b": value.conj(),
        "c": value.conj(),
        "d": value.imag,
        "e": value.conj().imag,
    }.items():
        module.register_buffer(name, one)
    assert aliased(scan(read_module(module))) == {frozenset({"b", "c"})}


def test_slices_of_a_tensor_without_values_are_neither_ties_nor_read() -> None:
    value = torch.empty(6, 4, device="meta")
    report = scan(read_module(of(a=value[:4], b=value[2:], c=torch.empty(4, 4, device="meta"))))
    found = report.subject.found
    assert (found.ties, found.constants, dict(found.unreadable)) == ((), frozenset(), {})
    assert [set(one.ids) for one in found.overlaps] == [{"a", "b"}]
    assert report.cannot_tell


def test_a_type_unknown_to_us_is_compared_as_bits() -> None:
    assert tensors.dtype_name(torch.complex32)[0] == "uint32"
    assert "complex32" in tensors.dtype_name(torch.complex32)[1]
    assert tensors.dtype_name(torch.bfloat16) == ("bfloat16", "")


def test_reading_a_few_elements_of_a_transposed_matrix_copies_no_more_than_two_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (storage,) = tensors.locate([torch.randn(300, 1000).T])
    copied = []
    real = tensors._elements

    def watched(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        found = real(tensor, first, last)
        copied.append(found.untyped_storage().nbytes() if not tensor.is_contiguous() else 0)
        return found

    monkeypatch.setattr(tensors, "_elements", watched)
    storage.read_ranges([(4 * 299, 8)])  # the last of one row, the first of the next
    assert max(copied) == 2 * 300 * 4


def test_a_live_tensor_is_never_pickled_by_accident() -> None:
    (storage,) = tensors.locate([torch.zeros(3)])
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(storage)


def test_a_parametrised_weight_is_named_by_its_original() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.nn.utils.parametrizations.orthogonal(module[0])
    module[1].weight = module[0].parametrizations.weight.original
    model = read_module(module)
    assert aliased(scan(model)) == {frozenset({"0.parametrizations.weight.original", "1.weight"})}
    assert "parametrization" in model.by_id["0.parametrizations.weight.original"].because


def test_a_lazy_module_is_counted_when_it_has_a_shape() -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    model = read_module(module)
    assert {weight.name for weight in model.weights} == {"1.weight", "1.bias"}
    assert any("0.weight, 0.bias" in note for note in model.notes)
    module(torch.zeros(1, 5))
    assert len(read_module(module).weights) == 4
    assert read_module(module).notes == ()


def test_a_module_inside_itself_is_one_clear_line() -> None:
    module = nn.Linear(2, 2)
    module.me = module
    with pytest.raises(UnreadableModel, match="one inside itself"):
        read_module(module)


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(UnreadableModel, match="found a dict"):
        read_module({})  # type: ignore[arg-type]


def test_sparse_parameters_are_reported_not_read() -> None:
    value = torch.eye(3).to_sparse()
    module = nn.Module()
    module.register_buffer("a", value)
    module.register_buffer("b", value)
    report = scan(read_module(module))
    assert aliased(report) == {frozenset({"a", "b"})}
    assert any("layout is sparse_coo" in note for note in report.subject.model.notes)


def test_calls_of_one_module_are_counted_in_the_exported_graph_only() -> None:
    module = Universal()
    alone = scan(read_module(module))
    assert alone.subject.found.ties == ()
    assert "how often a module is called is not known" in alone.subject.model.metadata["uses"]
    traced = scan(read_module(module, torch.zeros(2, 6)))
    assert traced.subject.found.ties == ()  # the same operation three times: no second role, and no second name
    assert shared_across_depth(traced.subject.model) == (Repeated("layer", 3, ("layer.weight", "layer.bias")),)
    assert traced.subject.model.metadata["uses"] == "from torch.export with the given inputs"


def test_tracing_leaves_the_mode_of_every_module_as_it_was() -> None:
    module = Universal()
    module.layer.eval()
    read_module(module, (torch.zeros(2, 6),))
    assert (module.training, module.layer.training, module.last.training) == (True, False, True)


def test_a_module_that_cannot_be_exported_falls_back_and_says_why() -> None:
    class Moody(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    model = read_module(Moody(2, 2), (torch.zeros(1, 2),))
    assert "torch.export could not be used" in model.metadata["uses"]
    assert "not today" in model.metadata["uses"]
    assert {use.op for use in model.uses} == {"Moody"}


def test_a_transpose_on_the_way_is_part_of_the_use() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w @ self.w.T

    model = read_module(Product(), {"x": torch.zeros(2, 3)})
    assert sorted(str(use.view) for use in model.uses) == ["as stored", "transposed"]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "tieaudit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_line_scans_a_factory_and_its_prints_do_not_disturb() -> None:
    done = run("scan", "torch_modules:tied_lm", "--format", "json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["format"] == "torch_module"
    assert model["summary"]["n_parameters"] == 1026
    assert [{m["id"] for m in group["members"]} for group in model["groups"]] == [{"embed.weight", "head.weight"}]


def test_values_are_compared_across_the_process_that_holds_them() -> None:
    (tie,) = scan(load("tests.torch_modules:autoencoder")).subject.found.ties
    assert tie.origin == "measured"
    assert [str(member.view) for member in tie.members] == ["as stored", "transposed"]


def test_sample_inputs_of_a_factory_give_the_uses() -> None:
    model = load("tests.torch_modules:universal_with_inputs")
    assert model.metadata["uses"] == "from torch.export with the given inputs"
    assert shared_across_depth(model) == (Repeated("layer", 3, ("layer.weight", "layer.bias")),)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("raises", "the factory failed: ValueError: no weights to be had"),
        ("exits", "the factory failed: SystemExit: 0"),
        ("makes_text", "expected an nn.Module, or a pair of one and its sample inputs, found a str"),
        ("nothing", "has no attribute 'nothing'"),
    ],
)
def test_a_factory_that_makes_no_module_is_one_line(factory: str, said: str) -> None:
    with pytest.raises(UnreadableModel, match=re.escape(said)) as caught:
        built(f"tests.torch_modules:{factory}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_factory_that_ends_its_process_is_one_line_and_exit_2() -> None:
    done = run("scan", "torch_modules:dies", "no_such_module_anywhere:f")
    assert done.returncode == 2
    first, second = sorted(done.stderr.splitlines())
    assert "No module named 'no_such_module_anywhere'" in first
    assert "the process that ran the factory ended with exit code 3" in second


def test_a_factory_that_takes_too_long_is_ended() -> None:
    builder = Builder("tests.torch_modules:tied_lm", seconds=0.05)
    try:
        with pytest.raises(UnreadableModel, match=r"more than 0\.05 s"):
            builder.ask({"describe": "tests.torch_modules:tied_lm"})
    finally:
        builder.close()


def test_a_factory_in_the_folder_we_stand_in_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    (tmp_path / "mine.py").write_text("import torch\nmodel = torch.nn.Linear(2, 3)\n")
    done = run("scan", "mine:model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch_module · Linear" in done.stdout


def test_a_file_of_that_name_is_a_path_and_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "mine:model").write_bytes(b"nothing")
    done = run("scan", "mine:model", cwd=tmp_path)
    assert done.returncode == 2
    assert "not a model that tieaudit recognises" in done.stderr


def test_a_plan_for_a_live_module_says_how_to_do_it_and_writing_is_refused(tmp_path: Path) -> None:
    model = read_module(Autoencoder())
    made = make_plan(look(model), Choices())
    assert "do it with: tieaudit.tie(module, scheme=('dedup',)) in Python" in planned(model, made, "text")
    with pytest.raises(RewriteRefused, match="a live module is no file"):
        apply(model, made, tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_autoencoder_is_two_tensors_that_could_be_one() -> None:
    report = scan(read_module(Autoencoder()))
    assert report.summary.n_parameters == 18 + 3 + 18 + 6  # the live module has two tensors: 45, not 27
    assert measured(report) == {frozenset({"encode.weight", "decode.weight"})}
