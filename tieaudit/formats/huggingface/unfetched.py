"""A folder whose weights are elsewhere, all of them or some shards: what the index, the class and config.json say.

The names come from the index where it is a real file, which then also says what is missing; else from the class. What
is not here is a weight with a place and no bytes: neither absent (nobody restores it) nor missing. A shape is known
only where the installed class says it; otherwise it is `(0,)`, and the weight may be a parameter or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tieaudit.dtypes import TABLE
from tieaudit.formats.huggingface.asking import ask_class
from tieaudit.formats.huggingface.defaults import certain_names
from tieaudit.formats.huggingface.facts import ClassFacts
from tieaudit.formats.huggingface.folder import WeightSet, architecture_of
from tieaudit.formats.safetensors.header import Entry, Header, read_header
from tieaudit.formats.safetensors.sharded import (
    INDEX_SUFFIX,
    Checkpoint,
    by_index,
    read_index_json,
    texts_of,
    weight_map_of,
)
from tieaudit.model import NOT_HERE, Weight
from tieaudit.pointers import Elsewhere, elsewhere
from tieaudit.storage import NotHere

UNKNOWN_SHAPE = (0,)
_NO_SHAPE = "its file is not here, so that its shape is not known"


@dataclass(frozen=True)
class Unfetched:
    """Which of a folder's weight files are elsewhere."""

    why: Mapping[str, Elsewhere]
    """File name → why it is not here."""
    n_files: int
    """Of the weights, the index not counted unless it is all that there is."""

    @property
    def said(self) -> str:
        """For the metadata: how many files, and the first of them."""
        name, first = next(iter(self.why.items()))
        many = f"{len(self.why)} of {self.n_files} files, the first: " if self.n_files > 1 else ""
        return f"{NOT_HERE}{many}{name} ({first.because})"

    @property
    def note(self) -> str:
        """The whole sentence: what cannot be told, and what to do."""
        hint = next(iter(self.why.values())).hint
        return f"the weights are {self.said}: which of them are equal, stored twice or differ cannot be told; {hint}"


def unfetched(chosen: WeightSet) -> Unfetched | None:
    """What of these weights is elsewhere; None if they are all here. Raises OSError."""
    index_here = chosen.main.name.endswith(".index.json") and len(chosen.files) > 2
    files = chosen.files[2:] if index_here else (chosen.main,)
    found = {file.name: away for file in files if (away := elsewhere(file)) is not None}
    return Unfetched(found, len(files)) if found else None


def read_unfetched(chosen: WeightSet, away: Unfetched, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint as far as it is known: headers of the shards that are here, names of the others.

    CorruptFile as for any other checkpoint. Cost: the headers; one question to the class where there is no index.
    """
    folder, headers = chosen.main.parent, dict[str, Header]()
    if len(chosen.files) < 3:  # no index, or not here either
        name = chosen.main.name
        headers[name] = _named(chosen.main, _names_of_class(config), away.why[name])
        return Checkpoint(chosen.main, headers, {entry.name: (name, entry) for entry in headers[name].entries})
    index = read_index_json(chosen.main)
    weight_map = weight_map_of(chosen.main, index)
    pickled = not chosen.main.name.endswith(INDEX_SUFFIX)
    because = next(iter(away.why.values()))
    for name in dict.fromkeys(weight_map.values()):
        if name in away.why or pickled:  # a pickle beside pointers is not opened: half a model has no use for it
            inside = (tensor for tensor, file in weight_map.items() if file == name)
            headers[name] = _named(folder / name, inside, away.why.get(name, because))
        else:
            headers[name] = read_header(folder / name)
    return Checkpoint(chosen.main, headers, by_index(chosen.main, weight_map, headers), texts_of(index))


def _named(file: Path, names: Iterable[str], away: Elsewhere) -> Header:
    because = f"{file.name}: {away.because}"
    entries = (Entry(name, "float32", UNKNOWN_SHAPE, NotHere(f"{file}#{name}", because)) for name in names)
    return Header(str(file), tuple(entries), {})


def _names_of_class(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Live names of the installed class; without it those that its data file spells out."""
    answer = ask_class(config, architecture_of(config), {})
    return tuple(answer["parameters"]) if "error" not in answer else certain_names(architecture_of(config))


def with_shapes(checkpoint: Checkpoint, facts: ClassFacts, config: Mapping[str, Any]) -> Checkpoint:
    """The same checkpoint, with shapes by the class and the element type by the configuration where a file is not here.

    Source of the key: transformers 5 writes `dtype`, transformers 4 `torch_dtype`.
    """
    said = config.get("dtype", config.get("torch_dtype"))
    dtype = said if isinstance(said, str) and said in TABLE else "float32"

    def shaped(entry: Entry) -> Entry:
        live = facts.live.get(entry.name, ())
        if not isinstance(entry.storage, NotHere):
            return entry
        known = len(live) == 1 and entry.name not in facts.converted
        return replace(entry, dtype=dtype, shape=facts.parameters.get(live[0], UNKNOWN_SHAPE) if known else entry.shape)

    headers = {
        name: replace(header, entries=tuple(map(shaped, header.entries))) for name, header in checkpoint.headers.items()
    }
    entries = {entry.name: (name, entry) for name, header in headers.items() for entry in header.entries}
    return replace(checkpoint, headers=headers, entries={name: entries[name] for name in checkpoint.entries})


def unsure(weight: Weight) -> Weight:
    """A weight of unknown shape may be a parameter or not: nothing of it is counted."""
    if isinstance(weight.storage, NotHere) and weight.shape == UNKNOWN_SHAPE:
        return replace(weight, parameter=None, because=_NO_SHAPE)
    return weight
