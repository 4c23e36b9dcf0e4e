"""The lock file: what it holds of a model, written so that git shows its changes like a review, and read strictly.

The format is a small part of TOML, one fact or one tie a line; docs/decisions/lock-file.md says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tieaudit.dtypes import TABLE
from tieaudit.errors import UnreadableModel, UsageError, WeightsNotHere
from tieaudit.inline import INTEGER, quoted, value_of
from tieaudit.printable import listed, printable
from tieaudit.replacing import replace_whole
from tieaudit.sealed import Change, Held, Locked, LockedMember, LockedTie
from tieaudit.sealing import n_by_kind, sealed
from tieaudit.since import tie_changes
from tieaudit.summary import summary
from tieaudit.verdict import Subject
from tieaudit.whole import read_whole

NAME = "tieaudit.lock"
VERSION = 1
MAX_LOCK_BYTES = 64_000_000
_FIRST_LINE = (
    "# Which weights are one, model by model. Written by `tieaudit lock`, to be committed; never edit it by hand."
)
_ORIGINS: tuple[Held, ...] = ("aliased", "absent", "declared", "measured")
_COUNTS = ("n_parameters", "n_bytes", "n_bytes_duplicate")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}|")


def lock_of(subject: Subject, key: str) -> Locked:
    """What a lock file keeps of a model under its `key` (see `called.key_of`).

    UnreadableModel if the bytes of a weight cannot be read, WeightsNotHere if they are elsewhere: a lock of half a
    model would call the rest lost, or forget its ties. Cost: as `sealing.sealed`.
    """
    if not subject.model.weights_here:
        said = f"{subject.model.path}: not locked, the weights are {subject.model.metadata['weights']}"
        raise WeightsNotHere(said, hint="fetch them first: `git lfs pull`, `dvc pull`, or download the model again")
    model, unreadable = subject.model, tuple(subject.found.unreadable)
    if unreadable:
        because = subject.found.unreadable[unreadable[0]]
        raise UnreadableModel(f"{model.path}: not locked, {listed(unreadable)} cannot be read: {because}")
    total = summary(model, subject.found)
    return Locked(
        path=key,
        format=model.format,
        n_parameters=total.n_parameters,
        n_bytes=total.n_bytes,
        n_bytes_duplicate=total.n_bytes_duplicate,
        ties=sealed(subject),
        roles=n_by_kind(subject),
    )


def changes(before: Locked, after: Locked, present: frozenset[str] = frozenset()) -> tuple[Change, ...]:
    """What changed of a model since it was locked: ties first (see `since.tie_changes`), then the counts."""
    ties = tie_changes(before.ties, after.ties, present, (before.roles, after.roles))
    return (*ties, *_counted(before, after))


def _counted(before: Locked, after: Locked) -> Iterator[Change]:
    if before.format != after.format:
        yield Change("count", f"format {printable(after.format)}, before {printable(before.format)}")
    for name in _COUNTS:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield Change("count", f"{name} {_number(new)}, before {_number(old)}")
    kinds = sorted({*before.roles, *after.roles})
    moved = [(kind, before.roles.get(kind, 0), after.roles.get(kind, 0)) for kind in kinds]
    told = tuple(f"{printable(kind)} {new:,}, before {old:,}" for kind, old, new in moved if old != new)
    if told:
        yield Change("count", f"roles: {'; '.join(told)}")


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def write_lock(path: Path, models: Mapping[str, Locked]) -> bool:
    """Write the lock file, unless it holds just that already; whether it was written.

    At every moment the name has the whole old or the whole new file, and a link stays one (`replace_whole`). Raises
    OSError if the system refuses; the old file stays then.
    """
    content = lock_text(models).encode()
    try:
        if path.read_bytes() == content:
            return False
    except FileNotFoundError:
        pass
    replace_whole(path, content)
    return True


def lock_text(models: Mapping[str, Locked]) -> str:
    """The lock file: sorted, without times or versions of tools, the same text for the same models."""
    lines = [_FIRST_LINE, f"version = {VERSION}"]
    for path, one in sorted(models.items()):
        lines += ["", f"[model.{quoted(path)}]", f"format = {quoted(one.format)}"]
        lines += [f"{name} = {getattr(one, name)}" for name in _COUNTS if getattr(one, name) is not None]
        lines += [f"roles.{_key_text(kind)} = {count}" for kind, count in sorted(one.roles.items())]
        lines += ["ties = [", *(f"  {_tie_text(tie)}," for tie in one.ties), "]"]
    return "\n".join(lines) + "\n"


def _key_text(key: str) -> str:
    return key if _BARE.fullmatch(key) else quoted(key)


def _tie_text(tie: LockedTie) -> str:
    members = ", ".join(_member_text(member) for member in tie.members)
    facts = f"origin = {quoted(tie.origin)}, dtype = {quoted(tie.dtype)}, shape = {list(tie.shape)}"
    return f"{{ members = [{members}], {facts}, sha256 = {quoted(tie.digest)} }}"


def _member_text(member: LockedMember) -> str:
    facts = {"id": member.id, "role": member.role, "view": member.view, "use": member.use}
    usual = {"view": "as stored", "use": ""}
    told = [f"{name} = {quoted(value)}" for name, value in facts.items() if usual.get(name) != value]
    told += [f"copy = {member.copy}"] if member.copy else []
    return f"{{ {', '.join(told)} }}"


def read_lock(path: Path) -> dict[str, Locked]:
    """Models by their paths in the lock. UsageError with file, line and key if it is not such a file, whole and valid.

    Cost: linear in its size, which is limited. Nothing that it names is opened.
    """
    try:
        data = read_whole(path, MAX_LOCK_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: the lock file cannot be read: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8, found something else at byte {error.start}") from None
    return _Reader(path).read(text)


Fact = TypeVar("Fact")


class _Reader:
    """One pass over the lines; the line that is being read is in every complaint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.models: dict[str, Locked] = {}
        self.key = ""
        self.facts: dict[str, object] = {}
        self.roles: dict[str, int] = {}
        self.ties: list[LockedTie] | None = None
        self.inside = False
        """Between `ties = [` and `]`."""

    def read(self, text: str) -> dict[str, Locked]:
        version = None
        for self.number, raw in enumerate(text.split("\n"), 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            if version is None:
                version = self._version(line)
            elif self.inside:
                self._in_ties(line)
            elif line.startswith("[model."):
                self._finish()
                self._begin(line)
            else:
                self._fact(line)
        if version is None:
            raise self.wrong(f"version = {VERSION} as its first line", "none")
        if self.inside:
            raise self.wrong("] at the end of the ties", "the end of the file: it is cut off")
        self._finish()
        return self.models

    def wrong(self, expected: str, found: str, key: str = "") -> UsageError:
        where = f"{self.path}:{self.number}" + (f": {printable(key, 60)}" if key else "")
        hint = "remove it and run `tieaudit lock` to write it anew"
        if found.startswith(("<<<<<<<", "=======", ">>>>>>>")):
            hint = "a merge left its marks: take one side, then run `tieaudit lock`"
        return UsageError(f"{where}: expected {expected}, found {printable(found, 80)}", hint=hint)

    def _version(self, line: str) -> int:
        match = re.fullmatch(r"version\s*=\s*([0-9]{1,9})", line)
        if match is None:
            raise self.wrong(f"version = {VERSION}", line)
        if int(match[1]) != VERSION:
            raise UsageError(
                f"{self.path}:{self.number}: expected version {VERSION} of the lock file, found version {match[1]}",
                hint="another version of tieaudit wrote it: use that one (pip install -U tieaudit for the newest)",
            )
        return VERSION

    def _begin(self, line: str) -> None:
        if not line.endswith("]"):
            raise self.wrong('[model."path"]', line)
        self.key = self._text(self._value(line[len("[model.") : -1], "model"), "model")
        if self.key in self.models:
            raise self.wrong("each model once", f"{self.key} a second time", "model")
        if not self.key or self.key.startswith("/") or "\0" in self.key:
            raise self.wrong("a path relative to the lock file", self.key or "nothing", "model")
        self.facts, self.roles, self.ties = {"here": True}, {}, None

    def _fact(self, line: str) -> None:
        name, equals, rest = line.partition("=")
        name = name.strip()
        if not equals or not self.facts:
            raise self.wrong('[model."path"], or a line NAME = VALUE below one', line)
        if name == "ties" and rest.strip() in ("[", "[]"):
            if self.ties is not None:
                raise self.wrong("ties once", "a second list", "ties")
            self.ties, self.inside = [], rest.strip() == "["
        elif name.startswith("roles."):
            kind = name.removeprefix("roles.")
            kind = kind if _BARE.fullmatch(kind) else self._text(self._value(kind, "roles"), "roles")
            if kind in self.roles:
                raise self.wrong("each role once", f"{kind} a second time", "roles")
            self.roles[kind] = self._count(self._value(rest, kind), kind)
        elif name in ("format", *_COUNTS):
            if name in self.facts:
                raise self.wrong(f"{name} once", "a second one", name)
            value = self._value(rest, name)
            self.facts[name] = self._text(value, name) if name == "format" else self._count(value, name)
        else:
            raise self.wrong(f"one of format, {', '.join(_COUNTS)}, roles and ties", name)

    def _in_ties(self, line: str) -> None:
        if line == "]":
            self.inside = False
            return
        assert self.ties is not None
        self.ties.append(self._tie(self._value(line.removesuffix(","), "ties")))

    def _finish(self) -> None:
        """Keep the model whose lines end here."""
        if not self.facts:
            return
        for name in ("format", "n_bytes", "n_bytes_duplicate"):
            if name not in self.facts:
                raise self.wrong(f"{name} of the model {printable(self.key)}", "none above this line", name)
        if self.ties is None:
            raise self.wrong(f"ties of the model {printable(self.key)}", "none above this line", "ties")
        counts = {name: self.facts.get(name) for name in _COUNTS}
        self.models[self.key] = Locked(
            path=self.key, format=str(self.facts["format"]), ties=tuple(self.ties), roles=self.roles,
            **counts,  # type: ignore[arg-type]  # each is a count that was checked
        )  # fmt: skip
        self.facts = {}

    def _value(self, text: str, key: str) -> object:
        try:
            return value_of(text.strip())
        except ValueError as error:
            raise self.wrong(str(error), text.strip(), key) from None

    def _text(self, value: object, key: str) -> str:
        return self._a(value, str, "a text", key)

    def _count(self, value: object, key: str) -> int:
        return self._a(value, int, f"a whole number up to {INTEGER} digits", key)

    def _a(self, value: object, kind: type[Fact], expected: str, key: str) -> Fact:
        if not isinstance(value, kind):
            raise self.wrong(expected, f"{value!r}"[:200], key)
        return value

    def _table(self, value: object, known: tuple[str, ...], needed: tuple[str, ...], key: str) -> dict[str, object]:
        table = self._a(value, dict, "{ … }", key)
        for name in table:
            if name not in known:
                raise self.wrong(f"one of {', '.join(known)}", name, key)
        for name in needed:
            if name not in table:
                raise self.wrong(name, "none", key)
        return table

    def _tie(self, value: object) -> LockedTie:
        names = ("members", "origin", "dtype", "shape", "sha256")
        table = self._table(value, names, names, "ties")
        members = tuple(self._member(one) for one in self._a(table["members"], list, "a list", "members"))
        shape = tuple(self._count(size, "shape") for size in self._a(table["shape"], list, "a list", "shape"))
        kind, digest = self._text(table["dtype"], "dtype"), self._text(table["sha256"], "sha256")
        origin = next((one for one in _ORIGINS if one == table["origin"]), None)
        if origin is None:
            raise self.wrong(f"one of {', '.join(_ORIGINS)}", f"{table['origin']!r}"[:200], "origin")
        if kind not in TABLE:
            raise self.wrong("an element type that tieaudit knows", kind, "dtype")
        if _SHA256.fullmatch(digest) is None:
            raise self.wrong("64 hexadecimal digits, or nothing", digest, "sha256")
        ids = [member.id for member in members]
        if len(ids) < 2 or len(set(ids)) != (1 if any(member.use for member in members) else len(ids)):
            raise self.wrong("two or more names, each once, or two or more uses of one name", str(len(ids)), "members")
        return LockedTie(members, origin, kind, shape, digest)

    def _member(self, value: object) -> LockedMember:
        known = ("id", "role", "view", "use", "copy")
        table = self._table(value, known, ("id", "role"), "members")
        texts = {name: self._text(one, name) for name, one in table.items() if name != "copy"}
        return LockedMember(**texts, copy=self._count(table.get("copy", 0), "copy"))
