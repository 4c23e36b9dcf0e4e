"""The survival table of `package.module:factory`: built and tried in a child process, because it is the user's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

from tieaudit.errors import MissingPackage, TieAuditError, UnreadableModel, UsageError
from tieaudit.formats.torch_module import torch_module
from tieaudit.printable import printable
from tieaudit.sandbox import child_environment, how_it_ended
from tieaudit.survival.ties import Survival, Survived

LIMIT_SECONDS = 1800.0
COMMAND = (sys.executable, "-P", "-c", "from tieaudit.survival.apart import serve; serve()")


def table(name: str | None, other: str | None, format_name: str) -> str:
    """What `verify --survival` prints. UsageError unless exactly one factory is named."""
    if name is None or other is not None or torch_module.named is None or not torch_module.named(name):
        raise UsageError(
            "--survival expects one live module, package.module:factory", hint="or tieaudit.survival(module)"
        )
    found = survival_of(name)
    if format_name == "text":
        return "\n".join(printable(line, None) for line in str(found).splitlines())
    return json.dumps({"schema": "tieaudit/survival/1", "model": name, **asdict(found)}, indent=2)


def survival_of(name: str) -> Survival:
    """The table for what a factory makes. UnreadableModel in one line if it makes no module, or its process ends."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingPackage("torch", "torch", f"{name}: building a PyTorch module")
    try:
        done = subprocess.run(
            [*COMMAND, name], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
            env=child_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnreadableModel(f"{name}: the operations took more than {LIMIT_SECONDS:g} s") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "it printed nothing"
        raise UnreadableModel(
            f"{name}: the process that ran the factory {how_it_ended(done.returncode)}: {last}"
        ) from None
    if "error" in answer:
        raise UnreadableModel(answer["error"], hint=answer["hint"])
    return Survival(tuple(map(tuple, answer["ties"])), tuple(Survived(**row) for row in answer["rows"]))


def serve() -> None:
    """The child: builds, tries, answers with one line. Called by the parent's command line only."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the factory and the libraries print
    from tieaudit.formats.torch_module.answer import built
    from tieaudit.survival import survival

    try:
        module, inputs = built(sys.argv[1])
        answer = asdict(survival(module, inputs))
    except TieAuditError as error:
        answer = {"error": error.message, "hint": error.hint}
    answers.write("\n" + json.dumps(answer) + "\n")
    answers.flush()
