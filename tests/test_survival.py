"""Which everyday operations break ties: the libraries' own behaviour, on small modules and on counterexamples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests import survival_modules as some  # noqa: E402
from tests.torch_modules import TiedLM, Twice, Universal  # noqa: E402
from tieaudit.errors import UsageError  # noqa: E402
from tieaudit.outcome import survived  # noqa: E402
from tieaudit.survival import chosen, operations  # noqa: E402
from tieaudit.survival import survival as try_all  # noqa: E402
from tieaudit.survival.apart import survival_of  # noqa: E402
from tieaudit.survival.ties import Trial, tied_names  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
SLOW = ("DistributedDataParallel (gloo, 2 processes)", "fully_shard, FSDP2 (gloo, 2 processes)")
EXPORTS = ("torch.onnx.export(dynamo=True)", "… and ONNX Runtime's optimisation")
EXPECTED = {
    "copy.deepcopy(module)": "kept",
    "module.to(dtype)": "kept",
    "module.to(dtype), overwriting parameters": "lost",
    "module.to('meta')": "lost",
    "module.to_empty() from meta": "lost",  # facts.md 1.9
    "load_state_dict(state)": "kept",
    "load_state_dict(state, assign=True)": "lost",  # one memory, two Parameter objects: pytorch#188346
    "load_state_dict(copies, assign=True)": "lost",
    "torch.save(state_dict), torch.load": "kept",
    "torch.save(cloned state_dict), torch.load": "lost",
    "torch.save(module), torch.load": "kept",
    "safetensors save_file(state_dict)": "error",  # "Some tensors share memory"
    "safetensors save_file(cloned state_dict)": "lost",
    "safetensors save_model, load_model": "kept",
    "save_pretrained, from_pretrained": "not run",
    "torch.export, its state dict": "kept",
    "torch.export, save, load, .module()": "lost",
}


def test_what_torch_2_does_to_a_tied_head() -> None:
    module = TiedLM()
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    table = tieaudit.survival(module, inputs=WORDS, only=tuple(EXPECTED))
    assert {row.operation: row.outcome for row in table.rows} == EXPECTED
    assert all(bool(row.remedy) == (row.outcome in ("lost", "error")) for row in table.rows)
    assert "separate Parameter objects" in next(r for r in table.rows if "assign=True" in r.operation).because
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())  # nothing was touched
    assert module.head.weight is module.embed.weight
    assert str(table).splitlines()[0] == "embed.weight = head.weight"


def test_the_table_names_every_operation_of_the_issue() -> None:
    names = {one.name for one in operations()}
    assert names == {*EXPECTED, *SLOW, *EXPORTS, "module.to('cuda')"}
    assert all(one.remedy and one.on_error for one in operations())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_table_has_no_row_for_it() -> None:
    assert "module.to('cuda')" not in [one.name for one in chosen(None)]
    (row,) = tieaudit.survival(TiedLM(), only=("module.to('cuda')",)).rows
    assert (row.outcome, row.because) == ("not run", "no CUDA device here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_tie_survives_the_move_to_a_gpu() -> None:
    assert "module.to('cuda')" in [one.name for one in chosen(None)]
    (row,) = tieaudit.survival(TiedLM(), only=("module.to('cuda')",)).rows
    assert row.outcome == "kept"


def test_onnx_export_and_the_runtime_are_told_apart() -> None:
    """12,000 elements: above the size up to which the exporter folds a Transpose away itself, so the file is tied."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    table = tieaudit.survival(TiedLM(750, 16), inputs=WORDS, only=EXPORTS)
    assert [row.outcome for row in table.rows] == ["kept", "lost"]
    assert table.rows[1].because == "embed.weight is stored 2 times (1 of 1 tie lost)"


def test_a_class_of_transformers_goes_through_its_own_folder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=60, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    table = tieaudit.survival(transformers.GPT2LMHeadModel(config), only=("save_pretrained, from_pretrained",))
    assert [row.outcome for row in table.rows] == ["kept"]


def test_a_tie_that_the_class_does_not_declare_is_lost_in_its_folder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=60, n_positions=60, n_embd=8, n_layer=1, n_head=2)
    module = transformers.GPT2LMHeadModel(config)
    module.transformer.wpe.weight = module.transformer.wte.weight
    (row,) = tieaudit.survival(module, only=("save_pretrained, from_pretrained",)).rows
    assert row.outcome in ("lost", "error")
    assert "_tied_weights_keys" in row.remedy


def test_a_class_of_main_cannot_travel_to_other_processes() -> None:
    class Local(TiedLM):
        pass

    Local.__module__ = "__main__"
    (row,) = tieaudit.survival(Local(), only=SLOW[:1]).rows
    assert row.outcome == "not run"
    assert "__main__" in row.because


def test_exports_without_inputs_are_not_run_and_say_why() -> None:
    class Asks(TiedLM):
        def forward(self, words: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward(words["of this text"])

    (row,) = tieaudit.survival(Asks(), only=EXPORTS[:1]).rows
    assert (row.outcome, row.remedy) == ("not run", "")
    assert "sample inputs are needed" in row.because


def test_exports_are_tried_on_made_up_inputs_where_none_are_given() -> None:
    (row,) = tieaudit.survival(TiedLM(), only=("torch.export, its state dict",)).rows
    assert row.outcome == "kept"


def test_what_a_library_raises_is_one_row() -> None:
    class Stubborn(TiedLM):
        def __deepcopy__(self, memo: object) -> TiedLM:
            raise RuntimeError("no copies\nof me")

    (row,) = tieaudit.survival(Stubborn(), only=("copy.deepcopy(module)",)).rows
    assert (row.outcome, row.because) == ("error", "RuntimeError: no copies of me")


def test_a_copy_has_the_very_same_ties_also_where_deepcopy_loses_them(tmp_path: Path) -> None:
    module = nn.Module()
    value = torch.randn(4, 6)
    module.a, module.b, module.c = nn.Parameter(value), nn.Parameter(value.T), nn.Parameter(value)
    (tie,) = tied_names(module)
    assert (tie.names, tie.one_object, tie.identical) == (("a", "b", "c"), False, False)
    twin = Trial(module, None, (tie,), tmp_path).twin()
    assert tied_names(twin) == (tie,)
    assert twin.a.data_ptr() != module.a.data_ptr()
    (row,) = tieaudit.survival(module, only=("copy.deepcopy(module)",)).rows
    assert row.outcome == "lost"


MEMORY = tuple(name for name in EXPECTED if not name.startswith(("torch.export", "save_pretrained")))


def outcomes(module: nn.Module, inputs: object = None, only: tuple[str, ...] = MEMORY) -> dict[str, str]:
    return {row.operation: row.outcome for row in tieaudit.survival(module, inputs=inputs, only=only).rows}


def test_a_tie_through_a_parametrization_survives_as_any_other_but_its_module_is_no_pickle() -> None:
    module, inputs = some.transposed()
    only = (*MEMORY, *SLOW)
    expected = {name: EXPECTED[name] for name in MEMORY} | dict.fromkeys(SLOW, "kept")
    assert outcomes(module, inputs, only) == {**expected, "torch.save(module), torch.load": "error"}


def test_two_buffers_of_one_memory_need_not_be_one_object() -> None:
    """But every conversion of a module converts each buffer by itself."""
    found = outcomes(some.Buffers())
    assert found["load_state_dict(state, assign=True)"] == "kept"
    assert found["module.to(dtype)"] == "lost"
    assert found["copy.deepcopy(module)"] == "kept"


def test_buffers_are_not_sharded_and_a_tie_of_them_is_not_called_kept() -> None:
    (row,) = tieaudit.survival(some.Buffers(), inputs=(torch.zeros(1, 40),), only=SLOW[1:]).rows
    assert (row.outcome, row.because) == ("not run", "no tie of parameters: buffers are not sharded")


@pytest.mark.parametrize("kind", [some.ThreeWay, some.Cells, some.Complex, some.NoCopy, some.Custom])
def test_the_kind_of_module_changes_nothing_about_what_torch_does(kind: type[nn.Module]) -> None:
    expected = {name: EXPECTED[name] for name in MEMORY}
    if kind is some.NoCopy:  # that is an error of deepcopy alone: the other operations get a copy through a pickle
        expected["copy.deepcopy(module)"] = "error"
    assert outcomes(kind()) == expected


def test_slices_of_one_tensor_are_ties_that_can_be_lost() -> None:
    table = tieaudit.survival(some.Slices(), only=("copy.deepcopy(module)", "torch.save(state_dict), torch.load"))
    assert table.ties == (("full", "turned"), ("full", "turned", "part"))
    assert [(row.outcome, row.because) for row in table.rows] == [
        ("lost", "full and turned are separate tensors now (2 of 2 ties lost)"),
        ("kept", "2 of 2 ties"),
    ]


def test_columns_that_lie_between_each_other_are_no_tie() -> None:
    with pytest.raises(UsageError, match="no tie can break"):
        tieaudit.survival(some.Columns())


def test_a_type_that_the_module_has_already_is_no_conversion() -> None:
    module = TiedLM().double()
    assert outcomes(module, only=("module.to(dtype), overwriting parameters",)) == {
        "module.to(dtype), overwriting parameters": "lost"
    }


def test_a_module_that_can_be_neither_copied_nor_pickled_is_not_called_an_error_of_every_operation() -> None:
    only = ("copy.deepcopy(module)", "load_state_dict(state)", SLOW[0])
    table = tieaudit.survival(some.NoCopyAtAll(), only=only)
    assert [row.outcome for row in table.rows] == ["error", "not run", "not run"]
    assert "no copy of this module can be made to try it on: RuntimeError: no copies of me" in table.rows[1].because


def test_values_that_the_exporter_rearranges_are_told_by_the_size_of_the_file() -> None:
    """ONNX has the gates of an LSTM in another order, so no tensor of the file holds what the module holds."""
    pytest.importorskip("onnxscript")
    module = some.Cells()
    table = tieaudit.survival(module, inputs=(torch.zeros(2, 1, 30),), only=EXPORTS[:1])
    # one matrix of 120 x 30 float32 is shared: 14,400 bytes, which the file of the tied module stores twice as well
    assert [row.outcome for row in table.rows] == ["lost"]
    assert table.rows[0].because.startswith("rearranged; 14.4 kB are shared, and 0 B less")


def test_a_module_that_takes_inputs_of_its_own_kind_is_exported_with_them() -> None:
    pytest.importorskip("onnxscript")
    inputs = {"batch": {"ids": WORDS}, "scale": {"by": torch.tensor(2.0)}}
    found = outcomes(some.Custom(), inputs, ("torch.export, its state dict", EXPORTS[0]))
    assert found == {"torch.export, its state dict": "kept", EXPORTS[0]: "lost"}


def test_an_operation_that_takes_too_long_is_one_row() -> None:
    only = ("torch.export, its state dict", "copy.deepcopy(module)")
    table = try_all(some.Sleeps(), (WORDS,), only=only, seconds=1.0)
    assert [row.outcome for row in table.rows] == ["error", "kept"]
    assert table.rows[0].because.endswith("it did not finish within 1 s")


def test_a_module_that_asks_for_the_end_of_the_program_is_one_row() -> None:
    only = ("torch.export, its state dict", SLOW[0])
    table = tieaudit.survival(some.Exits(), inputs=(WORDS,), only=only)
    assert [(row.outcome, row.because) for row in table.rows] == [("error", "SystemExit: 7")] * 2


def test_a_module_that_prints_much_does_not_hold_up_the_processes_that_are_joined() -> None:
    assert outcomes(some.Babbles(), (WORDS,), SLOW[:1]) == {SLOW[0]: "kept"}


def test_a_scripted_module_is_looked_at_like_any_other() -> None:
    scripted = torch.jit.script(nn.Sequential(*some.Pair().children()))
    assert outcomes(scripted, only=("copy.deepcopy(module)",)) == {"copy.deepcopy(module)": "kept"}


TRIED_APART = ("copy.deepcopy(module)", "torch.export, its state dict", "load_state_dict(state)")


def test_an_operation_that_ends_its_process_is_one_row_and_the_next_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A crash in a library looks the same: the process is gone, and with it the module."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    table = survival_of("survival_modules:dies", only=TRIED_APART)
    assert [(row.operation, row.outcome) for row in table.rows] == [
        (TRIED_APART[0], "kept"),
        (TRIED_APART[1], "error"),
        (TRIED_APART[2], "kept"),
    ]
    assert "ended with exit code 7" in table.rows[1].because
    assert "the exporter" in table.rows[1].remedy


def test_an_operation_that_holds_its_process_up_is_one_row_and_the_next_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The child would interrupt itself after 30 s; what cannot be interrupted is killed, here after one second."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setattr(sys.modules[survival_of.__module__], "GRACE_SECONDS", -29.0)
    table = survival_of("survival_modules:sleeps", only=TRIED_APART, seconds=30.0)
    assert [row.outcome for row in table.rows] == ["kept", "error", "kept"]
    assert table.rows[1].because == "it did not finish within 30 s"


def test_shared_modules_count_their_buffers_and_lose_some() -> None:
    table = tieaudit.survival(Twice(), only=("copy.deepcopy(module)", "load_state_dict(copies, assign=True)"))
    assert len(table.ties) == 7  # weight and bias of both layers, running mean and variance, the count of batches
    assert [row.outcome for row in table.rows] == ["kept", "kept"]  # one module object: the last value wins, for both


def test_a_module_without_ties_and_an_unknown_operation_are_clear_errors() -> None:
    with pytest.raises(UsageError, match="no tie can break"):
        tieaudit.survival(Universal())
    with pytest.raises(UsageError, match="no operation is called 'teleport'"):
        tieaudit.survival(TiedLM(), only=("teleport",))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "tieaudit", "verify", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


def test_the_command_line_prints_the_table_of_a_factory() -> None:
    done = run("torch_modules:tied_lm_with_inputs", "--survival", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, json.loads((ROOT / "docs" / "schema" / "survival-1.schema.json").read_text()))
    assert found["schema"] == "tieaudit/survival/1"
    assert found["ties"] == [["embed.weight", "head.weight"]]
    rows = {row["operation"]: row for row in found["rows"]}
    assert rows["module.to_empty() from meta"]["outcome"] == "lost"
    assert {(rows[name]["outcome"], rows[name]["because"]) for name in SLOW} == {("kept", "1 of 1 tie; after one step")}
    # 400 elements: so small a Transpose is folded by the exporter itself, and the file holds the matrix twice
    assert rows["torch.onnx.export(dynamo=True)"]["outcome"] == "lost"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("torch_modules:dies",), "ended with exit code 3"),
        (("torch_modules:raises",), "the factory failed: ValueError: no weights to be had"),
        (("model.onnx",), "--survival expects one live module"),
        (("survival_modules:untied",), "no tensor of this module has several names, so no tie can break"),
    ],
)
def test_a_survival_that_cannot_run_is_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments, "--survival")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_the_text_of_the_table_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    """Without sample inputs, and without the error of safetensors, which names a set in any order."""
    only = [name for name in (*EXPECTED, *EXPORTS) if name != "safetensors save_file(state_dict)"]
    table = tieaudit.survival(some.NoCopy(), only=tuple(only))
    shown = survived("my_models:make", table, "text")
    golden("survival.txt", shown)
    for outcome in ("kept", "lost", "error", "not run"):
        assert f"{[row.outcome for row in table.rows].count(outcome)} {outcome}" in shown.splitlines()[-1]


def test_the_page_shows_every_operation_and_every_public_function() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert [one.name for one in operations() if f"\n{one.name}  " not in page] == []
    functions = [name for name in tieaudit.__all__ if name != "TieAuditError"]
    assert [name for name in functions if f"`{name}(" not in page] == []
    assert f"which of {len(operations())} everyday operations" in (ROOT / "CHANGELOG.md").read_text()
