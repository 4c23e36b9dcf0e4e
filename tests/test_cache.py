"""The caches of the gate: what did not change is not read again, and what did is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gate_models import OTHER, W, folder, old, save

from tieaudit import cached, gate
from tieaudit.cached import FOLDER, Cache, Moment, checked_of, document_of, environment
from tieaudit.checked import Checked, Judged, Place
from tieaudit.patrol import Patrolled, Wanted, patrol
from tieaudit.verdict import CannotTell, Finding, Fix, Summary


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(**wanted: object) -> Patrolled:
    return patrol(Wanted(n_jobs=1, **wanted))  # type: ignore[arg-type]


def at(wall_ns: int) -> Moment:
    """A run that began then, by a clock that nobody set since."""
    return Moment(wall_ns, time.monotonic_ns() - (time.time_ns() - wall_ns))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The models that were really judged since it was last asked."""
    judged: list[str] = []
    before = gate.work

    def counting(job: gate.Job) -> gate.Outcome:
        judged.append(job.shown_as)
        return before(job)

    def since() -> list[str]:
        found = sorted(judged)
        judged.clear()
        return found

    monkeypatch.setattr(gate, "work", counting)
    return since


def answers() -> list[Path]:
    return [path for path in Path(FOLDER).rglob("*.json") if path.parent.name != "runs"]


def test_an_unchanged_model_is_not_read_again(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    save(tmp_path / "b.safetensors", {"a": W})
    cold = run()
    assert read() == ["a.safetensors", "b.safetensors"]
    warm = run()
    assert read() == []
    assert [replace(model, cached=False) for model in warm.run.models] == list(cold.run.models)
    assert all(model.cached for model in warm.run.models)
    assert warm.exit_code == cold.exit_code == 1
    save(tmp_path / "b.safetensors", {"a": OTHER, "c": OTHER.copy()})
    found = run()
    assert read() == ["b.safetensors"]
    assert len(list(found.run.findings)) == 2


def test_a_fresh_checkout_has_new_times_and_the_same_answers(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    path = save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    run()
    read()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert run().exit_code == 1
    assert read() == []


def test_one_byte_that_changed_under_the_old_times_is_noticed(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    path = save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    old(path)
    run()
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    read()
    assert run().exit_code == 0  # a and b differ in one bit now
    assert read() == ["a.safetensors"]


def test_another_policy_asks_another_question(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    run()
    (tmp_path / "tieaudit.toml").write_text('ignore = ["TIE201"]')
    assert run().exit_code == 0
    assert read() == ["a.safetensors", "a.safetensors"]
    (tmp_path / "tieaudit.toml").unlink()
    assert run().exit_code == 1
    assert read() == []


def test_a_file_that_joins_a_model_s_folder_is_noticed(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    home = folder(tmp_path / "m", False, OTHER)
    run()
    read()
    save(home / "model.fp16.safetensors", {"a": W})
    run()
    assert read() == ["m"]


def test_a_file_outside_of_what_is_looked_through_is_noticed(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    outside = save(tmp_path / "store" / "blob", {"a": W, "b": W.copy()})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.safetensors").symlink_to(outside)
    assert run(paths=("m",)).exit_code == 1
    read()
    assert (run(paths=("m",)).exit_code, read()) == (1, [])
    save(outside, {"a": W, "b": OTHER})
    assert (run(paths=("m",)).exit_code, read()) == (0, ["m/a.safetensors"])


def test_what_cannot_be_read_is_tried_again(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0")
    assert run().exit_code == 2
    assert run().exit_code == 2
    assert read() == ["a.safetensors", "a.safetensors"]


def test_without_a_cache_nothing_is_kept(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    save(tmp_path / "a.safetensors", {"a": W})
    for _ in range(2):
        run(no_cache=True)
    assert (read(), answers()) == (["a.safetensors"] * 2, [])


def test_a_folder_that_cannot_be_written_keeps_nothing_and_harms_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"a": W})
    (tmp_path / FOLDER).write_text("a file is in the way")
    assert run().exit_code == 0
    assert (tmp_path / FOLDER).read_text() == "a file is in the way"


def test_a_cache_that_leads_elsewhere_by_a_link_is_none(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    home, victim = tmp_path.parent / "home", tmp_path.parent / "victim"
    home.mkdir()
    save(tmp_path / "w.safetensors", {"a": W})
    old(tmp_path / "w.safetensors")
    (tmp_path / FOLDER).symlink_to(home)
    for _ in range(2):
        run()
        assert read() == ["w.safetensors"]
    assert not list(home.iterdir())
    # a link inside of it, to a folder or in the place of the mark
    (tmp_path / FOLDER).unlink()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / environment()).symlink_to(home)
    (tmp_path / FOLDER / ".gitignore").symlink_to(victim)
    run()
    assert not list(home.iterdir())
    (tmp_path / FOLDER / environment()).unlink()
    run()
    assert read() == ["w.safetensors"] * 2
    assert not os.path.lexists(victim)
    run()
    assert read() == []


def test_the_cache_is_no_commit_and_no_model(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"a": W})
    run()
    assert (tmp_path / FOLDER / ".gitignore").read_text().endswith("*\n")
    assert [model.path for model in run().run.models] == ["a.safetensors"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"format": "tieaudit/cache/1"}', "\0" * 100, "[" * 100_000])
def test_a_damaged_answer_is_asked_anew(tmp_path: Path, read: Callable[[], list[str]], damage: str) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    run()
    for path in Path(FOLDER).rglob("*.json"):
        path.write_text(damage)
    read()
    assert run().exit_code == 1
    assert read() == ["a.safetensors"]


def test_every_field_of_an_answer_that_is_missing_makes_a_miss(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    run()
    (answer,) = answers()
    whole = json.loads(answer.read_text())
    for key in whole:
        for spoilt in ({k: v for k, v in whole.items() if k != key}, {**whole, key: 3}):
            answer.write_text(json.dumps(spoilt))
            for path in (Path(FOLDER) / environment() / "runs").glob("*.json"):
                path.unlink()
            read()
            assert run().exit_code == 1
            assert read() == ["a.safetensors"]


def test_an_answer_comes_back_as_it_was() -> None:
    finding = Finding(("a\ud800", "b"), "m", Fix("safe", "c", "dedup"), {"x": [1, None]}, 7, "TIE201", "n", "error")
    known = Judged(replace(finding, fix=None), Place("p"), "1")
    answer = Checked(
        "path", "onnx", (Judged(finding, Place("p", 3), "0"),), (CannotTell("b", ("i",), "TIE101"),), (),
        Summary(1, None, 2, 3, 4, "because"), 5, 6, ("k",), 1, (known,), False, 9, True, ("f",), False, ("TIE101",),
    )  # fmt: skip
    assert checked_of(json.loads(json.dumps(document_of(answer)))) == replace(answer, cached=True)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"a": W})
    store = Cache(tmp_path / "c")
    answer = Checked("a", "safetensors")
    store.put("q", answer, [path], at(path.stat().st_mtime_ns - 1))  # it changed after the reading had begun
    assert store.get("q") is None
    store.put("q", answer, [path], at(time.time_ns() + 10**9))
    assert store.get("q") == replace(answer, cached=True)


def test_a_large_file_is_known_by_its_times_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "N_MOST_HASHED", 10)
    path = save(tmp_path / "a.safetensors", {"a": W})
    store = Cache(tmp_path / "c")
    store.put("q", Checked("a", "safetensors"), [path], at(time.time_ns() + 10**10))
    assert store.get("q") is not None
    os.utime(path)
    assert store.get("q") is None


@pytest.mark.parametrize("seconds", [0, 1, 2**31 + 10, 2**33], ids=["1970", "a second later", "2038", "2242"])
def test_a_file_of_another_age_is_kept_and_a_change_under_its_time_is_noticed(
    tmp_path: Path, read: Callable[[], list[str]], seconds: int
) -> None:
    path = save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    os.utime(path, (seconds, seconds))
    time.sleep(0.1)  # what changed less than 50 ms ago is not trusted, and the whole run would not be remembered
    for _ in range(3):
        assert run().exit_code == 1
    assert read() == ["a.safetensors"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))
    assert run().exit_code == 0  # a and b differ in one bit now
    assert read() == ["a.safetensors"]


def test_a_file_system_without_times_of_its_own_is_not_trusted() -> None:
    now = time.time_ns()
    dated = {seconds: SimpleNamespace(st_mtime_ns=0, st_ctime_ns=seconds * 10**9) for seconds in (0, 1_000)}
    assert not cached.settled(dated[0], now)  # type: ignore[arg-type]  # as some mounts say of every file
    assert cached.settled(dated[1_000], now)  # type: ignore[arg-type]


def test_where_the_clock_was_set_back_while_a_model_was_read_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.safetensors", {"a": W})
    old(path)
    store, begun = Cache(tmp_path / "c"), at(time.time_ns() + 10**9)
    monkeypatch.setattr(cached.time, "time_ns", lambda real=time.time_ns: real() - 3600 * 10**9)
    # the times of the file lie before the beginning, as they would if it had been written a moment ago
    store.put("q", Checked("a", "safetensors"), [path], begun)
    assert store.get("q") is None
    monkeypatch.undo()
    store.put("q", Checked("a", "safetensors"), [path], begun)
    assert store.get("q") is not None


def test_a_run_under_a_clock_that_was_set_back_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    time.sleep(0.1)
    before = gate.work

    def set_back(job: gate.Job) -> gate.Outcome:
        monkeypatch.setattr(cached.time, "time_ns", lambda real=time.time_ns: real() - 3600 * 10**9)
        return before(job)

    with monkeypatch.context() as patched:
        patched.setattr(gate, "work", set_back)
        assert run().exit_code == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert not list(Path(FOLDER).rglob("*.json"))
    run()
    assert list(Path(FOLDER).rglob("*.json"))


def test_another_version_of_the_program_keeps_answers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], list[str]]
) -> None:
    save(tmp_path / "a.safetensors", {"a": W})
    run()
    read()
    environment.cache_clear()
    monkeypatch.setattr(cached, "_libraries", lambda: iter(["transformers-9.9.dist-info"]))
    try:
        run()
        assert read() == ["a.safetensors"]
    finally:
        environment.cache_clear()


def test_a_run_that_is_killed_spoils_no_answer(tmp_path: Path) -> None:
    for index in range(60):
        save(tmp_path / f"{index:03d}.safetensors", {"a": W, "b": W.copy() if index % 2 else OTHER})
    command = [sys.executable, "-m", "tieaudit", "check", "--jobs", "2", "--format", "json"]
    clean = subprocess.run([*command, "--no-cache"], capture_output=True, check=False)
    for n_kept in (1, 20, 40):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(answers()) < n_kept and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    warm = subprocess.run(command, capture_output=True, check=False)
    assert (warm.returncode, clean.returncode) == (1, 1)

    def said(text: bytes) -> object:
        document = json.loads(text)
        return [{key: value for key, value in model.items() if key != "cached"} for model in document["models"]]

    assert said(warm.stdout) == said(clean.stdout)
    assert len(answers()) == 60


def edit(path: Path, text: str) -> Callable[[], object]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return lambda: path.write_text(text)


def flip(path: Path) -> Callable[[], object]:
    """One bit of a file changed."""
    return lambda: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def exported(home: Path, data: str) -> Path:
    """An ONNX file with two equal tensors in a data file of this name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    (home / data).parent.mkdir(parents=True, exist_ok=True)
    tensors = [numpy_helper.from_array(values, name) for name, values in (("a", W), ("b", W.copy()))]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 8])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", [], [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(
        model, home / "m.onnx", save_as_external_data=True, location=data, size_threshold=0, convert_attribute=False
    )
    return home / data


def _git(home: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *words], cwd=home, check=True, capture_output=True)


Case = Callable[[Path], tuple[Path, tuple[str, ...], Callable[[], object]]]
"""A folder to be filled → (working directory, paths of the run, a change that makes another answer right)."""


def in_a_folder_called_venv(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    file = save(home / "venv/a.safetensors", {"a": W, "b": OTHER})
    return home, (), lambda: save(file, {"a": W, "b": W.copy()})


def a_folder_that_becomes_a_virtual_environment(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    save(home / "env/a.safetensors", {"a": W, "b": W.copy()})
    return home, (), lambda: (home / "env/conda-meta").mkdir()


def what_the_repository_excludes(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    _git(home, "init", "-q")
    return home, (), edit(home / ".git/info/exclude", "bad.safetensors\n")


def what_the_repository_of_a_worktree_excludes(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    (home / "main").mkdir()
    _git(home / "main", "init", "-q")
    _git(home / "main", "commit", "-q", "--allow-empty", "-m", "first")
    _git(home / "main", "worktree", "add", "-q", "../tree")
    save(home / "tree/bad.safetensors", {"a": W, "b": W.copy()})
    return home / "tree", (), edit(home / "main/.git/info/exclude", "bad.safetensors\n")


def a_repository_that_ends(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    save(home / "models/bad.safetensors", {"a": W, "b": W.copy()})
    (home / ".git").mkdir()
    (home / ".gitignore").write_text("models/bad.safetensors\n")
    return home, ("models",), lambda: (home / ".git").rmdir()


def the_policy_of_another_folder(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    (home / "here").mkdir()
    edit(home / "there/tieaudit.toml", "fail-on = 'error'\n")()
    return home / "here", ("../there",), edit(home / "there/tieaudit.toml", "fail-on = 'info'\n")


def the_baseline_of_another_policy(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    (home / "here").mkdir()
    edit(home / "there/tieaudit.toml", "baseline = '../far/known.json'\n")()
    text = '{"schema": "tieaudit/baseline/1", "findings": [%s]}'
    edit(home / "far/known.json", text % "")()
    return home / "here", ("../there",), edit(home / "far/known.json", text % '{"path": "gone", "fingerprint": "0"}')


def the_lock_of_another_policy(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    edit(home / "there/tieaudit.toml", "lock = '../far/ties'\n")()
    gone = 'version = 1\n[model."gone"]\nformat = "onnx"\nn_bytes = 0\nn_bytes_duplicate = 0\nties = []\n'
    (home / "here").mkdir()
    return home / "here", ("../there",), edit(home / "far/ties", gone)


def data_called_like_a_text(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    return home, (), flip(exported(home, "weights.txt"))


def data_where_no_model_is_looked_for(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    return home, (), flip(exported(home, "node_modules/weights.bin"))


def data_that_one_more_model_above_names(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    exported(home, "far/data/w.raw")
    return home, ("far/data/w.raw",), lambda: (home / "b.onnx").write_bytes((home / "m.onnx").read_bytes())


def the_groups_of_a_scheme(home: Path) -> tuple[Path, tuple[str, ...], Callable[[], object]]:
    edit(home / "tieaudit.toml", "expect = ['custom:groups/ties.txt']\n")()
    edit(home / "groups/ties.txt", "[[group]]\nmatch = ['none', 'such']\n")()
    return home, ("there",), edit(home / "groups/ties.txt", "[[group]]\nmatch = ['a', 'b']\n")


@pytest.mark.parametrize(
    "case",
    [
        in_a_folder_called_venv,
        a_folder_that_becomes_a_virtual_environment,
        what_the_repository_excludes,
        what_the_repository_of_a_worktree_excludes,
        a_repository_that_ends,
        the_policy_of_another_folder,
        the_baseline_of_another_policy,
        the_lock_of_another_policy,
        data_called_like_a_text,
        data_where_no_model_is_looked_for,
        data_that_one_more_model_above_names,
        the_groups_of_a_scheme,
    ],
    ids=lambda case: case.__name__,
)
def test_whatever_a_run_rests_on_changes_its_answer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    save(tmp_path / "bad.safetensors", {"a": W, "b": W.copy()})
    save(tmp_path / "there/bad.safetensors", {"a": W, "b": W.copy()})
    home, paths, change = case(tmp_path)
    monkeypatch.chdir(home)
    time.sleep(0.1)  # what changed less than 50 ms ago is not trusted, and nothing would be remembered
    run(paths=paths)
    before = said(run(paths=paths))
    change()
    after = said(run(paths=paths))
    assert after == said(run(paths=paths, no_cache=True))
    assert after != before


def said(found: Patrolled) -> object:
    """All that a run says, whichever way it came to it."""
    models = [replace(one, cached=False, n_bytes_read=0, files=()) for one in found.run.models]
    return models, found.run.errors, found.exit_code, found.notes


def test_reports_written_beside_the_models_make_nothing_new(tmp_path: Path, read: Callable[[], list[str]]) -> None:
    save(tmp_path / "a.safetensors", {"a": W, "b": W.copy()})
    time.sleep(0.1)  # what has just changed may change again
    report = tmp_path / "ties.json"
    for _ in range(2):
        run(outputs=(str(report),))
        report.write_text(str(time.time_ns()))
    assert read() == ["a.safetensors"]
    (kept,) = (Path(FOLDER) / environment() / "runs").glob("*.json")
    before = kept.stat().st_mtime_ns
    run(outputs=(str(report),))
    assert kept.stat().st_mtime_ns == before  # it was read back, and not made again
