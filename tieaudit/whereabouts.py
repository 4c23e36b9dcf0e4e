"""Where an engineer has to look: the file of a finding, and the line where a text file holds the cause."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from tieaudit.checked import Place
from tieaudit.model import Model
from tieaudit.verdict import Finding

MAX_TEXT_BYTES = 32_000_000
"""Of a configuration in which a line is looked for."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,\n]')
_NEAREST = ("architectures", "model_type")
"""Where a setting is not written and a class has its default: the line that names the class."""


def place_of(model: Model, finding: Finding, base: Path) -> Place:
    """The line of the setting that a finding is about, else the file that holds its first weight.

    Cost: one read of the configuration where the finding names a setting; nothing otherwise.
    """
    name, _, key = str(finding.evidence.get("condition", "")).partition(":")
    name, key = str(finding.evidence.get("file", name)), str(finding.evidence.get("key", key))
    if name and key:
        file = _beside(model, name)
        if file is not None:
            return Place(shown(file, base), _line(file, key))
    held = next((file for id in finding.ids if (file := _holder(model, id)) is not None), None)
    return Place(shown(held if held is not None else main_file(model), base))


def _holder(model: Model, id: str) -> Path | None:
    """The file that holds a weight: its shard, but not a bare data file, which nobody knows by name."""
    weight = model.by_id.get(id)
    if weight is None or weight.storage is None:
        return None
    main = next((Path(part.paths[0]) for part in model.parts if part.name == weight.part and part.paths), None)
    file = Path(weight.storage.region[0])
    if main is not None and main.is_file() and main.suffix == ".onnx":
        return main
    return file if file.is_file() else None


def main_file(model: Model) -> Path:
    """The file by which a model is known: itself, or in a folder its configuration or first file."""
    path = Path(model.path)
    if not path.is_dir():
        return path
    files = [Path(name) for part in model.parts for name in part.paths]
    return next((file for file in files if file.parent == path or path in file.parents), path)


def shown(path: Path, base: Path) -> str:
    """A path as reports show it: POSIX, relative to `base` where it lies below it."""
    absolute = os.path.normpath(path if path.is_absolute() else Path.cwd() / path)
    try:
        relative = PurePath(absolute).relative_to(base)
    except ValueError:
        return PurePath(absolute).as_posix()
    return relative.as_posix()


def work_tree(folder: Path) -> str:
    """The work tree of git that holds an absolute folder; empty where there is none."""
    return next((str(one) for one in (folder, *folder.parents) if os.path.lexists(one / ".git")), "")


def _beside(model: Model, name: str) -> Path | None:
    """The file of this name that belongs to the model."""
    files = [Path(path) for part in model.parts for path in part.paths if Path(path).name == name]
    home = Path(model.path)
    files += [home / name] if home.is_dir() else []
    return next((file for file in files if file.is_file()), None)


def _line(file: Path, key: str) -> int:
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            return 0
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    lines = lines_of_keys(text)
    return next((lines[one] for one in (key, *_NEAREST) if one in lines), 1)


def lines_of_keys(text: str) -> dict[str, int]:
    """Dotted key → line, counted from 1, of every key of the objects of a JSON text, outside of lists.

    For keys that are there twice the last one, which a reader takes. Text that is no JSON gives what can be followed.
    Cost: linear; the text is not parsed.
    """
    found: dict[str, int] = {}
    path: list[str] = []
    opened: list[bool] = []
    line, said, said_at, pending = 1, "", 1, ""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token.startswith('"'):
            said, said_at = token[1:-1], line
        elif token == ":" and opened and opened[-1]:
            pending = said
            if all(opened):
                found[".".join([*path, pending])] = said_at
        elif token in "{[":
            if opened:
                path.append(pending if opened[-1] else "")
            opened.append(token == "{")
        elif token in "}]" and opened:
            opened.pop()
            if path:
                path.pop()
    return found
