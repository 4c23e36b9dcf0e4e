"""Which everyday operations break ties: the libraries' own behaviour, on small modules and on counterexamples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import TiedLM, Twice, Universal  # noqa: E402
from tieaudit.errors import UsageError  # noqa: E402
from tieaudit.survival import operations  # noqa: E402
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
    assert all(one.remedy for one in operations())


def test_onnx_export_and_the_runtime_are_told_apart() -> None:
    """12,000 elements: above the size up to which the exporter folds a Transpose away itself, so the file is tied."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    table = tieaudit.survival(TiedLM(750, 16), inputs=WORDS, only=EXPORTS)
    assert [row.outcome for row in table.rows] == ["kept", "lost"]
    assert table.rows[1].because == "embed.weight is stored 2 times (1 of 1 tied matrices)"


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
    (row,) = tieaudit.survival(TiedLM(), only=EXPORTS[:1]).rows
    assert (row.outcome, row.remedy) == ("not run", "")
    assert "sample inputs are needed" in row.because


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
    assert found["schema"] == "tieaudit/survival/1"
    assert found["ties"] == [["embed.weight", "head.weight"]]
    rows = {row["operation"]: row for row in found["rows"]}
    assert rows["module.to_empty() from meta"]["outcome"] == "lost"
    assert {(rows[name]["outcome"], rows[name]["because"]) for name in SLOW} == {
        ("kept", "1 of 1 ties; after one step")
    }
    # 400 elements: so small a Transpose is folded by the exporter itself, and the file holds the matrix twice
    assert rows["torch.onnx.export(dynamo=True)"]["outcome"] == "lost"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("torch_modules:dies",), "ended with exit code 3"),
        (("torch_modules:raises",), "the factory failed: ValueError: no weights to be had"),
        (("model.onnx",), "--survival expects one live module"),
    ],
)
def test_a_survival_that_cannot_run_is_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments, "--survival")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_the_page_shows_every_operation_and_every_public_function() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert [one.name for one in operations() if f"\n{one.name}  " not in page] == []
    functions = [name for name in tieaudit.__all__ if name != "TieAuditError"]
    assert [name for name in functions if f"`{name}(" not in page] == []
    assert f"which of {len(operations())} everyday operations" in (ROOT / "CHANGELOG.md").read_text()
