"""Exchange a model's files again and again, killed or failing at each step in turn; run in a process of its own.

    python exchange_under_fire.py MODE FOLDER NAME SCHEME

MODE: `kill` ends the process, `fail` makes the step fail, `recover` kills at the middle and then kills what puts things
back at each of its steps; with `-unlinked` behind it the file system has no hard links. FOLDER holds the model NAME.
Prints how many steps were tried as JSON, or raises. Steps are what the interpreter itself reports as it makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tieaudit.change import Plan, Proof
from tieaudit.errors import RewriteRefused
from tieaudit.exchange import exchange
from tieaudit.journal import interrupted, recover
from tieaudit.load import load_one
from tieaudit.model import Model
from tieaudit.plan import Choices, plan
from tieaudit.rewrite import rewrite
from tieaudit.scan import look

_CHANGES = {"os.rename", "os.link", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
_DONE, _REFUSED = 0, 3


def listing(folder: Path) -> dict[str, str]:
    """Every name below a folder: what is in the file, or where the link leads."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"→ {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without_receipt(found: dict[str, str]) -> dict[str, str]:
    """Receipts say when they were written, so that no two of them are equal."""
    return {name: value for name, value in found.items() if not name.endswith("receipt.json")}


def visible(found: dict[str, str]) -> dict[str, str]:
    """Without what lies in hidden folders."""
    return {name: value for name, value in found.items() if not name.startswith(".") and "/." not in name}


def at_step(number: int, kill: bool) -> Callable[[str, tuple[object, ...]], None]:
    left = [number]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in _CHANGES and not writes:
            return
        left[0] -= 1
        if left[0] == -1:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

    return hook


def child(work: Callable[[], object], number: int | None, kill: bool = True) -> int:
    """The exit code of a process that does this work and is hit at a step; negative: the signal that ended it."""
    process = os.fork()
    if process == 0:
        code = 4
        try:
            if number is not None:
                sys.addaudithook(at_step(number, kill))
            work()
            code = _DONE
        except (RewriteRefused, OSError) as error:
            print(error, file=sys.stderr)
            code = _REFUSED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Scene:
    """A model in a fresh copy of its folder, and the rewritten one in a workspace beside it."""

    def __init__(self, source: Path, name: str, scheme: str) -> None:
        self.source = source
        self.home = source.with_name(source.name + "-tried")
        self.work = self.home / name if (source / name).is_dir() else self.home
        self.workspace = self.work / ".model.tieaudit-00000000-1-000000000000"
        shutil.copytree(source, self.home, symlinks=True)
        self.model: Model = load_one(self.home / name)
        self.plan: Plan = plan(look(self.model), Choices((scheme,)))
        assert self.plan.edits, self.plan.refusals
        self.old = listing(self.home)
        self.new: dict[str, str] = {}

    def set(self) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(self.source, self.home, symlinks=True)
        self.workspace.mkdir()
        self.written, _ = rewrite(self.model, self.plan, self.workspace)

    def exchange(self) -> None:
        exchange(self.model, self.plan, self.written, Proof(()), self.workspace)

    def clear(self) -> dict[str, str]:
        """What is there after the workspace of the killed run was swept up."""
        shutil.rmtree(self.workspace, ignore_errors=True)
        return listing(self.home)


def hit_everywhere(scene: Scene, kill: bool) -> int:
    scene.set()
    assert child(scene.exchange, None) == _DONE
    new = scene.clear()
    scene.new = without_receipt(new)
    assert without_receipt(new) != scene.old
    number = 0
    while True:
        scene.set()
        code = child(scene.exchange, number, kill)
        found = scene.clear()
        if not kill:
            assert code in (_DONE, _REFUSED), code
            expected = without_receipt(new) if code == _DONE else scene.old
            assert {name: found[name] for name in without_receipt(visible(found))} == expected, (number, code, found)
        for name, value in visible(found).items():
            assert value in (scene.old.get(name), new.get(name)) or name.endswith("receipt.json"), (number, name)
        if os.environ.get("UNLINKED") is None:
            gone = scene.old.keys() - visible(found).keys() - (scene.old.keys() - new.keys())
            assert not gone, (number, gone)  # a name that stays is there at every moment
        recover(scene.home)
        found = scene.clear()
        assert interrupted(scene.home) == []
        assert without_receipt(found) in (scene.old, without_receipt(new)), (number, found)
        if without_receipt(found) == scene.old:
            assert found == scene.old  # no receipt of what has not happened
        if code == _DONE:
            assert without_receipt(found) == without_receipt(new)
            if kill:
                return number
        number += 1
        if number > 200:
            return number
        if not kill and code == _DONE and number > 60:
            return number


def hit_recovery(scene: Scene) -> int:
    n_steps = hit_everywhere(scene, kill=True)
    tried = 0
    for first in range(n_steps // 3, n_steps, 2):
        for second in range(200):
            scene.set()
            child(scene.exchange, first)
            scene.clear()
            code = child(lambda: recover(scene.home), second)
            tried += 1
            recover(scene.home)
            found = scene.clear()
            assert interrupted(scene.home) == []
            assert without_receipt(found) in (scene.old, scene.new), (first, second)
            if code == _DONE:
                break
    return tried


def main() -> None:
    mode, folder, name, scheme = sys.argv[1:]
    mode, _, unlinked = mode.partition("-")
    os.fsync = lambda handle: None  # type: ignore[assignment]  # no power is lost here, and waiting for disks is most of it
    if unlinked:
        os.environ["UNLINKED"] = "1"

        def no_links(source: object, target: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        os.link = no_links  # type: ignore[assignment]
    scene = Scene(Path(folder), name, scheme)
    tried = hit_recovery(scene) if mode == "recover" else hit_everywhere(scene, kill=mode == "kill")
    print(json.dumps({"steps": tried}))


if __name__ == "__main__":
    main()
