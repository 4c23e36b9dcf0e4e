"""What a mending would do, shown before it is done: settings as a unified diff, tensors, files. Writes nothing."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tieaudit.change import Plan, Respell, SetConfig, Share
from tieaudit.mend import Mending
from tieaudit.model import Declaration, Model, Weight, classes
from tieaudit.printable import counted, listed, printable, size

N_MOST_CLASSES = 6
_INDEX = ".index.json"


@dataclass(frozen=True)
class OneTensor:
    """Weights that become one stored tensor."""

    kept: str
    """Id of the one whose name stays; of an ONNX matrix whose layout is changed its name may be another's."""
    dropped: tuple[str, ...]
    """Ids that are read from it afterwards."""
    dtype: str
    shape: tuple[int, ...]
    n_bytes_saved: int


@dataclass(frozen=True)
class Preview:
    """What would change in one model."""

    path: str
    settings: tuple[str, ...]
    """A unified diff of each file of settings that changes."""
    tensors: tuple[OneTensor, ...]
    respelt: tuple[str, ...]
    """Ids of weights that stay, and that operations read in another way afterwards."""
    files: tuple[str, ...]
    """Files that would be written anew, relative to the model's folder; all others stay byte for byte."""
    n_bytes_saved: int
    not_mended: tuple[tuple[str, tuple[str, ...], str], ...]
    """Code, ids and reason of the findings that stay."""


def preview(mending: Mending) -> Preview:
    """What a mending would do. Cost: that of reading the settings."""
    model, plan = mending.model, mending.plan
    left = tuple((one.finding.code, one.finding.ids, one.because) for one in mending.left)
    if plan is None:
        return Preview(model.path, (), (), (), (), 0, left)
    tensors = tuple(sorted(_tensors(model, plan), key=lambda one: -one.n_bytes_saved))
    return Preview(
        path=model.path,
        settings=tuple(_settings(model, plan)),
        tensors=tensors,
        respelt=tuple(edit.weight for edit in plan.edits if isinstance(edit, Respell)),
        files=tuple(_files(model, plan, tensors)),
        n_bytes_saved=plan.n_bytes_saved,
        not_mended=left,
    )


def _home(model: Model) -> Path:
    return Path(model.path) if Path(model.path).is_dir() else Path(model.path).parent


def _settings(model: Model, plan: Plan) -> Iterator[str]:
    from tieaudit.formats.huggingface.write import configured

    found: dict[str, list[SetConfig]] = {}
    for edit in plan.edits:
        if isinstance(edit, SetConfig):
            found.setdefault(edit.file, []).append(edit)
    for name, edits in found.items():
        path = _home(model) / name
        old, new = path.read_bytes().decode("utf-8"), configured(path, edits)
        lines = difflib.unified_diff(_lines(old), _lines(new), f"a/{name}", f"b/{name}", lineterm="")
        yield "\n".join(lines)


def _lines(text: str) -> list[str]:
    """Without their ends; `diff` says where the last one has none."""
    found = text.split("\n")
    return found[:-1] if found[-1] == "" else [*found[:-1], f"{found[-1]}\n\\ No newline at end of file"]


def _tensors(model: Model, plan: Plan) -> Iterator[OneTensor]:
    shares = [edit for edit in plan.edits if isinstance(edit, Share)]
    for ids in classes([member.id for member in edit.members] for edit in shares):
        stored = [model.by_id[id] for id in ids if not model.by_id[id].absent]
        order = _order(model.declarations, ids)
        kept = min(stored, key=lambda one: order.index(one.id) if one.id in order else len(order))
        regions = {one.storage.region: one.n_bytes for one in stored if one.storage is not None}
        saved = sum(regions.values()) - max(regions.values(), default=0)
        dropped = tuple(one.id for one in stored if one is not kept)
        yield OneTensor(kept.id, dropped, kept.dtype, kept.shape, saved)


def _order(declarations: Iterable[Declaration], ids: tuple[str, ...]) -> list[str]:
    """Whose name stays, first: the declaring class decides it, as the format does."""
    return [id for one in declarations if {*ids} <= {*one.members} for id in one.members]


def _files(model: Model, plan: Plan, tensors: Iterable[OneTensor]) -> Iterator[str]:
    """Of a graph, all files of a part that is touched and of those that share data with it; else what is dropped."""
    home = _home(model).absolute()
    paths = [[Path(path).absolute() for path in part.paths] for part in model.parts]
    touched: set[Path] = set()
    respelt = [edit.weight for edit in plan.edits if isinstance(edit, Respell)]
    if model.has_graph:
        changed = {id for one in tensors for id in (one.kept, *one.dropped)} | {*respelt}
        parts = {model.by_id[id].part for id in changed}
        todo = [files for part, files in zip(model.parts, paths, strict=True) if part.name in parts]
        touched.update(file for files in todo for file in files)
        if any(len({model.by_id[id].part for id in (one.kept, *one.dropped)}) > 1 for one in tensors):
            touched.add(_common_file(home))
        while more := [files for files in paths if touched & {*files[1:]} and not touched >= {*files}]:
            touched.update(file for files in more for file in files)
    else:
        dropped = [model.by_id[id] for one in tensors for id in one.dropped]
        touched.update(file for weight in dropped if (file := _file_of(weight)) is not None)
        if touched:
            touched.update(file for files in paths for file in files if file.name.endswith(_INDEX))
    touched.update(home / edit.file for edit in plan.edits if isinstance(edit, SetConfig))
    yield from sorted(os.path.relpath(file, home) for file in touched)


def _common_file(home: Path) -> Path:
    """Where weights go that several parts share."""
    from tieaudit.formats.onnx.bench import SHARED_FILE

    names = itertools.chain([SHARED_FILE], (SHARED_FILE.replace(".", f"_{n}.", 1) for n in itertools.count(1)))
    return next(home / name for name in names if not (home / name).exists())


def _file_of(weight: Weight) -> Path | None:
    return Path(weight.storage.region[0]).absolute() if weight.storage is not None else None


def shown(found: Preview) -> str:
    """A preview as text: what `--diff` prints."""
    lines = [printable(found.path, None)]
    for diff in found.settings:
        lines += [printable(line, None) for line in diff.split("\n")]
    for one in found.tensors[:N_MOST_CLASSES]:
        what = f"{one.dtype} {list(one.shape)}"
        lines.append(f"- {listed(one.dropped)}  {what}" if one.dropped else f"  {printable(one.kept)}  {what}")
        saves = f", saves {size(one.n_bytes_saved)}" if one.n_bytes_saved else ""
        lines.append(f"  {printable(one.kept)}  stored once{saves}")
    if (more := len(found.tensors) - N_MOST_CLASSES) > 0:
        saved = sum(one.n_bytes_saved for one in found.tensors[N_MOST_CLASSES:])
        lines.append(f"  and {counted(more, 'more class', 'more classes')} stored once, saves {size(saved)}")
    lines += [f"  {printable(id)}  read without a Transpose that a runtime folds" for id in found.respelt]
    if found.files:
        files = listed(found.files, 8)
        saves = f": {size(found.n_bytes_saved)} less" if found.n_bytes_saved else ""
        lines.append(f"writes {files}{saves}; every other file stays as it is")
    else:
        lines.append("nothing to write")
    for code, ids, because in found.not_mended:
        what = f"{code} {listed(ids)}" if ids else code
        lines.append(f"stays: {what}: {printable(because, 600)}")
    return "\n".join(lines)
