"""`tieaudit verify package.module:f package.module:g`: both are run, forward and backward, in a child process."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import jsonschema

import tieaudit
from tieaudit.change import Proof
from tieaudit.cli import main
from tieaudit.load import load_one
from tieaudit.model import Model
from tieaudit.registry import discover
from tieaudit.runners import Runner
from tieaudit.running import opened
from tieaudit.sandbox import Sandbox
from tieaudit.strangers import compare

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("_in_this_folder")


@pytest.fixture
def _in_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@functools.cache
def loaded(name: str) -> Model:
    """The factory's process stays, so that it starts once."""
    return load_one(f"torch_modules:{name}")


def proof_of(before: str, after: str, **more: Any) -> Proof:
    return compare(loaded(before), loaded(after), device="cpu", **more)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    here = Path.cwd()
    os.chdir(HERE)  # where the child looks for torch_modules
    try:
        with Sandbox(discover("runners", Runner)["torch_module"]) as found:
            found.ask("hello")
            yield found
    finally:
        os.chdir(here)


def outcomes(proof: Proof) -> dict[str, str]:
    return {level.name: level.outcome for level in proof.levels}


def because(proof: Proof, name: str) -> str:
    return next(level.because for level in proof.levels if level.name == name)


def test_a_tied_module_and_its_untied_twin_hold_forward_and_backward() -> None:
    proof = proof_of("words_untied", "words_tied")
    assert outcomes(proof) == {
        "structural": "held", "regional": "not run", "end to end": "held", "training": "held",
    }  # fmt: skip
    assert "3 inputs (made up), 3 outputs" in because(proof, "end to end")
    # one class of two names: the tempting wrong answer is 2, one for each untied parameter
    assert because(proof, "training").startswith(
        "gradients of 1 parameter in float64, 1 of them the sum over the slots of a tie"
    )
    facts = dict(proof.facts)
    assert facts["n_bytes_stored_before"] == facts["n_bytes_resident_before"] == 2 * 40 * 6 * 4
    assert facts["n_bytes_stored_after"] == facts["n_bytes_resident_after"] == 40 * 6 * 4
    for side in ("before", "after"):
        low, high = facts[f"seconds_per_run_quartiles_{side}"]  # type: ignore[misc]
        assert 0 < low <= facts[f"seconds_per_run_{side}"] <= high  # type: ignore[operator]
    assert facts["runs_on"] and facts["torch"]


def test_other_values_fail_and_their_gradients_are_not_compared() -> None:
    proof = proof_of("words_tied", "words_shifted")
    assert outcomes(proof)["end to end"] == "failed"
    assert because(proof, "training") == "the outputs were not found equal"


def test_equal_outputs_with_another_gradient_fail_the_training_level() -> None:
    proof = proof_of("words_untied", "words_steeper")
    assert outcomes(proof)["end to end"] == "held"
    assert outcomes(proof)["training"] == "failed"
    assert "embed.weight: another gradient" in because(proof, "training")


def test_a_slot_that_learns_nothing_is_named_where_a_sum_would_prove_nothing() -> None:
    proof = proof_of("words_cut_off_untied", "words_cut_off")
    assert outcomes(proof)["training"] == "held"
    assert "nothing is learnt through head.weight, so that the sum of embed.weight proves nothing" in because(
        proof, "training"
    )


def test_inputs_that_the_factory_gives_are_used_first() -> None:
    proof = proof_of("words_with_inputs", "words_tied", gradients=False)
    assert outcomes(proof) == {"structural": "held", "regional": "not run", "end to end": "held"}
    assert "(its own sample inputs, made up)" in because(proof, "end to end")


def test_inputs_that_nobody_can_guess_are_asked_for_and_used_when_they_are_given() -> None:
    proof = proof_of("unguessable", "unguessable")
    assert outcomes(proof)["end to end"] == "not run"
    assert "no inputs could be made up for forward(batch)" in because(proof, "end to end")
    assert "let the factory return (module, sample inputs), or give inputs" in because(proof, "end to end")
    numbered = proof_of("words_tied", "words_untied", inputs={"arr_0": np.array([[7, 8]])}, gradients=False)
    assert outcomes(numbered)["end to end"] == "held"
    assert "1 input (the given inputs)" in because(numbered, "end to end")


def test_an_operation_without_a_deterministic_version_is_run_and_named() -> None:
    proof = proof_of("unpools", "unpools", gradients=False)
    assert outcomes(proof)["end to end"] == "held"
    assert proof.facts["not_deterministic"] == ["max_unpooling2d_forward_out"]


def test_a_module_that_ends_the_process_is_a_level_that_did_not_run() -> None:
    proof = proof_of("leaves_while_running", "leaves_while_running")
    assert outcomes(proof)["end to end"] == "not run"
    assert "exit code 5" in because(proof, "end to end")


def test_a_folder_and_a_factory_of_its_class_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "folder")
    (tmp_path / "mine.py").write_text(
        "import transformers\n"
        f"def make(): return transformers.GPT2LMHeadModel.from_pretrained({str(tmp_path / 'folder')!r})\n"
    )
    monkeypatch.chdir(tmp_path)
    folder = load_one(tmp_path / "folder")
    proof = compare(folder, load_one("mine:make"), device="cpu", gradients=True)
    assert outcomes(proof)["end to end"] == "held"
    assert because(proof, "training").startswith("gradients are compared between two live modules or two folders")
    both = compare(folder, folder, device="cpu", gradients=True)
    assert outcomes(both)["training"] == "held"


def test_the_command_prints_it_in_text_and_in_json_of_its_schema(tmp_path: Path) -> None:
    names = ["torch_modules:words_untied", "torch_modules:words_tied"]
    found = CliRunner().invoke(main, ["verify", *names, "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert "training    held on CPU" in found.output
    assert "time per run on " in found.output and "(middle half of " in found.output
    assert "no measurable difference" in found.output or " → " in found.output.split("time per run")[1]
    np.savez(tmp_path / "x.npz", words=np.array([[1, 2]]))
    wrong = [names[0], "torch_modules:words_steeper", "--inputs", str(tmp_path / "x.npz"), "--device", "cpu"]
    found = CliRunner().invoke(main, ["verify", *wrong, "--format", "json"])
    assert found.exit_code == 1, found.output
    said = json.loads(found.stdout)
    schema = json.loads((ROOT / "docs" / "schema" / "verify-1.schema.json").read_text())
    jsonschema.validate(said, schema)
    assert set(schema["$defs"]["Proof"]["properties"]["facts"]["properties"]) >= set(said["proof"]["facts"])


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("words_tied", [("words", "int64", ("batch", "sequence"))]),
        ("tied_lm", [("words", "int64", ("batch", "sequence"))]),
        ("autoencoder", [("x", "float32", ("batch", 6))]),
        ("unguessable_with_inputs", [("batch.x", "float32", (2, 3))]),
    ],
)
def test_what_a_module_takes_is_found_by_its_layers_or_its_sample(box: Sandbox, name: str, ports: list[Any]) -> None:
    with opened(box, f"torch_modules:{name}") as one:
        assert [(port.name, port.dtype, port.dims) for port in one.signature.inputs] == ports


def test_live_modules_say_what_they_cost_and_whether_they_learn_the_same() -> None:
    import torch
    from torch_modules import CutOff, Words

    torch.manual_seed(0)
    tied = Words()
    apart = Words(tied=False)
    apart.load_state_dict(tied.state_dict())
    words = torch.tensor([[1, 2, 3]])
    proof = tieaudit.verify(apart, tied, inputs=words, gradients=True)
    assert outcomes(proof) == {
        "structural": "held", "regional": "not run", "end to end": "held", "training": "held",
    }  # fmt: skip
    assert proof.facts["n_bytes_resident_before"] == 2 * proof.facts["n_bytes_resident_after"]  # type: ignore[operator]
    cut = CutOff(tied=False)
    cut.load_state_dict(tied.state_dict())
    proof = tieaudit.verify(cut, cut, inputs=words, gradients=True)
    assert outcomes(proof)["training"] == "held"
    assert not torch.are_deterministic_algorithms_enabled()
