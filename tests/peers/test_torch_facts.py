"""What PyTorch itself does with ties, each time run here, and what tieaudit says of the outcome.

FACT-1_9: torch 2.13, its exporters, and onnxscript's deduplication; PT: pytorch/pytorch. See docs/peer-cases.md.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import IDS, LM, codes, groups, of, outcomes, report, saved, views  # noqa: E402

NAMES = ("emb.weight", "head.weight")
TABLE_BYTES = 40 * 16 * 4


# torch copies its own deprecated tree specs when a loaded program is copied
copies_programs = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


def exported(module: nn.Module) -> Any:
    return torch.export.export(module.eval(), (IDS,))


@pytest.fixture(scope="module")
def archive() -> bytes:
    """A tied program as torch.export.save writes it."""
    file = io.BytesIO()
    torch.export.save(exported(LM()), file)
    return file.getvalue()


def test_FACT_1_9a_an_exported_program_lists_both_names_and_its_module_is_still_one_tensor() -> None:
    program = exported(LM())
    listed = [spec.target for spec in program.graph_signature.input_specs if spec.kind.name == "PARAMETER"]
    assert sorted(listed) == sorted(NAMES)  # whoever counts them counts the table twice
    assert groups(program.module()) == [NAMES]
    assert report(program.module()).summary.n_parameters == 640


@copies_programs
def test_FACT_1_9b_an_archive_stores_one_blob_and_its_module_has_two_parameters_over_it(archive: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        (path,) = (name for name in opened.namelist() if name.endswith("model_weights_config.json"))
        config = json.loads(opened.read(path))["config"]
    assert {config[name]["path_name"] for name in NAMES} == {"weight_0"}
    back = torch.export.load(io.BytesIO(archive)).module()
    assert back.emb.weight is not back.head.weight
    assert groups(back) == [NAMES]
    assert report(back).summary.n_bytes == TABLE_BYTES
    assert tieaudit.gradients(back, IDS).updated_twice == (NAMES,)
    tieaudit.tie(back)
    assert back.emb.weight is back.head.weight
    assert tieaudit.gradients(back, IDS).held
    assert tieaudit.verify(back, back, inputs=IDS).failed == ()


def test_FACT_1_9b_the_archive_itself_says_that_it_is_one_tensor(tmp_path: Path, archive: bytes) -> None:
    pytest.importorskip("tieaudit.formats.torch_export")
    path = tmp_path / "m.pt2"
    path.write_bytes(archive)
    assert groups(path) == [NAMES]
    summary = report(path).summary
    assert (summary.n_parameters, summary.n_bytes) == (640, TABLE_BYTES)
    apart = LM(tied=False)
    with torch.no_grad():
        apart.head.weight.copy_(apart.emb.weight)
    torch.export.save(exported(apart), tmp_path / "apart.pt2")
    assert groups(tmp_path / "apart.pt2") == []
    assert groups(tmp_path / "apart.pt2", "measured") == [NAMES]
    assert report(tmp_path / "apart.pt2").summary.n_bytes_duplicate == TABLE_BYTES


@copies_programs
def test_FACT_1_9c_unflattened_the_names_are_one_parameter_again(archive: bytes) -> None:
    module = torch.export.unflatten(torch.export.load(io.BytesIO(archive)))
    assert module.emb.weight is module.head.weight
    assert groups(module) == [NAMES]
    assert report(module).summary.n_parameters == 640


@pytest.mark.parametrize("cloned", [False, True])
def test_FACT_1_9d_loading_with_assign_unties_objects_and_of_copies_the_memory_too(cloned: bool) -> None:
    state = {name: one.clone() if cloned else one for name, one in LM().state_dict().items()}
    module = LM()
    module.load_state_dict(state, assign=True)
    assert module.emb.weight is not module.head.weight
    assert groups(module) == ([] if cloned else [NAMES])
    assert groups(module, "measured") == ([NAMES] if cloned else [])
    assert report(module).summary.n_bytes == TABLE_BYTES * (2 if cloned else 1)
    how = "copies" if cloned else "state"
    assert outcomes(LM(), f"load_state_dict({how}, assign=True)") == ["lost"]
    tieaudit.tie(module)
    assert module.emb.weight is module.head.weight


def test_FACT_1_9e_memory_given_to_a_module_on_the_meta_device_is_given_twice() -> None:
    with torch.device("meta"):
        module = LM()
    assert groups(module) == [NAMES]
    module.to_empty(device="cpu")
    assert groups(module) == []
    assert report(module).summary.n_bytes == 2 * TABLE_BYTES
    assert outcomes(LM(), "module.to_empty() from meta") == ["lost"]


def test_FACT_1_9f_a_checkpoint_keeps_aliases_and_transposed_ones_and_clones_lose_them(tmp_path: Path) -> None:
    table = torch.randn(40, 16)
    state = {"emb.weight": table, "head.weight": table, "decode.weight": table.T}
    path = saved(tmp_path / "m.pt", state)
    assert views(path) == [[("emb.weight", "as stored"), ("head.weight", "as stored"), ("decode.weight", "transposed")]]
    assert report(path).summary.n_bytes == TABLE_BYTES
    copies = saved(tmp_path / "copies.pt", {name: one.clone() for name, one in state.items()})
    assert groups(copies) == []
    assert [set(group) for group in groups(copies, "measured")] == [set(state)]
    assert report(copies).summary.n_bytes_duplicate == 2 * TABLE_BYTES


def onnx_file(module: nn.Module, path: Path, *, dynamo: bool) -> Path:
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"external_data": False} if dynamo else {}
        torch.onnx.export(module.eval(), (IDS,), path, dynamo=dynamo, verbose=False, **more)
    return path


def test_PT_2_FACT_1_9g_the_torchscript_exporter_folds_the_transpose_and_loses_the_tie(tmp_path: Path) -> None:
    """deduplicate_initializers.cpp runs after constant folding, which has made Wᵀ of the head: 279 KB for 153 KB."""
    path = onnx_file(LM(512, 64, hidden=True), tmp_path / "m.onnx", dynamo=False)
    (tie,) = (tie for tie in report(path).subject.found.ties if tie.origin == "measured")
    folded = next(name for name in tie.ids if name != "emb.weight")
    assert folded.startswith("onnx::MatMul_")
    assert [(one.id, str(one.view)) for one in tie.members] == [("emb.weight", "as stored"), (folded, "transposed")]
    assert tie.n_bytes_saved == 512 * 64 * 4
    assert codes(path) == ["TIE202"]
    assert report(path).summary.n_parameters == 36_928  # not 69,696
    tieaudit.apply(path, to=tmp_path / "tied.onnx")
    saved_bytes = path.stat().st_size - (tmp_path / "tied.onnx").stat().st_size
    assert 0.99 < saved_bytes / (512 * 64 * 4) < 1.0  # a few new nodes


def test_FACT_1_9h_the_dynamo_exporter_keeps_one_initializer_behind_a_transpose(tmp_path: Path) -> None:
    path = onnx_file(LM(512, 64, hidden=True), tmp_path / "m.onnx", dynamo=True)
    (tie,) = report(path).subject.found.ties
    assert (tie.origin, len(tie.ids)) == ("aliased", 1)
    assert [str(one.view) for one in tie.members] == ["as stored", "transposed"]
    assert codes(path) == ["TIE301"]  # kept in the file, and folded into a second copy by the runtime
    assert report(path).summary.n_parameters == 36_928


def test_FACT_1_9i_a_copy_above_the_limit_of_onnxscript_stays_and_is_found_transposed(tmp_path: Path) -> None:
    """DeduplicateInitializersPass leaves what has more than 1,024 elements; optimising folds the transpose first."""
    ir = pytest.importorskip("onnx_ir")
    from onnx_ir.passes.common import DeduplicateInitializersPass

    module = LM(512, 64, hidden=True)
    tieaudit.untie(module)
    path = onnx_file(module, tmp_path / "m.onnx", dynamo=True)
    loaded = ir.load(path)
    ir.save(DeduplicateInitializersPass()(loaded).model, tmp_path / "again.onnx")
    for one in (path, tmp_path / "again.onnx"):
        ((name, _), (_, view)) = views(one, "measured")[0]
        assert (name, view) == ("emb.weight", "transposed")
        assert report(one).summary.n_bytes_duplicate == 512 * 64 * 4
        assert codes(one) == ["TIE202"]


def test_FACT_1_9j_the_table_of_survival_says_all_of_this_of_one_module() -> None:
    expected = {
        "load_state_dict(state)": "kept",
        "load_state_dict(state, assign=True)": "lost",
        "load_state_dict(copies, assign=True)": "lost",
        "module.to_empty() from meta": "lost",
        "torch.save(state_dict), torch.load": "kept",
        "torch.save(cloned state_dict), torch.load": "lost",
    }
    assert dict(zip(expected, outcomes(LM(), *expected, inputs=(IDS,)), strict=True)) == expected


def test_PT_3_parameters_of_one_value_are_one_class_whatever_device_they_name() -> None:
    module = of(a=nn.Parameter(torch.ones(4, 4) * torch.arange(4.0)), b=None)
    module.b = nn.Parameter(module.a.detach().clone())
    module.c = nn.Parameter(torch.empty(4, 4, device="meta"))  # a device without values is compared with nothing
    assert groups(module, "measured") == [("a", "b")]
    assert any("c has no values to compare" in note for note in report(module).subject.model.notes)
