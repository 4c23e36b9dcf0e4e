"""The help of every command: how it ends, that its examples work, and what a shell completes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from tieaudit.audit import rules
from tieaudit.cli import main as cli
from tieaudit.console import Command
from tieaudit.explain import index

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["", *sorted(cli.commands)]
SHELLS = ("bash", "zsh", "fish")


def help_of(name: str) -> str:
    return CliRunner().invoke(cli, [name, "--help"] if name else ["--help"], terminal_width=200).output


def examples(name: str) -> list[str]:
    return [line.strip() for line in help_of(name).partition("Examples:\n")[2].splitlines() if line.strip()]


EXAMPLES = [(name, line) for name in NAMES for line in examples(name)]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_ends_with_at_least_two_examples_of_it(name: str) -> None:
    lines = examples(name)
    assert len(lines) >= 2
    assert all(line.startswith(f"tieaudit {name}".rstrip() + " ") or line == f"tieaudit {name}" for line in lines)


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_an_example_has_no_option_and_no_choice_that_is_not_there(name: str, line: str) -> None:
    words = shlex.split(line)[1:]
    top = cli.make_context("tieaudit", list(words))
    command = cli.commands[words[0]]
    assert isinstance(command, Command)
    given = command.make_context(words[0], words[1:], parent=top).params
    for scheme in given.get("schemes") or ():
        assert f"  {scheme}: " in index()


@pytest.fixture
def here(tmp_path: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has what the examples name."""
    torch = pytest.importorskip("torch")
    built = fixtures_dir / "gpt_decoder"
    shutil.copy(built / "lost.onnx", tmp_path / "model.onnx")
    shutil.copytree(built / "hf_lost", tmp_path / "my-model-folder")
    (tmp_path / "models").mkdir()
    shutil.copy(built / "tied.onnx", tmp_path / "models" / "one.onnx")
    values = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    for name in ("before.safetensors", "after.safetensors"):
        save_file({"wte.weight": values, "lm_head.weight": values}, tmp_path / name)
    table = torch.from_numpy(values)
    state = {"wte.weight": table, "lm_head.weight": table}
    torch.save(state, tmp_path / "model.pt")
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = {
    "": None,
    "apply": "tieaudit apply model",
    "check": None,
    "diff": None,
    "explain": None,
    "lock": None,
    "plan": "tieaudit plan model.onnx",
    "scan": None,
    "verify": "tieaudit verify model.onnx",
}
"""Command → how those of its examples begin that are run; None for all. The others need a text, a tokenizer or a
package of models, and are run under other names by the tests of calibration, conversion and live modules."""


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_command_work(name: str, here: Path) -> None:
    if name == "verify":
        assert CliRunner().invoke(cli, shlex.split(examples("apply")[0])[1:]).exit_code == 0
    chosen = [line for line in examples(name) if line.startswith(RUN[name] or "") and "--calibrate" not in line]
    assert chosen
    for line in chosen:
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code in (0, 1), f"{line}\n{done.output}"  # 1: what is lost is found


# --- completion ---


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_of_each_shell_is_written_and_documented(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tieaudit"],
        env={**os.environ, "_TIEAUDIT_COMPLETE": f"{name}_source"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0
    assert f"_TIEAUDIT_COMPLETE={name}_complete" in done.stdout
    assert f"_TIEAUDIT_COMPLETE={name}_source tieaudit" in (ROOT / "docs" / "cli.md").read_text()


def completed(*words: str) -> list[str]:
    """What is offered for the last word."""
    from click.shell_completion import BashComplete

    found = BashComplete(cli, {}, "tieaudit", "_TIEAUDIT_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [one.value for one in found]


def test_commands_options_formats_rules_and_schemes_are_completed() -> None:
    assert completed("ch") == ["check"]
    assert completed("check", "--stat") == ["--statistics"]
    assert completed("check", "--format", "sa") == ["sarif"]
    assert completed("check", "--select", "tie20") == [code for code in rules() if code.startswith("TIE20")]
    assert completed("plan", "x.onnx", "--scheme", "ded") == ["dedup"]
    assert completed("plan", "x.onnx", "--merge", "norm") == ["norm-matched"]
    assert completed("explain", "broken") == ["broken-tie"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_command_after_the_line_of_the_documentation(tmp_path: Path) -> None:
    program = tmp_path / "tieaudit"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tieaudit "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_TIEAUDIT_COMPLETE=bash_source tieaudit)"\n'
        "COMP_WORDS=(tieaudit verif) COMP_CWORD=1\n"
        '_tieaudit_completion tieaudit\necho "${COMPREPLY[@]}"'
    )
    assert script.splitlines()[0] in (ROOT / "docs" / "cli.md").read_text()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["verify"], done.stderr


# --- a word that is nearly right ---


@pytest.mark.parametrize(
    ("words", "question"),
    [
        (["chek"], "check"),
        (["check", "--select", "TIE10l"], "TIE10"),
        (["check", "--select", "broken-ties"], "broken-tie"),
        (["check", "--expect", "three-ways"], "three-way"),
        (["check", "--format", "sarf"], "sarif"),
        (["check", "--report", "gitlub=x"], "gitlab"),
        (["check", "--statistic-s"], "--statistics"),
        (["explain", "TIE10l"], "TIE10"),
        (["explain", "dedupe"], "dedup"),
        (["plan", "model.onnx", "--scheme", "dedupp"], "dedup"),
        (["plan", "model.onnx", "--merge", "meen"], "mean"),
        (["plan", "model.onnx", "--device", "cud"], "cuda"),
    ],
)
def test_the_nearest_word_is_named(words: list[str], question: str, here: Path) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert question.lower() in done.output.lower().partition("did you mean")[2]


def test_of_a_misspelt_weight_that_is_to_be_kept_the_nearest_is_named(fixtures_dir: Path) -> None:
    path = str(fixtures_dir / "gpt_decoder" / "hf_untied")
    words = ["plan", path, "--scheme", "io", "--allow-lossy", "--merge", "keep:transformer.wte.weigt"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert "did you mean transformer.wte.weight?" in done.output


@pytest.mark.parametrize("name", ["plan", "apply"])
def test_a_weight_that_is_to_be_kept_must_be_there_also_where_nothing_is_lossy(name: str, here: Path) -> None:
    for argument, hint in (("heed", "did you mean head?"), ("xyzzyx", "keep:head, keep:embedding"), ("", "keep:head")):
        done = CliRunner().invoke(cli, [name, "model.onnx", "--merge", f"keep:{argument}"])
        assert done.exit_code == 2
        assert f"error: --merge keep{':' if argument else ''}{argument}: " in done.output
        assert hint in done.output
    assert CliRunner().invoke(cli, [name, "model.onnx", "--merge", "keep:head"]).exit_code == 0
    done = CliRunner().invoke(cli, [name, "model.onnx", "--merge", "low-rank:none"])
    assert (done.exit_code, "expected a rank behind a colon" in done.output) == (2, True)


def test_a_family_of_rules_is_listed_a_line_each() -> None:
    done = CliRunner().invoke(cli, ["explain", "tie2"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()[1:]] == [c for c in rules() if c.startswith("TIE2")]


def test_a_result_ends_in_one_line_break(here: Path) -> None:
    for words in (
        ["scan", "model.onnx"],
        ["check", "models"],
        ["explain"],
        ["explain", "dedup"],
        ["plan", "model.onnx"],
    ):
        output = CliRunner().invoke(cli, words).output
        assert output.endswith("\n"), words
        assert not output.endswith("\n\n"), words


def test_every_command_is_in_the_table_of_exit_codes() -> None:
    readme = (ROOT / "README.md").read_text()
    (head,) = [line for line in readme.splitlines() if line.startswith("| exit code |")]
    named = {cell.strip() for cell in head.strip("|").split("|")} - {"exit code"}
    assert named == set(cli.commands) - {"explain"}
    assert isinstance(cli, click.Group)
