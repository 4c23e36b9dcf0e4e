"""What an archive of exported programs holds: the programs by their names, and where each one's weights are.

Two layouts. Since PyTorch 2.8: `models/<name>.json`, tables of weights and constants beside their raw bytes. Before:
`serialized_exported_program.json` beside a state dict that `torch.save` wrote. Source: torch/export/pt2_archive
(constants.py, _package.py) and torch/export/__init__.py (`load`), version 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tieaudit.errors import CorruptFile, UnreadableModel, UsageError
from tieaudit.formats.torch_checkpoint.archive import Archive

WEIGHTS, CONSTANTS, SAMPLES, COMPILED = "data/weights/", "data/constants/", "data/sample_inputs/", "data/aotinductor/"
OLD_PROGRAM, OLD_STATE, OLD_CONSTANTS = (
    "serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt",
)  # fmt: skip
_PROGRAM = re.compile(r"models/(.+)\.json")
DEFAULT = "model"
"""The program that `torch.export.load` returns."""


@dataclass(frozen=True)
class Layout:
    """One program of an archive."""

    archive: Archive
    name: str
    """Empty in the old layout, which holds one."""
    names: tuple[str, ...]
    """Of all programs."""

    @property
    def program(self) -> str:
        """The member that holds the graph."""
        return f"models/{self.name}.json" if self.name else OLD_PROGRAM

    def table(self, folder: str) -> str:
        """The member that says which weight (or constant) is where."""
        return f"{folder}{self.name}_{folder.split('/')[1]}_config.json"

    def pickle(self, folder: str) -> str:
        """The member that holds them as `torch.save` writes them, in older files."""
        if not self.name:
            return OLD_STATE if folder == WEIGHTS else OLD_CONSTANTS
        return f"{folder}{self.name}.pt"


def layout_of(path: Path, key: str = "") -> Layout:
    """The program `key`, or the one that `torch.export.load` returns. UnreadableModel where there is no program."""
    archive = Archive(path)
    if OLD_PROGRAM in archive:
        return Layout(archive, "", ("",))
    names = tuple(sorted(found[1] for name in archive.members if (found := _PROGRAM.fullmatch(name))))
    if not names:
        raise UnreadableModel(f"{path}: expected an exported program in the archive, found {_without_program(archive)}")
    if key and key not in names:
        raise UsageError(f"{path}: no program is called {key!r}", hint=f"there: {', '.join(names[:12])}")
    return Layout(archive, key or (DEFAULT if DEFAULT in names else names[0]), names)


def _without_program(archive: Archive) -> str:
    compiled = sorted({name.removeprefix(COMPILED).split("/")[0] for name in archive.members if COMPILED in name[:99]})
    if compiled:
        return (
            f"a package that AOTInductor compiled to machine code ({', '.join(compiled[:3])}): its weights are inside "
            "the library, which is never loaded; read the program that it was compiled from"
        )
    return f"{', '.join(sorted(archive.members)[:3])}: no exported program"


def is_compiled(archive: Archive) -> bool:
    """Whether there is machine code in an archive."""
    return any(name.startswith(COMPILED) for name in archive.members)


def whole_programs(layout: Layout) -> Iterator[str]:
    """Programs of the archive other than this one."""
    yield from (name for name in layout.names if name != layout.name)


def checked_name(name: str, where: str) -> str:
    """The name of a blob inside its folder. CorruptFile if it leads out of it."""
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise CorruptFile(f"{where}: expected the name of a file in its own folder, found {name[:200]!r}")
    return name
