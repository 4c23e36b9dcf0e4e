"""A model opened in a sandbox, part by part, under one setting: the least that verification needs of a runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tieaudit.model import Model
from tieaudit.registry import discover
from tieaudit.runners import Array, Runner, Signature
from tieaudit.sandbox import Sandbox


@dataclass(frozen=True)
class Setting:
    """A way of running that may not matter."""

    name: str
    opening: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the verb `open`."""
    running: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the verb `run`."""


USUAL = Setting("as usual")
VARIATIONS: Mapping[str, tuple[Setting, ...]] = {
    "onnxruntime": (
        Setting("one thread", {"threads": 1}),
        Setting("two threads", {"threads": 2}),
        Setting("optimisation off", {"level": "disable"}),
        Setting("prepacking off", {"prepack": False}),
    ),
    "torch": (
        Setting("one thread", {}, {"threads": 1}),
        Setting("two threads", {}, {"threads": 2}),
        Setting("batch split", {}, {"split": True}),
    ),
}
"""Changes that may not matter, by runner: the spread of the original under them is the noise floor."""


@dataclass(frozen=True)
class Opened:
    """One part of a model, loaded by a child."""

    sandbox: Sandbox
    setting: Setting
    handle: int
    generation: int
    signature: Signature
    facts: Mapping[str, Any]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. ChildFailed."""
        params = {"handle": self.handle, **self.setting.running}
        return self.sandbox.ask("run", params, feed)[1]


def runner_for(model: Model) -> Runner | str:
    """The runner of the model's format that is installed, or why there is none."""
    candidates: list[Runner] = [one for one in discover("runners", Runner).values() if model.format in one.formats]
    if not candidates:
        return f"nothing runs a model of the format {model.format}: it holds weights, but no program"
    reasons = [(one, one.available()) for one in candidates]
    for one, reason in reasons:
        if reason is None:
            return one
    return str(reasons[0][1])


def path_of(model: Model, part: str) -> str:
    """What a runner opens: the main file of a part, or the folder."""
    if model.format == "onnx":
        return next(one.paths[0] for one in model.parts if one.name == part)
    return model.path if Path(model.path).is_dir() else str(Path(model.path).parent)


def parts_of(model: Model) -> tuple[str, ...]:
    """Names of the parts that are run by themselves."""
    return tuple(part.name for part in model.parts) if model.format == "onnx" else ("",)


@contextmanager
def opened(sandbox: Sandbox, path: str, setting: Setting = USUAL) -> Iterator[Opened]:
    """Load one part, and free it afterwards. ChildFailed if the runtime cannot load it."""
    facts, _ = sandbox.ask("open", {"path": path, **setting.opening})
    one = Opened(sandbox, setting, facts["handle"], sandbox.generation, Signature.from_json(facts["signature"]), facts)
    try:
        yield one
    finally:
        if sandbox.generation == one.generation and sandbox.alive:
            sandbox.ask("close", {"handle": one.handle})
