"""`tieaudit check` and `lock` in repositories as they are: proofs that fail, runtimes that are missing, pointers,
nested policies, full disks, two runs at once. Each through the real command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_onnx
from click.testing import CliRunner, Result
from exchange_under_fire import listing
from gate_models import OTHER, W, folder, save

from tieaudit.cached import FOLDER
from tieaudit.cli import main
from tieaudit.commands import screen
from tieaudit.formats import NOT_CARRIED

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"
_RUNTIME_THAT_IS_WRONG = '''
"""ONNX Runtime, but what was rewritten computes something else: one more in every output."""
import importlib, os, re, sys

here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [one for one in sys.path if os.path.abspath(one or ".") != here]
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")


class Wrong(real.InferenceSession):
    def __init__(self, path, *more, **named):
        super().__init__(path, *more, **named)
        self.rewritten = re.search(r"\\.tieaudit-[^/]*/[^/]*\\.onnx$", str(path)) is not None

    def run(self, *more, **named):
        return [one + 1 if self.rewritten and one.dtype.kind == "f" else one for one in super().run(*more, **named)]


real.InferenceSession = Wrong
sys.modules["onnxruntime"] = real
'''
_NO_RUNTIME = "import sys\nsys.modules['onnxruntime'] = None\nsys.modules['torch'] = None\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.delenv("GIT_DIR", raising=False)


def tieaudit(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), prog_name="tieaudit")


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell starts it."""
    return subprocess.run(
        [sys.executable, "-m", "tieaudit", *words],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def git(*words: str) -> str:
    who = {f"GIT_{one}_{what}": "a@example.org" for one in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["git", *words], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def visible() -> Mapping[str, str]:
    return {name: value for name, value in listing(Path()).items() if not name.startswith(FOLDER)}


# --- fixes that cannot be delivered ---


@pytest.mark.parametrize("place", [("--in-place",), ("--to", "../out"), ("--in-place", "--require", "structural")])
def test_a_fix_whose_proof_fails_delivers_nothing_and_says_which_proof_and_by_how_much(
    place: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    tiny_onnx.lost(Path("m.onnx"))
    (tmp_path / "wrong/onnxruntime").mkdir(parents=True)
    (tmp_path / "wrong/onnxruntime/__init__.py").write_text(_RUNTIME_THAT_IS_WRONG)
    before = visible()
    done = command("check", "--fix", *place, "--format", "json", PYTHONPATH=str(tmp_path / "wrong"))
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("not mended")]
    assert said.startswith("not mended, its proof failed: m.onnx: the ")
    assert "proof failed, nothing was delivered: " in said
    assert " differs by 1" in said or "the results differ" in said
    assert json.loads(done.stdout)["totals"]["n_findings"] == 1
    assert visible() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository", "wrong"]
    # what failed is no finding: a job that reports only must not call it well
    assert command("check", "--fix", *place, "--exit-zero", PYTHONPATH=str(tmp_path / "wrong")).returncode == 1


def test_without_a_runtime_a_fix_says_what_to_install_or_which_proof_there_is(tmp_path: Path) -> None:
    tiny_onnx.lost(Path("m.onnx"))
    (tmp_path / "sitecustomize.py").write_text(_NO_RUNTIME)
    before = visible()
    done = command("check", "--fix", "--in-place", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "pip install 'tieaudit[onnxruntime]'" in done.stderr
    assert "--require structural delivers on the structural proof alone" in done.stderr
    assert "--fix makes it" not in done.stdout  # it was tried a moment ago
    assert visible() == before
    done = command("check", "--fix", "--in-place", "--require", "structural", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert "proof held: structural" in done.stderr
    assert visible()["m.onnx"] != before["m.onnx"]


def test_of_a_model_that_is_the_top_of_its_repository_only_its_own_files_are_touched(fixtures_dir: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for path in (fixtures_dir / "gpt_decoder" / "hf_lost").iterdir():
        shutil.copy(path, Path())
    Path("README.md").write_text("# A model\n")
    Path("src").mkdir()
    Path("src/train.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "lost")
    before = visible()
    done = command("check", "--fix", "--in-place")
    assert done.returncode == 0, done.stdout + done.stderr
    after = visible()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert after.keys() - before.keys() == {"tieaudit.receipt.json"}
    assert git("status", "--short").split() == ["M", "model.safetensors", "??", "tieaudit.receipt.json"]
    git("fsck", "--strict")


def test_the_cache_of_the_gate_does_not_travel_with_a_mended_model(fixtures_dir: Path) -> None:
    assert FOLDER in NOT_CARRIED
    for path in (fixtures_dir / "gpt_decoder" / "hf_lost").iterdir():
        shutil.copy(path, Path())
    tieaudit("check", "--no-cache", "--fix", "--to", "../clean", "--require", "structural")
    assert tieaudit("check").exit_code == 1
    assert Path(FOLDER).is_dir()
    done = tieaudit("check", "--fix", "--to", "../out", "--require", "structural")
    assert done.exit_code == 0, done.output
    assert not Path("../out", FOLDER).exists()
    assert {path.name for path in Path("../out").iterdir()} == {path.name for path in Path("../clean").iterdir()}


def test_mended_models_of_several_paths_do_not_meet() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        tiny_onnx.lost(Path(name, "m.onnx"))
    for number, words in enumerate((("a", "b"), ("b/m.onnx", "a/../a/m.onnx"), ())):
        done = tieaudit("check", *words, "--fix", "--to", f"../out{number}", "--require", "structural")
        assert done.exit_code == 0, done.output
        assert {str(one.relative_to(f"../out{number}")) for one in Path(f"../out{number}").rglob("*.onnx")} == {
            "a/m.onnx",
            "b/m.onnx",
        }
    done = tieaudit("check", "a", "a/m.onnx", "./a", "--fix", "--to", "../one", "--require", "structural")
    assert done.exit_code == 0, done.output
    assert sorted(one.name for one in Path("../one").iterdir()) == ["m.onnx", "m.onnx.receipt.json"]


# --- pointers, locks ---


def test_what_is_only_a_pointer_is_not_locked_as_a_model_without_ties() -> None:
    folder(Path("a"), True, None)
    save(Path("b.safetensors"), {"a": W, "b": W.copy()})
    assert tieaudit("lock").exit_code == 0
    before = Path("tieaudit.lock").read_bytes()
    Path("a/model.safetensors").write_text(POINTER)
    for words in (("lock",), ("lock", "a"), ("lock", "--check")):
        done = tieaudit(*words)
        assert done.exit_code == 2
        assert "a: not locked, the weights are not here: " in done.output
        assert "git lfs pull" in done.output
    assert Path("tieaudit.lock").read_bytes() == before
    assert "lost" not in tieaudit("check", "a").output


def test_a_model_of_which_only_a_pointer_is_here_counts_as_a_model() -> None:
    save(Path("a.safetensors"), {"a": W})
    Path("b.onnx").write_text(POINTER)
    done = tieaudit("check")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1].startswith("2 models · ")
    assert "1 cannot tell" in done.output.splitlines()[-1]


def lost(path: Path) -> None:
    save(path, {"a": W, "b": OTHER})


@pytest.mark.parametrize("start", [".", "team", "team/deep"])
@pytest.mark.parametrize("policies", [(), ("team",), (".", "team")], ids=["none", "inner", "both"])
def test_a_lock_that_was_written_above_counts_wherever_the_check_starts(
    start: str, policies: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    git("init", "-q")
    model = save(Path("team/deep/m.safetensors"), {"a": W, "b": W.copy()}).absolute()
    for place in policies:
        Path(place, "tieaudit.toml").write_text('ignore = ["TIE201"]\n')
    assert tieaudit("lock").exit_code == 0
    monkeypatch.chdir(start)
    assert "TIE206" not in tieaudit("check").output
    lost(model)
    done = tieaudit("check")
    assert done.exit_code == 1
    assert "TIE206" in done.output


def test_a_lock_beside_the_own_policy_comes_before_one_above_and_one_outside_the_repository_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(Path("team/m.safetensors"), {"a": W, "b": W.copy()}).absolute()
    monkeypatch.chdir(tmp_path)
    assert tieaudit("lock").exit_code == 0
    lost(model)
    monkeypatch.chdir("repository/team")
    Path("tieaudit.toml").write_text("")
    assert tieaudit("lock").exit_code == 0  # as it is now
    assert "TIE206" not in tieaudit("check").output
    Path("tieaudit.lock").unlink()
    Path("tieaudit.toml").unlink()
    git("init", "-q", "..")
    assert "TIE206" not in tieaudit("check").output  # the lock of whoever has the folder above


def test_models_that_no_lock_holds_are_named_once_there_is_one() -> None:
    save(Path("a.safetensors"), {"a": W, "b": W.copy()})
    assert "does not hold" not in tieaudit("check").output
    tieaudit("lock")
    assert "does not hold" not in tieaudit("check").output
    save(Path("b.safetensors"), {"a": W})
    said = "tieaudit.lock does not hold b.safetensors: if ties are to be kept there, run `tieaudit lock`"
    assert said in tieaudit("check").output
    assert "does not hold" not in tieaudit("check", "b.safetensors").output  # a narrower question
    tieaudit("lock")
    assert "does not hold" not in tieaudit("check").output


def test_what_an_inner_policy_excludes_is_left_out_wherever_a_command_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("team/old/m.safetensors"), {"a": W, "b": W.copy()})
    save(Path("team/new.safetensors"), {"a": W})
    Path("team/tieaudit.toml").write_text('exclude = ["old/"]\n')
    for place in (".", "team"):
        with monkeypatch.context() as moved:
            moved.chdir(place)
            done = tieaudit("check")
            assert done.exit_code == 0, done.output
            assert "1 model · " in done.output
    assert "1 model · " in tieaudit("check", ".", "team").output
    tieaudit("lock")
    assert "old/m.safetensors" not in Path("tieaudit.lock").read_text()
    assert "does not hold" not in tieaudit("check").output


# --- the baseline ---


def test_a_moved_model_keeps_its_known_findings_and_a_copy_of_it_does_not() -> None:
    save(Path("a/m.safetensors"), {"a": W, "b": W.copy()})
    Path("tieaudit.toml").write_text('baseline = "known.json"\n')
    tieaudit("check", "--write-baseline")
    assert tieaudit("check").exit_code == 0
    Path("a").rename("moved")
    done = tieaudit("check")
    assert done.exit_code == 0
    assert "moved/m.safetensors · no finding · 1 in the baseline" in done.output
    assert "no longer found" not in done.output
    shutil.copytree("moved", "second")  # known once, there twice
    done = tieaudit("check")
    assert done.exit_code == 1
    assert "1 finding · " in done.output and "1 in the baseline" in done.output
    Path("moved").rename("a")  # where it was: the copy alone is new
    assert "second/m.safetensors · safetensors · 1 finding" in tieaudit("check").output


def test_a_baseline_of_another_version_and_one_that_is_spoilt_say_what_to_do() -> None:
    save(Path("m.safetensors"), {"a": W, "b": W.copy()})
    tieaudit("check", "--write-baseline")
    file = Path("tieaudit-baseline.json")
    text = file.read_text()
    file.write_text(text.replace("tieaudit/baseline/1", "tieaudit/baseline/7"))
    done = tieaudit("check", "--baseline", str(file))
    assert done.exit_code == 2
    assert "found tieaudit/baseline/7\n  another version of tieaudit wrote it" in done.output
    file.write_text(text[:-10])
    done = tieaudit("check", "--baseline", str(file))
    assert done.exit_code == 2
    assert "--write-baseline" in done.output


# --- disks, clocks, several at once ---

_SMALL_FILES_ONLY = """
import resource, sys
from tieaudit.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


def on_a_full_disk(*words: str, **streams: object) -> subprocess.CompletedProcess[str]:
    """No file may grow over 512 bytes, as on a disk that has room for no more."""
    assert resource.RLIMIT_FSIZE
    script = [sys.executable, "-c", _SMALL_FILES_ONLY, *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(script, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def test_on_a_full_disk_every_file_is_the_old_one_or_none_and_the_exit_code_says_so(tmp_path: Path) -> None:
    for number in range(8):  # so that lock, baseline and report take more than 512 bytes
        save(Path(f"{number}.safetensors"), {"a": W, "b": W.copy()})
    Path("tieaudit-baseline.json").write_text('{"schema": "tieaudit/baseline/1", "findings": []}')
    Path("report.json").write_text("the old one")
    before = visible()
    for words, file in (
        (("lock",), "tieaudit.lock"),
        (("check", "--write-baseline"), "tieaudit-baseline.json"),
        (("check", "--report", "json=report.json"), "report.json"),
    ):
        done = on_a_full_disk(*words)
        assert done.returncode == 2, words
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert error.endswith(f"{file}: cannot be written: File too large") or "lock cannot be written" in error
        assert ".tieaudit-" not in error
    assert visible() == before
    kept = [path for path in Path(FOLDER).rglob("*") if path.is_file() and path.name != ".gitignore"]
    assert kept == []  # nor half an answer in the cache
    assert "8 findings" in tieaudit("check").output


def test_a_result_that_does_not_fit_on_the_disk_is_no_result_also_where_nothing_is_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Path("m.safetensors"), {"a": W})
    for unbuffered in ("", "1"):
        monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
        with open(tmp_path / "result.json", "w") as file:
            done = on_a_full_disk("check", "--format", "json", stdout=file)
        assert done.returncode == 2
        assert "standard output: the result cannot be printed: File too large" in done.stderr


def test_an_unbuffered_result_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        save(Path(f"é{number}.safetensors"), {"a": W, "b": W.copy()})
    done = command("check", "--format", "json", PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
    assert len(json.loads(done.stdout)["models"]) == 40
    done = command("check", PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
    assert "é39.safetensors" in done.stdout
    assert done.stdout.endswith(" crashed\n")


def test_runs_at_once_on_one_cache_say_the_same_and_leave_it_whole() -> None:
    for number in range(6):
        save(Path(f"{number}.safetensors"), {"a": W, "b": W.copy()})
    words = [sys.executable, "-m", "tieaudit", "check", "--format", "markdown"]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [one.communicate(timeout=120) for one in running]
    assert [one.returncode for one in running] == [1, 1, 1]
    assert len(set(said)) == 1
    assert said[0][1] == ""
    kept = [path for path in Path(FOLDER).rglob("*") if path.is_file() and path.name != ".gitignore"]
    assert kept and all(isinstance(json.loads(path.read_text()), dict) for path in kept)


# --- arguments ---


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("check", "--formt", "json"), "no option is called '--formt'", "did you mean --format?"),
        (("check", "--wholly-other"), "no option is called '--wholly-other'", "`tieaudit check --help` shows"),
        (("check", "-x.onnx"), "no option is called '-x'", "a path that begins with a dash is written ./-x.onnx"),
        (("check", "--jobs", "0"), "--jobs: 0 is not in the range 1<=x<=256", "`tieaudit check --help` shows"),
        (("check", "--report"), "option '--report' requires an argument", "`tieaudit check --help` shows"),
        (("diff", "a"), "expected AFTER, found nothing", "usage: tieaudit diff [OPTIONS] BEFORE AFTER"),
        (("scan",), "expected PATH..., found nothing", "usage: tieaudit scan [OPTIONS] PATH..."),
        (("diff", "a", "b", "c"), "got unexpected extra argument (c)", "`tieaudit diff --help` shows"),
        (("--bogus",), "no option is called '--bogus'", "`tieaudit --help` shows"),
    ],
)
def test_what_is_wrong_with_arguments_is_said_as_all_else(words: tuple[str, ...], error: str, hint: str) -> None:
    Path("-x.onnx").write_bytes(b"")
    done = tieaudit(*words)
    assert done.exit_code == 2
    first, second = done.output.splitlines()
    assert first == f"error: {error}"
    assert second.startswith(f"  {hint}")


def test_without_any_argument_the_help_is_shown() -> None:
    assert "Commands:" in tieaudit().output


def test_a_repository_without_a_commit_says_so_to_since() -> None:
    git("init", "-q")
    save(Path("m.safetensors"), {"a": W})
    done = tieaudit("check", "--since", "HEAD")
    assert done.exit_code == 2
    assert "error: --since: no commit 'HEAD': this repository has none yet\n  leave --since out" in done.output


@pytest.mark.parametrize(
    ("given", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_colours_are_for_terminals_that_show_them(
    given: Mapping[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tieaudit.console.on_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert screen()["color"] is coloured
    monkeypatch.setattr("tieaudit.console.on_terminal", lambda stream: False)
    assert screen()["color"] is False


# --- plug-ins ---


def test_the_source_of_an_editable_plug_in_is_part_of_the_question_to_the_cache(tmp_path: Path) -> None:
    home = tmp_path / "plugin"
    (home / "mine/deep").mkdir(parents=True)
    (home / "mine/__init__.py").write_text("raise RuntimeError('nobody imports it to ask')\n")
    (home / "mine/deep/rule.py").write_text("RULE = 1\n")
    info = home / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tieaudit.rules]\none = mine.deep.rule:RULE\ntwo = mine.deep.rule:RULE\n")
    asked = "from tieaudit.registry import joined; print(*joined(), sep='\\n')"

    def key() -> str:
        words = [sys.executable, "-c", asked]
        environment = {**os.environ, "PYTHONPATH": str(home)}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    plain = key()
    assert plain.count("(mine 1.0)") == 2  # installed as it was built: its version is enough
    (info / "direct_url.json").write_text(json.dumps({"url": home.as_uri(), "dir_info": {"editable": True}}))
    before = key()
    assert before != plain
    assert key() == before
    (home / "mine/deep/rule.py").write_text("RULE = 2\n")
    assert key() != before
