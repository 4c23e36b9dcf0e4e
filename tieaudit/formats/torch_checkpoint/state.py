"""What a conversion must know of a checkpoint beyond its weights: what cannot be carried, and the versions of modules.

`read.py` describes every tensor as well as it can; here a tensor that is more than bytes of one type is a reason to
refuse, because the result would be loaded as something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tieaudit.dtypes import TABLE
from tieaudit.formats.torch_checkpoint.contents import Chosen, Contents
from tieaudit.formats.torch_checkpoint.opened import open_file
from tieaudit.formats.torch_checkpoint.pickles import Made, Ordered
from tieaudit.formats.torch_checkpoint.rebuild import Embedded, Parts, Tensor

_METADATA = "_metadata"


@dataclass(frozen=True)
class State:
    """A state dict's surroundings."""

    names: tuple[str, ...]
    """Of all its tensors."""
    problems: dict[str, str]
    """Name of a tensor → why another container, or a new checkpoint, cannot hold it."""
    beside: tuple[str, ...]
    """What the file holds that is no tensor of this state dict, by its key."""
    versions: object
    """The `_metadata` of the state dict (versions of modules), None if it has none."""


def state_of(path: Path, key: str = "") -> State:
    """Read the pickle of one file again. `key`: as it was chosen for the model. CorruptFile, UsageError.

    Cost: the pickle; no tensor.
    """
    opened = open_file(path)
    chosen = Contents(opened.value, str(path)).choose(key)
    script = opened.layout == "torchscript"
    names = tuple(name.lstrip(".") if script else name for name, *_ in chosen.tensors)
    leaves = [one[1] for one in chosen.tensors]
    problems = {name: because for name, leaf in zip(names, leaves, strict=True) if (because := _problem(leaf))}
    container, beside = _walk(opened.value, chosen.key)
    if container is opened.value and isinstance(container, dict):
        beside += [str(name) for name, one in container.items() if _is_container(one) and not _read(str(name), chosen)]
    beside += _inside(container)
    if script:
        beside = ["the code of the TorchScript program"]
    state = container.state if isinstance(container, Ordered) else None
    versions = state.get(_METADATA) if isinstance(state, dict) else None
    return State(names, problems, tuple(dict.fromkeys(beside)), versions if isinstance(versions, dict) else None)


def _problem(leaf: object) -> str:
    if isinstance(leaf, Parts):
        return f"it is a {leaf.kind.split()[0]} tensor, stored as {', '.join(leaf.tensors)}"
    if isinstance(leaf, Tensor):
        if leaf.stored is None:
            return "it is on the meta device: the file holds no values for it"
        if leaf.spelt or leaf.dtype not in TABLE:
            return f"its elements are of torch type {(leaf.spelt or leaf.dtype)[:40]}"
        return leaf.odd
    return ""


def _walk(value: object, key: str) -> tuple[object, list[str]]:
    """What is kept under a dotted key, and the keys beside it on the way there."""
    beside: list[str] = []
    while key and isinstance(value, dict):
        named = {str(name): one for name, one in value.items()}
        name = max((one for one in named if key == one or key.startswith(f"{one}.")), key=len, default=None)
        if name is None:
            break
        beside += [one for one in named if one != name]
        value, key = named[name], key[len(name) + 1 :]
    return value, beside


def _read(name: str, chosen: Chosen) -> bool:
    return any(one[0] == name or one[0].startswith(f"{name}.") for one in chosen.tensors)


def _is_container(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, Made))


def _inside(container: object) -> Iterator[str]:
    """Entries of the state dict itself that are no tensors, such as a step counter or the extra state of a module."""
    for name, value in container.items() if isinstance(container, dict) else ():
        if not isinstance(value, (Tensor, Parts, Embedded)) and not _is_container(value):
            yield str(name)
