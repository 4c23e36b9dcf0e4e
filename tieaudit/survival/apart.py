"""The survival table of `package.module:factory`: built and tried in a child process, because it is the user's code.

The child prints one JSON line when the module is built, and one for each operation. An operation that ends the child,
or holds it up, is a row; a new child builds the module again and goes on behind it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from tieaudit.errors import MissingPackage, TieAuditError, UnreadableModel, UsageError
from tieaudit.formats.torch_module import torch_module
from tieaudit.sandbox import child_environment, die_with_parent, how_it_ended
from tieaudit.survival import LIMIT_SECONDS, chosen, late, operations, row, ties_of, tried
from tieaudit.survival.ties import Survival, Survived

BUILD_SECONDS = 600.0
"""For the factory, imports included."""
GRACE_SECONDS = 15.0
"""For a child to interrupt an operation by itself before it is killed."""
COMMAND = (sys.executable, "-P", "-c", "from tieaudit.survival.apart import serve; serve()")
_TAIL_BYTES = 4000


def survival_of(
    name: str | None,
    other: str | None = None,
    *,
    only: Sequence[str] | None = None,
    seconds: float = LIMIT_SECONDS,
) -> Survival:
    """The table for what a factory makes, of all operations or those named in `only`, each with its limit of time.

    UsageError unless exactly one factory is named, or if it has no ties; UnreadableModel in one line if it makes no
    module or its process ends.
    """
    import importlib.util

    if name is None or other is not None or torch_module.named is None or not torch_module.named(name):
        raise UsageError(
            "--survival expects one live module, package.module:factory", hint="or tieaudit.survival(module)"
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingPackage("torch", "torch", f"{name}: building a PyTorch module")
    known = {one.name: one for one in operations()}
    left, rows = only, list[Survived]()
    while True:
        with _Child(name, left, seconds) as child:
            built = child.line(BUILD_SECONDS, f"the factory took more than {BUILD_SECONDS:g} s")
            for index, each in enumerate(built["operations"]):
                try:
                    rows.append(Survived(**child.line(seconds + GRACE_SECONDS, late(seconds))))
                except UnreadableModel as ended:
                    said = ended.message.removeprefix(f"{name}: ")
                    rows.append(row(known[each], "error", said))
                    left = built["operations"][index + 1 :]
                    break
            else:
                left = ()
        if not left:
            return Survival(tuple(map(tuple, built["ties"])), tuple(rows))


class _Child:
    """A process that builds the module and tries operations on it."""

    def __init__(self, name: str, only: Sequence[str] | None, seconds: float) -> None:
        self._name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [*COMMAND, name, json.dumps({"only": only, "seconds": seconds})],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
            env=child_environment(),
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _listen(self) -> None:
        if self._process.stdout is not None:
            with self._process.stdout as lines:
                for line in lines:
                    self._lines.put(line)
        self._lines.put("")

    def line(self, seconds: float, what: str) -> Mapping[str, Any]:
        """Its next answer. UnreadableModel if it ends before it, or takes too long; the error that it tells of."""
        try:
            text = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise UnreadableModel(f"{self._name}: {what}") from None
        if not text:
            ended = how_it_ended(self._process.wait())
            raise UnreadableModel(f"{self._name}: the process that ran the factory {ended}{self._last_words()}")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            kind = UsageError if answer["usage"] else UnreadableModel
            raise kind(answer["error"], hint=answer["hint"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""


def serve() -> None:
    """The child: builds, tries, answers line by line. Called by the parent's command line only."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the factory and the libraries print
    die_with_parent()
    from tieaudit.formats.torch_module.answer import built

    def tell(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        module, inputs = built(name)
        ties, wanted = ties_of(module), chosen(settings["only"])
    except TieAuditError as error:
        tell({"error": error.message, "hint": error.hint, "usage": isinstance(error, UsageError)})
        return
    tell({"ties": [one.names for one in ties], "operations": [one.name for one in wanted]})
    for one in wanted:
        tell(asdict(tried(one, module, inputs, ties, settings["seconds"])))
