"""Which model a file belongs to: a shard, an index, a configuration, a data file, a pointer, or one that is gone.

Names and headers decide. What can change the judgement of a model means that model; a tokenizer or a README does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tieaudit.formats import Format
from tieaudit.load import describe, formats, owner_of
from tieaudit.pointers import DVC, KEPT_AWAY, N_FOLDERS_UP, dvc_targets, elsewhere

Claim = tuple[Path, Format]
"""A file, there or not, and the format whose `group` says which model it is of."""

CONFIG = "config.json"
MANIFEST = "genai_config.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5,6}-of-(?P<total>\d{5,6})(?P<kind>\.safetensors|\.bin)", re.DOTALL)


class Owners:
    """Answers for many files; what was seen of a folder is remembered, so that thousands of files cost linear time."""

    def __init__(self) -> None:
        self._named_data: dict[Path, dict[str, list[Path]]] = {}
        self._families: dict[tuple[Path, str], list[Path]] = {}

    def at(self, path: Path) -> list[Claim]:
        """What a file is by itself, as a walk over folders asks of each: by its name and a few bytes.

        Data files are not asked about here, since their models lie in the same folders. Raises OSError.
        """
        if path.name.endswith(DVC):
            return [claim for kept in dvc_targets(path) if not os.path.lexists(kept) for claim in self._fetched(kept)]
        owner = owner_of(path)
        if owner is not None:
            return [(path, owner)]
        return self._by_name(path) if path.name.endswith(_sure_names()) and elsewhere(path) is not None else []

    def of(self, path: Path) -> list[Claim]:
        """The models that a named or changed file belongs to, whether or not the file is there. Raises OSError."""
        there = os.path.lexists(path)
        if path.name.endswith(DVC):
            kept = dvc_targets(path) if there else [path.with_name(path.name.removesuffix(DVC))]
            files = [one for one in kept if not one.is_dir()]
            return [claim for one in files for claim in (self.of(one) if os.path.lexists(one) else self._fetched(one))]
        found = self.at(path) if there else self._gone(path)
        if found or path.name != CONFIG and path.name != MANIFEST:
            return found or self._by_data(path)
        return [claim for one in _files(path.parent) for claim in self.at(one) if self._judged_with(path, claim)]

    def why_none(self, path: Path) -> str:
        """Why a file belongs to no model, in one sentence. Raises OSError."""
        if not os.path.lexists(path):
            return "gone, and so is the model that it belonged to"
        if path.parent.name == "blobs" and path.parent.parent.name.startswith("models--"):
            return "a blob of a Hugging Face cache: name the snapshot that leads to it"
        if path.name.endswith(DVC):
            kept = dvc_targets(path)
            if not kept:
                return "DVC keeps nothing below its folder"
            names = ", ".join(one.name for one in kept)
            if all(map(os.path.lexists, kept)):
                return f"DVC keeps {names}, which is no model"
            return f"{KEPT_AWAY}{names}, which no model is known by; run `dvc pull` to see"
        away = elsewhere(path)
        if away is not None:
            return f"{away.because}, and its name is none of a model"
        if not path.is_file():
            return "neither a file nor a folder"
        return "a configuration without weights" if path.name == CONFIG else describe(path)

    def _judged_with(self, settings: Path, claim: Claim) -> bool:
        """Whether a model beside a file of settings is judged by it: a manifest says which ONNX files are one model."""
        return (
            settings.name == CONFIG
            and not os.path.lexists(settings)
            or (settings.name == MANIFEST and claim[1].data_names is not None)
        )

    def _fetched(self, path: Path) -> list[Claim]:
        """What a file that DVC keeps would be."""
        return self._gone(path) or self._by_name(path) or self._by_data(path)

    def _gone(self, path: Path) -> list[Claim]:
        """Models of which a file that is not there was a part, and that are still there."""
        owner = owner_of(path)
        if owner is not None and any(os.path.lexists(model) and model != path for model, _ in owner.group([path])):
            return [(path, owner)]
        if elsewhere(path) is not None and (found := self._by_name(path)):
            return found
        return [claim for one in self._family(path) if one != path for claim in self.at(one)]

    def _family(self, path: Path) -> list[Path]:
        """The index of a shard, or without one the first shard of its set that is there."""
        named = _SHARD.fullmatch(path.name)
        if named is None:
            return []
        index = path.with_name(f"{named['stem']}{named['kind']}.index.json")
        if os.path.lexists(index):
            return [index]
        key = (path.parent, f"{named['stem']}|{named['total']}|{named['kind']}")
        if key not in self._families:
            self._families[key] = [
                one
                for one in _files(path.parent)
                if (other := _SHARD.fullmatch(one.name))
                and other.group("stem", "total", "kind") == named.group("stem", "total", "kind")
            ][:1]
        return self._families[key]

    def _by_name(self, path: Path) -> list[Claim]:
        """A file whose content is elsewhere, by the ending of its name."""
        return [(path, one) for one in formats() if path.name.endswith(one.sure_names)][:1]

    def _by_data(self, path: Path) -> list[Claim]:
        """Models that name this file as one that holds their weights."""
        for folder in (path.parent, *path.parent.parents)[: N_FOLDERS_UP + 1]:
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            if models := self._data_of(folder).get(name):
                return [claim for model in models for claim in self.at(model)]
        return []

    def _data_of(self, folder: Path) -> dict[str, list[Path]]:
        """Names of data files → the models of a folder that name them. Read once."""
        if folder not in self._named_data:
            found: dict[str, list[Path]] = {}
            for path in _files(folder):
                owner = owner_of(path) if path.name.endswith(_with_data()) else None
                for name in owner.data_names(path) if owner is not None and owner.data_names is not None else ():
                    found.setdefault(os.path.normpath(name).replace(os.sep, "/"), []).append(path)
            self._named_data[folder] = found
        return self._named_data[folder]


def _sure_names() -> tuple[str, ...]:
    return tuple(ending for one in formats() for ending in one.sure_names)


def _with_data() -> tuple[str, ...]:
    """Endings of the names of models whose weights may be in files beside them."""
    return tuple(ending for one in formats() if one.data_names is not None for ending in one.sure_names)


def _files(folder: Path) -> Iterator[Path]:
    """Files of a folder in order, links that lead nowhere among them; none of a folder that is not there."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
