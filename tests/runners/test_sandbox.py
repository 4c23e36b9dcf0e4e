"""The child process: whatever happens in it is a result. The runner here is found by its entry point."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tieaudit.runners import Runner
from tieaudit.sandbox import ChildFailed, Sandbox, pack, unpack

CODE = """
import os, signal, sys, time
import numpy as np
from tieaudit.runners import Runner

def start(device):
    def raises(params, arrays):
        raise ValueError("the model\\nis wrong")
    def hog(params, arrays):
        return {"size": len(np.ones(params["n"], np.uint8))}, {}
    def prints(params, arrays):
        print("noise on stdout", flush=True)
        os.system("echo more noise")
        return {"device": device}, {}
    return {
        "echo": lambda params, arrays: (dict(params), dict(arrays)),
        "crash": lambda params, arrays: os.kill(os.getpid(), signal.SIGSEGV),
        "leave": lambda params, arrays: (print("goodbye", file=sys.stderr), os._exit(3)),
        "sleep": lambda params, arrays: time.sleep(60),
        "raise": raises, "hog": hog, "print": prints,
        "where": lambda params, arrays: ({"pid": os.getpid(), "torch": "torch" in sys.modules}, {}),
    }

RUNNER = Runner("fake", "Fake Runtime", ("onnx",), (), "fake", start)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "fake_runner.py").write_text(CODE)
    facts = tmp_path / "fake_runner-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-runner\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[tieaudit.runners]\nfake = fake_runner:RUNNER\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Runner("fake", "Fake Runtime", ("onnx",), (), "fake", lambda device: {})


def test_a_crash_is_a_result_with_the_signals_name_and_the_next_request_gets_a_new_child(fake: Runner) -> None:
    with Sandbox(fake) as box:
        first = box.ask("where")[0]["pid"]
        with pytest.raises(ChildFailed, match="Fake Runtime crashed with signal SIGSEGV") as caught:
            box.ask("crash")
        assert caught.value.kind == "crashed"
        assert not box.alive
        assert box.ask("where")[0]["pid"] not in (first, os.getpid())
        assert box.generation == 2


def test_an_exit_is_a_result_with_the_last_line_that_was_printed(fake: Runner) -> None:
    with Sandbox(fake) as box, pytest.raises(ChildFailed, match="exit code 3: goodbye"):
        box.ask("leave")


def test_a_run_beyond_its_time_is_ended(fake: Runner) -> None:
    with Sandbox(fake, seconds=30) as box:
        box.ask("where")
        with pytest.raises(ChildFailed, match=r"did not finish within 0\.3 s") as caught:
            box.ask("sleep", seconds=0.3)
        assert caught.value.kind == "timed out"
        assert not box.alive


def test_memory_beyond_the_limit_is_refused_in_the_child(fake: Runner) -> None:
    with Sandbox(fake, memory_bytes=1 << 30) as box:
        assert box.ask("hog", {"n": 1 << 20})[0]["size"] == 1 << 20
        with pytest.raises(ChildFailed) as caught:
            box.ask("hog", {"n": 2 << 30})
        assert caught.value.kind == "out of memory"
        assert box.ask("hog", {"n": 1 << 20})[0]["size"] == 1 << 20  # the child survived


def test_an_exception_is_one_line_with_the_runtimes_name(fake: Runner) -> None:
    with Sandbox(fake) as box, pytest.raises(ChildFailed, match=r"^Fake Runtime: the model is wrong$"):
        box.ask("raise")


def test_what_the_runtime_prints_does_not_disturb_the_answers(fake: Runner) -> None:
    with Sandbox(fake) as box:
        assert box.ask("print")[0] == {"device": "cpu"}
        assert box.ask("echo", {"a": 1})[0] == {"a": 1}


def test_the_users_folder_is_not_imported_from(fake: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "json.py").write_text("raise SystemExit('imported the wrong json')")
    monkeypatch.chdir(work)
    with Sandbox(fake) as box:
        assert box.ask("where")[0]["torch"] is False


def test_arrays_of_every_kind_travel_unchanged(fake: Runner, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "float": rng.standard_normal((2, 3)).astype(np.float32),
        "half/with a strange|name": np.array([0.0, -0.0, np.nan, np.inf], np.float16),
        "bfloat16": rng.standard_normal((4,)).astype(ml_dtypes.bfloat16),
        "float8": rng.standard_normal((4,)).astype(ml_dtypes.float8_e4m3fn),
        "int4": np.array([-8, 7], ml_dtypes.int4),
        "bool": np.array([True, False]),
        "text": np.array(["a", "äöü"]),
        "scalar": np.array(2**62, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "view": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    with Sandbox(fake) as box:
        back = box.ask("echo", {}, arrays)[1]
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    objects = np.array(["x", "yy"], dtype=object)
    assert list(unpack(tmp_path / "o.npz", pack({"o": objects}, tmp_path / "o.npz"))["o"]) == ["x", "yy"]


def test_closing_removes_the_childs_folder(fake: Runner) -> None:
    box = Sandbox(fake)
    box.ask("where")
    folder = box._place()
    box.close()
    box.close()
    assert not folder.exists()
