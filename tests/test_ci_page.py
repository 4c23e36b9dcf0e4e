"""docs/ci.md, followed word for word: a real git repository, a real pre-commit, the action's and GitLab's steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ci.md"
FORMATS = {
    "github": "txt",
    "gitlab": "json",
    "sarif": "json",
    "junit": "xml",
    "json": "json",
    "markdown": "md",
    "text": "txt",
}
_FENCE = re.compile(r"^```(sh|text)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Commands of the page, and the output that it shows for them, if any."""

    commands: str
    shown: str | None


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    for kind, text in _FENCE.findall(page):
        if kind == "sh":
            found.append(Block(text, None))
        else:
            assert found[-1].shown is None
            found[-1] = Block(found[-1].commands, text)
    return found


def files_of_the_project() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def environment(home: Path) -> dict[str, str]:
    """A newcomer's: nothing of ours on the path, no settings of whoever runs the tests."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PRE_COMMIT", "VIRTUAL_ENV"))
    }
    path = [one for one in kept.get("PATH", "").split(os.pathsep) if one != str(Path(sys.executable).parent)]
    return kept | {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(home / "bin"), *path]),
        "PRE_COMMIT_HOME": str(home / "pre-commit"),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone of this project in it, as it is now, under the tag that the page names."""
    home = tmp_path_factory.mktemp("ci")
    for name in files_of_the_project():
        target = home / "tieaudit" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (home / "bin").mkdir()
    os.symlink(shutil.which("python3.11") or sys.executable, home / "bin" / "python3")
    for command in ("git init -q", "git add -A", "git commit -qm clone", "git tag v0.1.0"):
        subprocess.run(command.split(), cwd=home / "tieaudit", env=environment(home), check=True)
    return home


def follow(workspace: Path, page: list[Block], after: Mapping[int, str]) -> list[str]:
    """Run the blocks one after the other in one shell, and what `after` adds to some; the output of each."""
    out = workspace / "out"
    out.mkdir()
    script = ["set -u", f"cd {workspace}"]
    for index, block in enumerate(page):
        script += ["{", block.commands.rstrip(), f"}} > {out}/{index} 2>&1 || {{ echo $? > {out}/failed; exit 1; }}"]
        script += [after[index]] if index in after else []
    done = subprocess.run(["bash"], input="\n".join(script), env=environment(workspace), capture_output=True, text=True)
    said = [(out / str(index)).read_text() if (out / str(index)).exists() else "" for index in range(len(page))]
    assert not (out / "failed").exists(), said
    assert done.returncode == 0, done.stderr
    return [_settled(text) for text in said]


def _settled(text: str) -> str:
    """Without what differs from run to run: how pre-commit was installed, and how long something took."""
    lines = [line for line in text.splitlines() if not line.startswith("[INFO]")]
    return re.sub(r"\b\d+(\.\d+)? m?s\b", "… s", "\n".join(lines).strip("\n") + "\n")


def test_the_page_is_what_happens(workspace: Path, request: pytest.FixtureRequest) -> None:
    reachable = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", workspace / "reach", "setuptools>=77"],
        capture_output=True,
    )
    if reachable.returncode:
        pytest.skip("no package index can be reached")
    page = blocks(PAGE.read_text())
    red = next(index for index, block in enumerate(page) if "check --format github" in block.commands)
    yaml_at = next(index for index, block in enumerate(page) if "gitlab-ci" in block.commands)
    reports = " ".join(f"--report {name}=../red/{name}.{suffix}" for name, suffix in FORMATS.items())
    gitlab = "mkdir -p ../gitlab && cp .gitlab-ci.yml ../gitlab/"
    after = {red: f"mkdir ../red; tieaudit check --exit-zero {reports} > ../red/stdout", yaml_at: gitlab}
    said = follow(workspace, page, after)
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(_rewritten(PAGE.read_text(), page, said))
    else:
        shown = [(block.commands, block.shown) for block in page if block.shown is not None]
        assert shown == [(b.commands, text) for b, text in zip(page, said, strict=True) if b.shown is not None]
    _check_red(workspace / "red")
    _check_gitlab(workspace)
    assert "the commit was refused" in "".join(said)
    assert said[-1].rstrip().endswith("0 cannot tell · 0 crashed")


def _rewritten(text: str, page: list[Block], said: list[str]) -> str:
    outputs = iter([output for block, output in zip(page, said, strict=True) if block.shown is not None])
    return re.sub(
        r"^```text\n.*?^```\n", lambda _: f"```text\n{next(outputs)}```\n", text, flags=re.MULTILINE | re.DOTALL
    )


def _check_red(folder: Path) -> None:
    """Every format names the lost tie, at the file that lost it."""
    texts = {name: (folder / f"{name}.{suffix}").read_text() for name, suffix in FORMATS.items()}
    for name, text in texts.items():
        assert "models/tiny.onnx" in text, name
        assert "TIE107" in text, name
        assert "TIE206" in text, name
    schema = json.loads((ROOT / "docs" / "schema" / "check-1.schema.json").read_text())
    jsonschema.validate(json.loads(texts["json"]), schema)
    (sarif,) = json.loads(texts["sarif"])["runs"]
    at = {result["ruleId"]: result["locations"][0]["physicalLocation"] for result in sarif["results"]}
    assert at["TIE107"]["artifactLocation"]["uri"] == "models/tiny.onnx"
    assert re.search(r"^::error file=models/tiny\.onnx,.*TIE107", texts["github"], re.MULTILINE)
    assert {entry["location"]["path"] for entry in json.loads(texts["gitlab"])} == {"models/tiny.onnx"}
    cases = ElementTree.fromstring(texts["junit"]).findall(".//testcase")
    failed = [case.get("name", "") for case in cases if case.find("failure") is not None]
    assert any("TIE107" in name for name in failed)


def _check_gitlab(workspace: Path) -> None:
    """The job's own commands, after the installation, in the state in which the page leaves the repository."""
    job = yaml.safe_load((workspace / "gitlab" / ".gitlab-ci.yml").read_text())["ties"]
    install, *commands = job["script"]
    assert install.startswith("pip install")
    home = workspace / "models-of-ours"
    script = "\n".join(["set -e", ". .venv/bin/activate", *commands])
    subprocess.run(["bash", "-c", script], cwd=home, env=environment(workspace), check=True, capture_output=True)
    reports = job["artifacts"]["reports"]
    assert json.loads((home / reports["codequality"]).read_text()) == []
    assert ElementTree.parse(home / reports["junit"]).getroot().findall(".//failure") == []


def steps_of_the_action() -> list[dict[str, Any]]:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    found: list[dict[str, Any]] = action["runs"]["steps"]
    return found


def run_step(step: Mapping[str, Any], home: Path, values: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """One `run` step as GitHub runs it: expressions of `env` filled in, the script by `bash -e -o pipefail`."""
    filled = {}
    for name, text in step.get("env", {}).items():
        filled[name] = re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda match: values[match[1]], str(text))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    assert step["shell"] == "bash"
    environment = {**os.environ, "PATH": path, **filled}
    environment |= {"GITHUB_STEP_SUMMARY": str(home / "summary.md"), "GITHUB_OUTPUT": str(home / "output.txt")}
    script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    return subprocess.run(script, cwd=home / "repository", env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("lost", [False, True])
def test_the_steps_of_the_action_report_and_give_the_verdict(tmp_path: Path, fixtures_dir: Path, lost: bool) -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    values = {f"inputs.{name}": str(value["default"]) for name, value in inputs.items()}
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(fixtures_dir / "gpt_decoder" / ("lost.onnx" if lost else "tied.onnx"), repository / "a model.onnx")
    (tmp_path / "summary.md").write_text("what an earlier step wrote\n")
    check, verdict = (step for step in steps_of_the_action() if step.get("name") in ("Check the ties", "Verdict"))
    done = run_step(check, tmp_path, values)
    assert done.returncode == 0, done.stderr
    assert ("::warning file=a model.onnx" in done.stdout) is lost
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("what an earlier step wrote\n")
    assert ("TIE202" in summary) is lost
    (sarif,) = json.loads((repository / "tieaudit.sarif").read_text())["runs"]
    assert [result["ruleId"] for result in sarif["results"]] == (["TIE202"] if lost else [])
    outputs = dict(line.split("=") for line in (tmp_path / "output.txt").read_text().split())
    assert outputs == {"exit-code": str(int(lost))}
    values["steps.check.outputs.exit-code"] = outputs["exit-code"]
    assert run_step(verdict, tmp_path, values).returncode == int(lost)


def test_what_the_action_keeps_are_all_answers_wherever_the_policies_lie(tmp_path: Path, fixtures_dir: Path) -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    values = {f"inputs.{name}": str(value["default"]) for name, value in inputs.items()}
    repository = tmp_path / "repository"
    for team in ("one", "two"):
        (repository / team).mkdir(parents=True)
        shutil.copy(fixtures_dir / "gpt_decoder" / "tied.onnx", repository / team / "m.onnx")
        (repository / team / "tieaudit.toml").write_text("")
    (kept,) = (step["with"]["path"] for step in steps_of_the_action() if "cache" in step.get("uses", ""))
    (check,) = (step for step in steps_of_the_action() if step.get("name") == "Check the ties")
    time.sleep(0.2)  # of what changed a moment ago no answer is kept
    assert run_step(check, tmp_path, values).returncode == 0
    answers = [one for one in (repository / kept).rglob("*.json") if one.parent.name != "runs"]
    assert len(answers) == 2
    assert [one for one in repository.rglob(".tieaudit_cache") if one != repository / kept] == []


def test_inputs_of_the_action_run_nothing(tmp_path: Path, fixtures_dir: Path) -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    values = {f"inputs.{name}": str(value["default"]) for name, value in inputs.items()}
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(fixtures_dir / "gpt_decoder" / "tied.onnx", repository / "m.onnx")
    values |= {"inputs.paths": "$(touch pwned) `touch pwned` ; touch pwned", "inputs.args": "; touch pwned"}
    (check,) = (step for step in steps_of_the_action() if step.get("name") == "Check the ties")
    run_step(check, tmp_path, values)
    assert sorted(path.name for path in repository.iterdir() if "pwned" in path.name) == []
    for step in steps_of_the_action():  # an expression inside of a script would be pasted into it
        assert "${{" not in step.get("run", "")


def test_the_hook_sees_all_that_can_change_a_judgement_and_no_text_or_source() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    files, exclude = re.compile(hook["files"]), re.compile(hook["exclude"])
    seen = ["a/model.onnx", "model.safetensors", "m/config.json", "model.safetensors.index.json", "pytorch_model.bin"]
    seen += ["model.onnx.data", "model.onnx_data", "last.ckpt", "a.pt", "a.pt2", "model.onnx.dvc"]
    seen += ["genai_config.json", "model.onnx_data_1", "data/w.raw", "model.data", "a/tieaudit.lock", "tieaudit.toml"]
    seen += ["pyproject.toml", "tieaudit-baseline.json", "weights.dvc", "m/encoder.weight"]
    passed = [name for name in seen if files.search(name) and not exclude.search(name)]
    assert passed == seen
    assert [name for name in ("README.md", "docs/a.png", "a.py") if not exclude.search(name)] == []
