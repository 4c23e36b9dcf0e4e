"""A model opened in a sandbox, part by part, under one setting: the least that verification needs of a runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tieaudit.errors import TieAuditError
from tieaudit.formats.torch_export.layout import DEFAULT
from tieaudit.model import Model
from tieaudit.registry import discover
from tieaudit.runners import Array, Port, Runner, Signature
from tieaudit.sandbox import ChildFailed, Sandbox

Paths = str | tuple[str, ...]
"""One thing to open, or several that are run as one."""


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
    "torch_export": (
        Setting("one thread", {}, {"threads": 1}),
        Setting("two threads", {}, {"threads": 2}),
        Setting("batch split", {}, {"split": True}),
    ),
    # a module of the user's own need not have its batch in front, nor treat its rows apart
    "torch_module": (Setting("one thread", {}, {"threads": 1}), Setting("two threads", {}, {"threads": 2})),
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
    sample: Mapping[str, Array] = field(default_factory=dict)
    """Inputs that came with it."""

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. ChildFailed."""
        params = {"handle": self.handle, **self.setting.running}
        return self.sandbox.ask("run", params, feed)[1]


@dataclass(frozen=True)
class Chained:
    """Parts of one export, run in a row: what one makes another takes, under the names that exporters use."""

    links: tuple[Opened, ...]

    @property
    def signature(self) -> Signature:
        """What must be given to the whole; the outputs of the last part."""
        made: dict[str, str] = {}
        inputs: dict[str, Port] = {}
        for link in self.links:
            for port in link.signature.inputs:
                name = self._outside(link, port.name)
                if port.name not in made and name not in inputs:
                    inputs[name] = replace(port, name=name)
            made.update(_made_by(link.signature))
        return Signature(tuple(inputs.values()), self.links[-1].signature.outputs)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the last part. ChildFailed."""
        known = dict(feed)
        results: dict[str, Array] = {}
        for link in self.links:
            takes = {port.name: known.get(self._outside(link, port.name)) for port in link.signature.inputs}
            takes = {name: known.get(name) if array is None else array for name, array in takes.items()}
            results = link.run({name: array for name, array in takes.items() if array is not None})
            known.update({taken: results[made] for taken, made in _made_by(link.signature).items() if made in results})
        return results

    def _outside(self, link: Opened, name: str) -> str:
        """A decoder calls its own tokens and mask what the whole calls the decoder's, and its encoder's as well."""
        takes = {port.name for port in link.signature.inputs}
        if link is self.links[0] or not takes & {"encoder_hidden_states", "encoder_attention_mask"}:
            return name
        renamed = {"input_ids": "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
        return {**renamed, "encoder_attention_mask": "attention_mask"}.get(name, name)


def _made_by(signature: Signature) -> dict[str, str]:
    """Input name of a later part → output of this one."""
    made = {port.name: port.name for port in signature.outputs}
    hidden = next((port.name for port in signature.outputs if port.name == "last_hidden_state"), None)
    if hidden is None and signature.outputs:
        hidden = signature.outputs[0].name
    return {**made, "encoder_hidden_states": hidden} if hidden is not None else made


def runner_for(model: Model) -> Runner | str:
    """The runner of the model's format that is installed, or why there is none."""
    candidates: list[Runner] = [one for one in discover("runners", Runner).values() if model.format in one.formats]
    if not candidates:
        return f"nothing runs a model of the format {model.format}: it holds weights, but no program"
    if model.format == "torch_export" and (key := model.metadata.get("key", "")) not in ("", DEFAULT):
        return f"only the program that torch.export.load returns is run, and {key} is another one of the archive"
    reasons = [(one, one.available()) for one in candidates]
    for one, reason in reasons:
        if reason is None:
            return one
    return str(reasons[0][1])


def path_of(model: Model, part: str) -> str:
    """What a runner opens: the main file of a part, or the folder."""
    if model.format == "onnx":
        return next(one.paths[0] for one in model.parts if one.name == part)
    if model.format in ("torch_export", "torch_module"):
        return model.path
    return model.path if Path(model.path).is_dir() else str(Path(model.path).parent)


def parts_of(model: Model) -> tuple[str, ...]:
    """Names of the parts that are run by themselves."""
    return tuple(part.name for part in model.parts) if model.format == "onnx" else ("",)


def chain_of(model: Model) -> tuple[str, ...]:
    """The parts that together are the whole model: those that make what others take first.

    Parts for later steps (`with_past`) repeat what the first step does, and are left out.
    """
    names = [part for part in parts_of(model) if "with_past" not in part]
    names.sort(key=lambda name: (0 if "encoder" in name else 1 if "embed" in name else 2, name))
    return tuple(path_of(model, name) for name in names)


@contextmanager
def opened_whole(sandbox: Sandbox, path: Paths, setting: Setting = USUAL) -> Iterator[Opened | Chained]:
    """Load one part, or several that are run as one, and free it afterwards. ChildFailed if it cannot be loaded."""
    with ExitStack() as stack:
        links = [
            stack.enter_context(opened(sandbox, one, setting)) for one in ((path,) if isinstance(path, str) else path)
        ]
        yield links[0] if len(links) == 1 else Chained(tuple(links))


def _instead(sandbox: Sandbox, path: str) -> Mapping[str, Any]:
    """What a child is given beside a path: for an exported program the pieces of one that is safe to load."""
    if sandbox.runner.name != "torch_export":
        return {}
    from tieaudit.formats.torch_export.handing import handed

    try:
        return handed(Path(path), sandbox.device)
    except TieAuditError as error:
        raise ChildFailed(error.message, "error") from error


@contextmanager
def opened(sandbox: Sandbox, path: str, setting: Setting = USUAL) -> Iterator[Opened]:
    """Load one part, and free it afterwards. ChildFailed if the runtime cannot load it."""
    facts, sample = sandbox.ask("open", {"path": path, **_instead(sandbox, path), **setting.opening})
    signature = Signature.from_json(facts["signature"])
    one = Opened(sandbox, setting, facts["handle"], sandbox.generation, signature, facts, sample)
    try:
        yield one
    finally:
        if sandbox.generation == one.generation and sandbox.alive:
            sandbox.ask("close", {"handle": one.handle})
