"""Formats: one module (or folder) each. A format locates, edits and creates; it never judges.

Adding a format is one new module here that defines one `Format`; `load.py` finds it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from tieaudit.change import Edit, Gain, Kind, Plan, Pool, SetConfig, Written
    from tieaudit.model import Model

P = ParamSpec("P")
R = TypeVar("R")

NOT_CARRIED = frozenset({".git", ".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints", ".tieaudit_cache"})
"""Folders that belong to a tool and not to the model: a rewrite leaves them where they are."""

RECEIPT_NAME = "tieaudit.receipt.json"
"""The receipt of a delivered folder. A rewrite of that folder is another delivery, with a receipt of its own."""

KEY_GIVEN = "key_given"
"""Metadata of a model: the key that the user chose in a file, so that what is written is read back in the same way."""
_WORKSPACE = re.compile(r"\..*\.tieaudit-", re.DOTALL)
"""Where `rewrite` writes; one that is left of a killed run is no part of the model it lies in."""

NEEDS_SETTING = "needs flag: "
"""How a reason of `can_realise` begins when a setting would lift it; `switch` then names the setting."""


@dataclass(frozen=True)
class Format:
    """What tieaudit can do with one kind of model."""

    name: str
    summary: str
    """One line for the documentation."""
    targets: tuple[str, ...]
    """Consumers a rewrite can be made safe for, the default first."""
    owns: Callable[[Path], bool]
    """Whether this existing path (file or folder) is, or belongs to, a model of this format. Reads a few bytes."""
    group: Callable[[Sequence[Path]], list[tuple[Path, tuple[Path, ...]]]]
    """Owned paths → models: (the model's path, its main files). A shard is mapped to its owner here."""
    load: Callable[[Path, tuple[Path, ...]], Model]
    """One model. CorruptFile or another UnreadableModel if it cannot be read."""
    can_realise: Callable[[Model, Edit, str], str | None] | None = None
    """(model, edit, target) → why this edit cannot be made, or None. None instead of a function: read only."""
    edit: Callable[[Model, Plan, Path], Written] | None = None
    """Write the planned model into the new folder `dest`; every other file of the model comes along."""
    create: Callable[[Model, Plan, Path], Written] | None = None
    """Write a model of another container, changed as planned, as the new file or folder `plan.into` in `dest`."""
    can_create: Callable[[Model, Edit, Kind, str], str | None] | None = None
    """As `can_realise`, of an edit to a model that becomes this container."""
    switch: Callable[[Model, tuple[str, ...], bool, str], tuple[SetConfig, ...] | str] | None = None
    """(model, ids, tied, target) → the settings that make the loader tie (or not tie) these ids, or why not."""
    load_key: Callable[[Path, tuple[Path, ...], str], Model] | None = None
    """As `load`, of what a file that holds several models keeps under a key; UsageError if it has no such key."""
    load_inputs: Callable[[Path, tuple[Path, ...], Path], Model] | None = None
    """As `load`, with an .npz of sample inputs, from which the uses then come."""
    named: Callable[[str], bool] | None = None
    """Whether a text that is no path names a model of this format (`package.module:factory`)."""
    notes: Callable[[Model, Sequence[Edit], bool], tuple[str, ...]] | None = None
    """(model, edits, adjust) → what making them means for other contents of the files, in sentences for the plan;
    `adjust`: whether an optimizer's state follows the edits."""
    equalises: bool = False
    """Whether unequal weights can get one value under each of their names (`Equalise`), where nobody would restore a
    name that is left out."""
    held_by: Callable[[Model], str] | None = None
    """Which loaders make one tensor of equal values, and which hold several, in a sentence for the plan."""
    has_program: bool = True
    """Whether a model of this format can be run, alone or by the library that knows its class; else the structural
    proof is all that there can be."""
    pool: Callable[[Model, str, int], tuple[Pool | SetConfig, ...] | str] | None = None
    """(model, id of a projection, number of groups) → the edits that pool its heads, with those of all others that can
    only be pooled together with it, and the settings that say so; or why they cannot be."""
    holds_adjustments: bool = False
    """Whether `edit` writes what a share's members apply to the common value, as operations of the program."""
    gain: Callable[[Model, str], Gain | str] | None = None
    """(model, id of an output head) → the norm before it, if it is certain that nobody else reads what that gives and
    how its gain is applied; or why that is not certain."""
    has_parts: bool = False
    """Whether files of one folder may be parts of one model, so that one of them means all."""
    stands_for_folder: Callable[[Sequence[Path]], bool] | None = None
    """Whether a model of several files is the one that their folder stands for, among models of this format there;
    any other is known by its first file. None: a folder never holds several."""
    sure_names: tuple[str, ...] = ()
    """Endings of names by which a file is known to be of this format although its content is not here."""
    data_names: Callable[[Path], set[str]] | None = None
    """Of a main file, the files beside it that hold its weights, as it names them, relative to its folder."""
    loads_without_weights: bool = False
    """Whether `load` says what it can of a model whose weights are elsewhere, instead of WeightsNotHere."""
    precedence: int = 0
    """Among formats that own one path the highest wins (a Hugging Face folder over the safetensors inside)."""

    def settings(self, model: Model, edit: Edit, target: str) -> tuple[SetConfig, ...] | str:
        """What else must be set so that this edit can be made, mostly nothing; or why it cannot be made."""
        from tieaudit.change import Share

        if self.can_realise is None:
            return f"the format {self.name} cannot be rewritten"
        because = self.can_realise(model, edit, target)
        if because is None:
            return ()
        if because.startswith(NEEDS_SETTING) and self.switch is not None and isinstance(edit, Share):
            return self.switch(model, tuple(member.id for member in edit.members), True, target)
        return because.removeprefix(NEEDS_SETTING)


def carried(folder: Path) -> Iterator[Path]:
    """Every regular file below a model's folder that comes along when the model is written anew, in order.

    Links to files are followed, as in a Hub cache; links to folders are not.
    """
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_CARRIED and not _WORKSPACE.match(name))
        for name in sorted(names):
            path = Path(home) / name
            if path.is_file() and path != folder / RECEIPT_NAME:
                yield path


def later(where: str) -> Callable[P, R]:
    """The function `package.module:name`, imported when it is first called.

    Asking whose a path is must not cost what reading it costs. What is imported must fit the field of `Format` that it
    is given to: no type checker sees through a text, so a test compares the two for every format.
    """
    module, _, name = where.partition(":")

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found: Callable[P, R] = getattr(importlib.import_module(module), name)
        return found(*args, **kwargs)

    call.__qualname__ = where
    return call
