"""Which files are safetensors models: a lone file, or an index that owns its shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tieaudit.formats.safetensors.sharded import INDEX_SUFFIX, owners_of_shards, read_index, siblings_of


def owns(path: Path) -> bool:
    """Whether a path is a safetensors file or the index of a sharded one, by its name."""
    return path.is_file() and path.name.endswith((".safetensors", INDEX_SUFFIX))


def group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """A shard belongs to its index, or without one to those it is counted with; other files are models of their own."""
    mains: dict[Path, tuple[Path, ...]] = {}
    owners: dict[Path, dict[str, Path]] = {}
    for path in paths:
        if path.parent not in owners:  # once per folder: it may hold thousands of files
            owners[path.parent] = owners_of_shards(path.parent)
        main = path if path.name.endswith(INDEX_SUFFIX) else owners[path.parent].get(path.name, path)
        files: tuple[Path, ...] = (main,)
        if main.name.endswith(INDEX_SUFFIX):
            files += tuple(main.parent / name for name in dict.fromkeys(read_index(main).values()))
        elif len(siblings := siblings_of(main)) > 1:  # shards without an index are one model all the same
            main, files = siblings[0], siblings
        mains.setdefault(main, files)
    return list(mains.items())
