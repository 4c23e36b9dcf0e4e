"""Work in several processes: all of it is answered, whatever happens to a process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gate_models import double, slow

from tieaudit import workers
from tieaudit.workers import spread


def lost(number: int, why: str) -> int:
    assert "killed" in why
    return -number


def test_all_work_is_done_once() -> None:
    assert sorted(spread(double, list(range(10)), 2, lost)) == [2 * n for n in range(10)]


def test_a_process_that_is_killed_costs_its_own_piece_of_work_and_no_other() -> None:
    found = sorted(spread(double, list(range(20)), 2, lost))
    assert found == sorted([-13, *(2 * n for n in range(20) if n != 13)])


def test_processes_are_replaced_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PIECES_EACH", 3)
    assert sorted(spread(double, list(range(9)), 2, lost)) == [2 * n for n in range(9)]


def test_who_stops_listening_leaves_no_process_behind() -> None:
    others = set(multiprocessing.active_children())  # what earlier tests left is still on its way out
    running = spread(slow, [0, 1, 2, 3], 2, lost)
    begun = time.monotonic()
    with pytest.raises(GeneratorExit):
        _throw_at(running)
    # The system is asked, not `is_alive`: while another thread (the pool's own) has reaped a process and not yet noted
    # it, `is_alive` takes the missing process for one that was not created yet, and says yes.
    ours = [child.pid for child in multiprocessing.active_children() if child not in others and child.pid]
    while any(map(_running, ours)) and time.monotonic() < begun + 28:  # the work itself would take 60 s
        time.sleep(0.1)
    assert [pid for pid in ours if _running(pid)] == []


def _throw_at(running: object) -> None:
    """Close a generator that waits, as an interrupt does."""
    import signal
    import threading

    def interrupt() -> None:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGUSR1)

    def raise_it(number: int, frame: object) -> None:
        raise GeneratorExit

    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        next(running)  # type: ignore[call-overload]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from gate_models import slow\n"
        "from tieaudit.workers import spread\n"
        "if __name__ == '__main__':\n"
        "    list(spread(slow, [1, 2, 3, 4], 2, lambda n, why: n))\n"
    )
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
    children: list[int] = []
    deadline = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = _children(parent.pid)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    while any(map(_running, children)) and time.monotonic() < deadline + 10:
        time.sleep(0.1)
    assert [pid for pid in children if _running(pid)] == []


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
