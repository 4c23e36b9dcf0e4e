"""Stage: a proved result → its name. Atomic, with a receipt that can be checked and undone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from tieaudit import __version__
from tieaudit.change import Plan, Proof, Written
from tieaudit.errors import CorruptFile, RewriteRefused, UsageError
from tieaudit.formats import RECEIPT_NAME
from tieaudit.model import Model
from tieaudit.plain import plain
from tieaudit.replacing import flush_folder
from tieaudit.rewrite import flush, keep_private
from tieaudit.whole import digest_of

SCHEMA = "tieaudit/receipt/1"
RECEIPT_SUFFIX = ".receipt.json"
"""What the receipt of a single file is called, behind the file's name."""
MAX_RECEIPT_BYTES = 256_000_000


@dataclass(frozen=True)
class Delivered:
    """Where the result lies now."""

    path: Path
    receipt: Path


def deliver(model: Model, plan: Plan, written: Written, proof: Proof, folder: Path, destination: Path) -> Delivered:
    """Move a written and proved model from its workspace to its name, with the receipt.

    A folder arrives by one rename. A single file arrives after its data files and its receipt, so that a model is
    visible only when everything it needs is there. RewriteRefused if something else took the name meanwhile; folders
    that were made for it are removed again then.
    """
    if plan.into is None:
        as_folder = Path(model.path).is_dir() or not _names_a_file(destination, model)
        single = None if Path(model.path).is_dir() else Path(model.path).name
    else:  # written under the very name that the destination has, or into a folder of that name
        as_folder, single = plan.into.file != destination.name, plan.into.file
    renames = {} if as_folder else {str(single): destination.name}
    receipt = folder / (RECEIPT_NAME if as_folder else f"{destination.name}{RECEIPT_SUFFIX}")
    home = destination if as_folder else destination.parent
    made = _missing(destination.absolute().parent)
    write_receipt(receipt, model, plan, written, proof, folder, home, renames=renames, made=made)
    keep_private(model, folder, [receipt.name])
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if as_folder:
            _open_up(model, folder)
            flush_folder(folder)
            _rename_new(folder, destination)
            return Delivered(destination, destination / RECEIPT_NAME)
        names = [*(name for name in written.files if name != single), receipt.name, str(single)]
        _move(folder, destination.parent, names, renames)
    except BaseException:
        _remove_empty(made)
        raise
    return Delivered(destination, destination.parent / receipt.name)


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, innermost first."""
    above = [folder, *folder.parents]
    return above[: next((place for place, one in enumerate(above) if one.exists()), len(above))]


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, as long as they are empty."""
    for one in folders:
        try:
            one.rmdir()
        except OSError:
            return


def _open_up(model: Model, folder: Path) -> None:
    """Give the workspace the permissions of any new folder, but not more than the source's own folder has."""
    probe = folder / ".mode"
    probe.mkdir()
    mode = probe.stat().st_mode
    probe.rmdir()
    if Path(model.path).is_dir():
        mode &= Path(model.path).stat().st_mode | 0o700
    folder.chmod(mode & 0o777)


def _move(folder: Path, home: Path, names: Iterable[str], renames: Mapping[str, str]) -> None:
    """Move files to their places, in this order; if one cannot be moved, none is left there."""
    moved: list[Path] = []
    made: list[Path] = []
    try:
        for name in names:
            target = home / renames.get(name, name)
            made += _missing(target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            _rename_new(folder / name, target)
            moved.append(target)
    except BaseException:
        for path in reversed(moved):
            path.unlink(missing_ok=True)
        _remove_empty(sorted(set(made), key=lambda one: -len(one.parts)))
        raise


def _names_a_file(destination: Path, model: Model) -> bool:
    return destination.suffix == Path(model.path).suffix


def _rename_new(source: Path, target: Path) -> None:
    """Rename without ever replacing anything that is there."""
    if os.path.lexists(target):
        raise RewriteRefused(f"{target}: exists already; nothing is ever overwritten", hint="give another --to")
    try:
        source.rename(target)
    except OSError as error:
        raise RewriteRefused(f"{target}: cannot be moved into place: {error.strerror}") from error


def write_receipt(
    path: Path,
    model: Model,
    plan: Plan,
    written: Written,
    proof: Proof,
    folder: Path,
    home: Path,
    *,
    renames: Mapping[str, str] = MappingProxyType({}),
    made: Sequence[Path] = (),
    replaced: Mapping[str, Mapping[str, str | None]] | None = None,
) -> None:
    """Write the receipt of what lies in `folder` and is to lie in `home`. Cost: reads input and output once.

    `renames`: names that files get there. `made`: folders that are made for it. `replaced`: for a model whose own files
    are replaced, the digests of each before and after.
    """
    inputs = dict.fromkeys(str(Path(name).absolute()) for part in model.parts for name in part.paths)
    receipt: dict[str, object] = {
        "schema": SCHEMA,
        "tool": {"name": "tieaudit", "version": __version__},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "input": {"path": str(Path(model.path).absolute()), "files": {name: digest_of(Path(name)) for name in inputs}},
        "output": {
            "path": str(home.absolute()),
            "files": {renames.get(name, name): digest_of(folder / name) for name in written.files},
            "folders_made": [str(one) for one in made],
        },
        "plan": plain(plan),
        "proof": plain(proof),
    }
    if replaced is not None:
        receipt["replaced"] = {"originals": "not kept", "files": replaced}
    path.write_text(json.dumps(receipt, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    flush(path)


def read_receipt(path: Path) -> dict[str, dict[str, object]]:
    """A receipt. UsageError or CorruptFile if the file is not one."""
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer, a device may never end
            raise UsageError(f"{path}: expected a receipt of tieaudit, found something that is not a regular file")
        if path.stat().st_size > MAX_RECEIPT_BYTES:
            raise CorruptFile(f"{path}: expected a receipt of at most {MAX_RECEIPT_BYTES:,} bytes, found a larger file")
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(
            f"{path}: expected a receipt of tieaudit, found something that is not JSON: {error}"
        ) from error
    shaped = isinstance(receipt, dict) and receipt.get("schema") == SCHEMA
    for side in ("input", "output"):
        part = receipt.get(side) if shaped else None
        files = part.get("files") if isinstance(part, dict) else None
        shaped = isinstance(files, dict) and all(isinstance(n, str) and isinstance(d, str) for n, d in files.items())
        shaped = shaped and isinstance(part, dict) and isinstance(part.get("path"), str)
        shaped = shaped and isinstance(files, dict) and all(map(_is_path, files))
    if not shaped:
        raise CorruptFile(f"{path}: expected a receipt of tieaudit ({SCHEMA}), found another JSON file")
    checked: dict[str, dict[str, object]] = receipt
    return checked


def _is_path(name: str) -> bool:
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def check_receipt(path: Path) -> list[str]:
    """What no longer agrees with a receipt, in sentences; empty if input and output are exactly what it says.

    Where the output took the place of the input, only the output can be looked at.
    """
    receipt = read_receipt(path)
    inputs = [] if "replaced" in receipt else _changed(receipt, "input", path)
    return [*inputs, *_changed(receipt, "output", path)]


def _changed(receipt: dict[str, dict[str, object]], side: str, path: Path) -> list[str]:
    files = receipt[side]["files"]
    assert isinstance(files, dict)  # read_receipt checked it
    problems = []
    for name, expected in files.items():
        file = Path(name) if side == "input" else _home(path) / name
        if side == "output" and not file.resolve().is_relative_to(_home(path).resolve()):
            raise CorruptFile(f"{path}: names the file {name!r} outside its own folder; not touched")
        if not file.is_file():
            problems.append(f"{side} {file}: missing")
        elif digest_of(file) != expected:
            problems.append(f"{side} {file}: changed since the receipt was written")
    return problems


def _home(receipt: Path) -> Path:
    """Outputs lie beside their receipt, wherever both were moved."""
    return receipt.absolute().parent


def undo(path: Path) -> list[Path]:
    """Take a delivery back: remove exactly the files that the receipt lists, and the receipt.

    The input was never changed, so this is all there is to undo; it is checked first. RewriteRefused if the input is
    no longer what it was (the output may then be the only copy) or if an output file was changed since, and for a
    delivery in place, which keeps no originals.
    """
    if "replaced" in read_receipt(path):
        raise RewriteRefused(
            f"{path}: expected a delivery beside its input, found one in place, whose originals are not kept; nothing "
            "was changed",
            hint="version control has them; the receipt has their digests",
        )
    problems = check_receipt(path)
    if problems:
        raise RewriteRefused(f"not undone, nothing removed: {'; '.join(problems[:3])}")
    receipt = read_receipt(path)
    files, inputs = receipt["output"]["files"], receipt["input"]["files"]
    assert isinstance(files, dict) and isinstance(inputs, dict)  # read_receipt checked it
    home = _home(path)
    removed = [home / name for name in files]
    if not inputs:
        raise RewriteRefused(
            f"{path}: expected an input that is still there, found that of a module in memory: the output may be the "
            "only copy; nothing was removed",
            hint="delete it by hand",
        )
    if any(os.path.samefile(file, given) for file in removed for given in inputs):
        raise RewriteRefused(f"{path}: expected an input apart from the output, found none; nothing was removed")
    for file in [*removed, path]:
        file.unlink(missing_ok=True)  # a receipt may spell one file in two ways
    inside = {parent for file in removed for parent in file.parents if parent.is_relative_to(home)}
    for folder in sorted(inside, key=lambda one: -len(one.parts)):
        if (folder != home or path.name == RECEIPT_NAME) and not any(folder.iterdir()):
            folder.rmdir()
    made = receipt["output"].get("folders_made", [])
    if receipt["output"]["path"] == str(home) and isinstance(made, list):  # else it was moved out of them
        _remove_empty(one for one in map(Path, map(str, made)) if home.is_relative_to(one))
    return removed
