"""Which lock file holds a model, and what a run says of models and locks that do not know each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tieaudit.called import key_of, known_by
from tieaudit.govern import policy_for
from tieaudit.load import Source
from tieaudit.policy import Policy
from tieaudit.printable import listed, printable
from tieaudit.sealed import Locked
from tieaudit.whereabouts import shown


class Locks:
    """The lock files of a run, each read once, and which of their entries were asked for."""

    def __init__(self, given: Path | None) -> None:
        self._given = given
        """The policy that rules every model; None: each has its own."""
        self._read: dict[Path, dict[str, Locked]] = {}
        self._asked: set[tuple[Path, str]] = set()
        self._not_in: dict[Path, list[Path]] = {}
        self._candidates: dict[str, tuple[Path, ...]] = {}

    @property
    def files(self) -> frozenset[str]:
        """The lock files that were asked for, there or not."""
        return frozenset(map(str, self._read))

    def of(self, policy: Policy, source: Source) -> Locked | None:
        """What is locked of a model, under the key under which `tieaudit lock` writes it and no other."""
        nearest = None
        if policy.root not in self._candidates:
            self._candidates[policy.root] = tuple(self._files(policy))
        for file in self._candidates[policy.root]:
            if file not in self._read:
                from tieaudit.locked import read_lock  # most repositories have none

                self._read[file] = read_lock(file) if os.path.lexists(file) else {}
            known = self._read[file]
            nearest = nearest or (file if known else None)
            name = key_of(source, file.parent) if known else ""
            if name in known:
                self._asked.add((file, name))
                return known[name]
        if nearest is not None:
            self._not_in.setdefault(nearest, []).append(known_by(source))
        return None

    def _files(self, policy: Policy) -> Iterator[Path]:
        """Where a model may be locked: beside its own policy, and in the folders above, where `tieaudit lock` may have
        been run for all that lies below; without a policy there up to the top of the repository."""
        home = Path(policy.root)
        yield home / policy.lock
        above = home.parents if self._given is None else ()
        inside = not os.path.lexists(home / ".git") and any(os.path.lexists(one / ".git") for one in above)
        for folder in above:
            outer = policy_for(folder)
            if outer.file and outer.root == str(folder):
                yield folder / outer.lock
            elif inside:
                yield folder / Policy.lock
            inside = inside and not os.path.lexists(folder / ".git")

    def gone(self, base: Path) -> list[str]:
        """Sentences about models that are locked and not there, for a run about everything."""
        left = [
            (file, name)
            for file, known in self._read.items()
            for name in known
            if (file, name) not in self._asked and not os.path.lexists(Path(os.path.realpath(file.parent), name))
        ]
        return [
            f"{shown(file, base)} holds {printable(name)}, which is not there: if that is meant, run `tieaudit lock`"
            for file, name in left
        ]

    def unlocked(self, base: Path) -> list[str]:
        """Sentences about models that no lock holds, although there is one for them: a tie of theirs can get lost."""
        return [
            f"{shown(file, base)} does not hold {listed(tuple(shown(path, base) for path in paths))}: "
            "if ties are to be kept there, run `tieaudit lock`"
            for file, paths in self._not_in.items()
        ]
