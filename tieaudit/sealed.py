"""The nouns of a lock file: what it holds of a model, and how one state of a model differs from another.

They are low in the layers, so that a rule may look at what was locked. `sealing.py` makes them from a model, `since.py`
compares two of them, `locked.py` writes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from tieaudit.dtypes import dtype

Held = Literal["aliased", "absent", "declared", "measured"]
"""How a class is one: names of one stored tensor, a name that a loader restores, several stored tensors that are
declared to be one and are equal, or several that are merely equal."""


@dataclass(frozen=True)
class LockedMember:
    """One name, or one use, of a value."""

    id: str
    role: str
    """Kind of the role."""
    view: str = "as stored"
    """How it is seen from the first member."""
    use: str = ""
    """Where one stored weight is a tie by its uses: the operation's type. Names of nodes change with every export."""
    copy: int = 0
    """Which stored copy it names, from 0; what is not stored counts to the copy that it is restored from."""


@dataclass(frozen=True)
class LockedTie:
    """One value under several names or uses."""

    members: tuple[LockedMember, ...]
    """In the order of their ids; the first one is seen as stored."""
    origin: Held
    dtype: str
    shape: tuple[int, ...]
    """Of the first member."""
    digest: str
    """Of the common value, as `sealing.fingerprint` takes it: the same in every layout; empty where there are no bytes
    to read (a live module on the meta device)."""

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Each once, in order."""
        return tuple(dict.fromkeys(member.id for member in self.members))

    @property
    def by_uses(self) -> bool:
        """Whether it is one stored tensor that serves several operations, not several names."""
        return any(member.use for member in self.members)

    @property
    def tied(self) -> bool:
        """Whether somebody holds it together; otherwise it is equal and stored separately."""
        return self.origin != "measured"

    @property
    def n_copies(self) -> int:
        """Stored tensors that hold the value."""
        return len({member.copy for member in self.members})

    @property
    def n_bytes(self) -> int:
        """Of one stored copy."""
        return dtype(self.dtype).n_bytes(prod(self.shape))

    @property
    def anchor(self) -> str:
        """The member that a sentence calls the others by: a table if there is one, as people say it, by its shortest
        name."""
        tables = [member.id for member in self.members if member.role == "token_embedding"]
        return min(tables, key=len) if tables else self.members[0].id


@dataclass(frozen=True)
class Locked:
    """What a lock file holds of one model."""

    path: str
    """Relative to the lock file, with forward slashes; the name of a live module as it was given."""
    format: str
    n_parameters: int | None
    """None where it cannot be told."""
    n_bytes: int
    n_bytes_duplicate: int
    ties: tuple[LockedTie, ...]
    roles: Mapping[str, int] = field(default_factory=dict)
    """Kind → weights of that kind."""


Kind = Literal["lost", "gained", "renamed", "members", "value", "count"]


@dataclass(frozen=True)
class Change:
    """One difference between what was locked and what is there, as a reviewer would put it."""

    kind: Kind
    said: str
    """The sentence, without the kind; names in it are printable."""
    before: tuple[str, ...] = ()
    """Ids in the lock that it is about."""
    after: tuple[str, ...] = ()
    """Ids that they are now, or that are new."""
    n_bytes: int = 0
    """Bytes that are stored again."""
    n_bytes_tie: int = 0
    """Of one copy of the value that the tie holds: what is at stake, whether or not it is stored again."""

    @property
    def message(self) -> str:
        return f"{self.kind}: {self.said}"
