"""What the gate calls a model, and by whose words it is judged: the same whatever else a run is about, and from
wherever it is started. Each through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_onnx
from click.testing import CliRunner, Result
from gate_models import OTHER, W, folder, save

from tieaudit.cached import FOLDER
from tieaudit.called import key_in
from tieaudit.cli import main
from tieaudit.locked import NAME, read_lock

PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.delenv("GIT_DIR", raising=False)


def tieaudit(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), prog_name="tieaudit")


def git(*words: str) -> None:
    who = {f"GIT_{one}_{what}": "a@example.org" for one in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *words], env=environment, capture_output=True, check=True)


def checked(*words: str) -> dict[str, Any]:
    done = tieaudit("check", "--format", "json", *words)
    assert done.exit_code in (0, 1), done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def called(*words: str) -> list[str]:
    return [model["path"] for model in checked(*words)["models"]]


def export(home: Path, suffix: str = "", parts: Sequence[str] = PARTS, seed: int = 0, prefix: str = "") -> None:
    """Parts of one export, each with a head that is its embedding stored again."""
    home.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        table = tiny_onnx.table(seed + number)
        tiny_onnx.language_model(home / f"{prefix}{part}{suffix}.onnx", table, table.T)


# --- one name ---


def test_a_model_has_one_name_whatever_else_the_run_is_about() -> None:
    export(Path("p"))
    export(Path("p"), "_fp16")
    names = ["p", "p/decoder_model_fp16.onnx"]
    assert called() == called("p") == names
    assert called("p/encoder_model_fp16.onnx") == names[1:]
    assert called("p/encoder_model.onnx") == names[:1]
    git("init", "-q")
    git("add", "p")
    git("commit", "-qm", "a")
    export(Path("p"), "_fp16", seed=9)
    assert called("--since", "HEAD") == names[1:]


def test_what_the_policy_and_the_baseline_say_of_a_variant_holds_for_a_hook_too() -> None:
    export(Path("p"))
    export(Path("p"), "_fp16")
    Path("tieaudit.toml").write_text('baseline = "known.json"\n')
    tieaudit("check", "--write-baseline")
    for words in ((), ("p/encoder_model_fp16.onnx",), ("p/encoder_model.onnx",)):
        done = tieaudit("check", *words)
        assert done.exit_code == 0, done.output
        assert " 0 findings · " in done.output
    Path("tieaudit.toml").write_text('[per-path."**_fp16.onnx"]\nignore = ["TIE2"]\n')
    assert {model["path"]: len(model["findings"]) for model in checked()["models"]} == {
        "p": 3,  # one stored copy in each part
        "p/decoder_model_fp16.onnx": 0,
    }
    assert tieaudit("check", "p/encoder_model_fp16.onnx").exit_code == 0


def test_a_variant_keeps_its_name_when_the_plain_model_joins_it() -> None:
    export(Path("p"), "_int8")
    assert called() == ["p/decoder_model_int8.onnx"]
    export(Path("p"))
    export(Path("p"), "_fp16")
    assert called() == ["p", "p/decoder_model_fp16.onnx", "p/decoder_model_int8.onnx"]


def test_two_plain_exports_of_one_folder_are_known_by_their_files() -> None:
    export(Path("p"), prefix="small-")
    assert called() == ["p"]
    export(Path("p"), prefix="large-")
    assert called() == ["p/large-decoder_model.onnx", "p/small-decoder_model.onnx"]
    assert called("p/small-encoder_model.onnx") == ["p/small-decoder_model.onnx"]


def test_a_folder_stands_for_the_model_of_the_format_that_wins_it() -> None:
    folder(Path("p"), True, None)
    export(Path("p"))
    assert called() == ["p", "p/decoder_model.onnx"]
    assert called("p/encoder_model.onnx") == ["p/decoder_model.onnx"]
    assert tieaudit("lock").exit_code == 0
    assert list(read_lock(Path(NAME))) == ["p", "p/decoder_model.onnx"]


def tied(home: Path, suffix: str = "", seed: int = 0) -> None:
    """Parts that share no file: in each the head reads the embedding."""
    home.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(PARTS[:2]):
        tiny_onnx.language_model(home / f"{part}{suffix}.onnx", tiny_onnx.table(seed + number), None)


def test_a_variant_that_was_never_locked_is_not_judged_by_the_lock_of_the_plain_model() -> None:
    tied(Path("m"))
    assert tieaudit("lock").exit_code == 0
    export(Path("m"), "_int8", parts=PARTS[:2], seed=5)  # with a copy of the head each: no tie
    done = tieaudit("check")
    assert "TIE206" not in done.output and "TIE207" not in done.output
    assert "tieaudit.lock does not hold m/decoder_model_int8.onnx" in done.output
    export(Path("m"), parts=PARTS[:2])  # the plain one is judged by it, also with variants beside it
    assert "TIE206" in tieaudit("check").output


def test_two_names_of_one_file_are_locked_as_two_models() -> None:
    save(Path("a.safetensors"), {"a": W, "b": W.copy()})
    Path("b.safetensors").symlink_to("a.safetensors")
    done = tieaudit("lock")
    assert done.exit_code == 0, done.output
    assert list(read_lock(Path(NAME))) == ["a.safetensors", "b.safetensors"]
    assert "does not hold" not in tieaudit("check").output
    save(Path("a.safetensors"), {"a": W, "b": OTHER})
    assert tieaudit("check").output.count("TIE206") == 2


def test_a_key_follows_links_among_folders_and_none_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "name").symlink_to("m")
    link, real = tmp_path / "link", tmp_path / "real"
    assert key_in(link / "m", real) == key_in(real / "m", link) == "m"
    assert key_in(link / "name", real) == "name"
    assert key_in(link, real) == key_in(link, link) == "."
    assert key_in(link, link / "m") == ".."


# --- whose words ---


def from_both(*words: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of a check from above and from inside of the folder `team`."""
    codes = [tieaudit("check", *words).exit_code, tieaudit("check", "team", *words).exit_code]
    with monkeypatch.context() as moved:
        moved.chdir("team")
        codes.append(tieaudit("check", *words).exit_code)
    return codes


def test_a_strict_policy_is_strict_wherever_the_check_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    # albert: that no layers are there to be compared is what nobody can tell
    save(Path("team/m.safetensors"), {"a": W})
    Path("team/tieaudit.toml").write_text('expect = ["albert"]\n')
    assert from_both(monkeypatch=monkeypatch) == [0, 0, 0]
    assert from_both("--strict", monkeypatch=monkeypatch) == [2, 2, 2]
    Path("team/tieaudit.toml").write_text('expect = ["albert"]\nstrict = true\n')
    assert from_both(monkeypatch=monkeypatch) == [2, 2, 2]
    Path("other").mkdir()  # what is strict there asks nothing of a model here
    Path("other/tieaudit.toml").write_text("strict = true\n")
    save(Path("other/m.safetensors"), {"a": W})
    Path("team/tieaudit.toml").write_text('expect = ["albert"]\n')
    assert tieaudit("check").exit_code == 0


def test_fail_on_is_that_of_each_models_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("team/m.safetensors"), {"a": W, "b": W.copy()})  # TIE201, a warning
    assert from_both(monkeypatch=monkeypatch) == [1, 1, 1]
    Path("team/tieaudit.toml").write_text('fail-on = "error"\n')
    assert from_both(monkeypatch=monkeypatch) == [0, 0, 0]
    assert checked("team")["facts"]["fail_on"] == "error"
    Path("other.safetensors").write_bytes(Path("team/m.safetensors").read_bytes())
    assert tieaudit("check").exit_code == 1
    assert checked()["facts"]["fail_on"] == {"": "info", "team/tieaudit.toml": "error"}


def test_the_baseline_is_that_of_each_models_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("team/m.safetensors"), {"a": W, "b": W.copy()})
    Path("team/tieaudit.toml").write_text('baseline = "known.json"\n')
    done = tieaudit("check", "team", "--write-baseline")
    assert "wrote 1 known finding to team/known.json" in done.output
    assert not Path("tieaudit-baseline.json").exists()
    assert from_both(monkeypatch=monkeypatch) == [0, 0, 0]
    assert from_both(monkeypatch=monkeypatch) == [0, 0, 0]  # as remembered
    Path("team/known.json").unlink()  # which no run may go on without
    assert from_both(monkeypatch=monkeypatch) == [2, 2, 2]
    tieaudit("check", "--write-baseline")
    save(Path("mine.safetensors"), {"a": W, "b": W.copy()})
    assert [len(model["findings"]) for model in checked()["models"]] == [1, 0]
    known = Path("team/known.json").read_bytes()
    assert "tieaudit-baseline.json; to have it read" in tieaudit("check", "--write-baseline").output
    assert Path("team/known.json").read_bytes() == known
    assert [one["path"] for one in json.loads(Path("tieaudit-baseline.json").read_text())["findings"]] == [
        "mine.safetensors"
    ]


def test_a_baseline_is_written_over_a_baseline_only() -> None:
    model = save(Path("m.safetensors"), {"a": W, "b": W.copy()})
    other = Path("other.json")
    other.write_text('{"mine": 1}')
    for file in (model, other):
        before = file.read_bytes()
        done = tieaudit("check", "--write-baseline", "--baseline", str(file))
        assert done.exit_code == 2
        assert f"{file}: expected a baseline of tieaudit" in done.output
        Path("tieaudit.toml").write_text(f'baseline = "{file}"\n')
        assert tieaudit("check", "--write-baseline").exit_code == 2
        assert file.read_bytes() == before
        Path("tieaudit.toml").unlink()
    done = tieaudit("check", "--write-baseline", "--baseline", ".")
    assert done.exit_code == 2 and "the baseline cannot be read" in done.output
    for _ in range(2):
        assert tieaudit("check", "--write-baseline", "--baseline", "new.json").exit_code == 0


# --- files that steer ---


def a_repository_with_two_policies() -> None:
    for place in ("a", "b"):
        save(Path(place, "m.safetensors"), {"a": W, "b": W.copy()})
        Path(place, "tieaudit.toml").write_text('baseline = "known.json"\nlock = "locks/ties.lock"\n')
        Path(place, "locks").mkdir()
    Path("README.md").write_text("models")
    assert tieaudit("lock", "a").exit_code == tieaudit("lock", "b").exit_code == 0
    assert tieaudit("check", "--write-baseline").exit_code == 0
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")


@pytest.mark.parametrize("name", ["tieaudit.toml", "known.json", "locks/ties.lock"])
def test_a_change_of_what_steers_a_check_checks_the_models_that_it_concerns(name: str) -> None:
    a_repository_with_two_policies()
    for words in (("--since", "HEAD"), ("README.md",)):
        assert called(*words) == []
    file = Path("b", name)
    file.write_text(f"{file.read_text()}\n")
    assert called("--since", "HEAD") == called(str(file)) == called("README.md", str(file)) == ["b/m.safetensors"]
    if name == "tieaudit.toml":  # a policy that asks for more makes the hook fail, not only the next run
        file.write_text('max-parameters = 1\nignore = ["TIE201"]\n')
        for words in (("--since", "HEAD"), (str(file),), (str(file),)):  # the last one as remembered
            assert "TIE109" in tieaudit("check", *words).output
        file.unlink()
        assert called("--since", "HEAD") == ["b/m.safetensors"]


def test_a_pyproject_steers_a_check_only_if_it_holds_the_policy() -> None:
    save(Path("m.safetensors"), {"a": W})
    Path("pyproject.toml").write_text("[project]\n")
    assert called("pyproject.toml") == []
    Path("pyproject.toml").write_text("[tool.tieaudit]\nexpect = []\n")
    assert called("pyproject.toml") == ["m.safetensors"]


def test_the_groups_of_an_expected_scheme_and_a_policy_that_is_given_steer_a_check() -> None:
    save(Path("m/m.safetensors"), {"a": W})
    Path("m/groups.toml").write_text('[[group]]\nmatch = ["a", "b"]\n')
    Path("m/tieaudit.toml").write_text('expect = ["custom:groups.toml"]\n')
    assert called("m/groups.toml") == ["m/m.safetensors"]
    Path("given.toml").write_text("")
    assert called("given.toml") == []
    assert called("given.toml", "--config", "given.toml") == ["m/m.safetensors"]
    assert called("m/tieaudit.toml", "--config", "given.toml") == []


def test_what_is_remembered_of_a_run_about_a_policy_rests_on_all_that_it_rules() -> None:
    model = save(Path("deep/down/m.safetensors"), {"a": W})
    Path("tieaudit.toml").write_text("")
    time.sleep(0.2)  # what changed a moment ago is not remembered
    for _ in range(2):
        assert tieaudit("check", "tieaudit.toml").exit_code == 0
    assert list(Path(FOLDER).glob("*/runs/*.json")) != []
    save(model.parent / "new.safetensors", {"a": W, "b": W.copy()})
    assert tieaudit("check", "tieaudit.toml").exit_code == 1
