"""How a model is called wherever runs have to agree on it: in reports, in policies, in baselines and in lock files.

A name rests on the folder alone in which the model lies, never on what else a run is about: a hook that is given one
file, `--since`, and a run over everything must mean the same model by the same name.
"""

from __future__ import annotations

import os
from pathlib import Path

from tieaudit.load import Source, owner_of


def known_by(source: Source) -> Path:
    """The path by which a model is known: its own, and of a folder that stands for another model its first file.

    A folder stands for the model of the format that wins it, and of the several exports that lie in it for the plain
    one: see `Format.stands_for_folder`. Cost: a listing of the folder, where it holds a model of several files.
    """
    path = source.path
    if not source.files or not path.is_dir():
        return path
    owner = owner_of(path)
    if owner is not None and owner.name != source.format.name:
        return source.files[0]
    stands = source.format.stands_for_folder
    return path if stands is None or stands(source.files) else source.files[0]


def key_of(source: Source, folder: Path) -> str:
    """How a file in `folder` that is committed calls a model; a live module by its name."""
    return key_in(known_by(source), folder) if os.path.lexists(source.path) else str(source.path)


def key_in(path: Path, folder: Path) -> str:
    """A path relative to a folder, POSIX, whichever links led to the two.

    Links among the folders on the way are followed; the last name stands as it is, so that two names of one file are
    two keys.
    """
    home, full = Path(os.path.realpath(folder)), Path(os.path.abspath(path))
    real = Path(os.path.realpath(full))
    if not home.is_relative_to(real):  # else it holds `folder`, or is it, under whatever name
        real = Path(os.path.realpath(full.parent), full.name)
    return Path(os.path.relpath(real, home)).as_posix()
