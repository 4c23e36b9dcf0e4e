"""What is known to be equal, as classes: the set algebra that the rules and the totals run on.

Classes are transitive closures, never pairs. Nothing is read here; `find` has read everything there is to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tieaudit.model import Declaration, Model, Tie, Weight, classes
from tieaudit.storage import Region
from tieaudit.verdict import Found, Subject
from tieaudit.view import AS_STORED, Repack, View


class Equality:
    """Which weights are one value, as measured, by region, or as equal constants."""

    def __init__(self, model: Model, found: Found) -> None:
        groups = [tie.ids for tie in found.ties if tie.origin in ("measured", "aliased")]
        self._model = model
        self._found = found
        self._home = {id: index for index, ids in enumerate(classes([*groups, *found.constant_classes])) for id in ids}

    def same(self, a: str, b: str) -> bool | None:
        """Whether two stored weights are the same value; None if nobody has seen the bytes of one of them."""
        if a == b:
            return True
        if a in self._home and self._home[a] == self._home.get(b):
            return True
        if self._found.unseen(self._model, (a, b)):
            return None
        one, other = self._model.by_id[a], self._model.by_id[b]
        return one.n_elements == 0 and one.shape == other.shape and one.dtype == other.dtype

    def groups(self, ids: Iterable[str]) -> list[list[str]]:
        """Stored ids partitioned into equal ones, in order; what is unreadable stays alone."""
        found: list[list[str]] = []
        for id in ids:
            home = next((group for group in found if self.same(group[0], id)), None)
            if home is None:
                found.append([id])
            else:
                home.append(id)
        return found


def can_declare(model: Model) -> bool:
    """Whether models of this format can say which weights are one, so that silence means *two*.

    A Hugging Face folder can, and a live module is its own declaration. ONNX cannot, nor can a bare weight file, whose
    alias map documents and restores nothing.
    """
    says_so = model.format in ("huggingface", "torch_module")
    return says_so or model.restores


def tells_ties(model: Model) -> bool:
    """Whether two stored weights were two parameters: a program exported from a module stores what was one as one."""
    return can_declare(model) or model.format == "torch_export"


def of_buffers(model: Model, tie: Tie) -> bool:
    """Whether nothing in this class is trained: masks, shapes and tables of equal bytes waste them, and tie nothing."""
    return all(model.by_id[id].parameter is False for id in tie.ids)


def class_known(model: Model) -> bool:
    """Whether the class, or a data file about it, said what it ties; False where only the usual names are known."""
    return model.metadata.get("transformers") != "not asked: convention"


def n_bytes_covered(regions: Iterable[Region]) -> int:
    """Bytes in the union of regions. Cost: O(n log n)."""
    total, container, reach = 0, "", 0
    for where, begin, end in sorted(regions):
        if where != container:
            container, reach = where, begin
        total += max(0, end - max(begin, reach))
        reach = max(reach, end)
    return total


def region_of(weight: Weight) -> Region | None:
    """Where a weight's bytes are; None for an absent weight."""
    return weight.storage.region if weight.storage is not None else None


def copies(model: Model, ids: Iterable[str]) -> list[list[str]]:
    """Stored ids grouped by the very region they name: one group is one stored copy, under one or more names."""
    found: dict[Region, list[str]] = {}
    for id in ids:
        region = region_of(model.by_id[id])
        if region is not None:
            found.setdefault(region, []).append(id)
    return list(found.values())


def n_bytes_extra(model: Model, groups: Sequence[Sequence[str]]) -> int:
    """Bytes stored again, over classes of equal weights: everything but the first copy of each, overlaps once."""
    kept: list[Region] = []
    every: list[Region] = []
    for ids in groups:
        regions = [region for id in ids if (region := region_of(model.by_id[id])) is not None]
        kept.extend(regions[:1])
        every.extend(regions)
    return n_bytes_covered(every) - n_bytes_covered(kept)


@dataclass(frozen=True)
class Duplicate:
    """One class of equal tensors that is stored more than once."""

    ids: tuple[str, ...]
    copies: tuple[tuple[str, ...], ...]
    """Names by stored copy."""
    views: tuple[View, ...]
    """How each of `ids` is seen from the first one."""
    parts: tuple[str, ...]
    """Parts that hold a copy."""
    n_bytes: int
    """Bytes of the further copies."""

    @property
    def kind(self) -> Literal["across parts", "repacked", "transposed", "equal"]:
        """What this class is, the most specific: one rule reports it."""
        if len(self.parts) > 1:
            return "across parts"
        if any(isinstance(step, Repack) for view in self.views for step in view.steps):
            return "repacked"
        return "transposed" if len(set(self.views)) > 1 else "equal"


def duplicates(model: Model, found: Found, keep: Callable[[Weight], bool] = lambda weight: True) -> Iterator[Duplicate]:
    """Measured classes of non-constant tensors stored more than once, restricted to the weights `keep` accepts."""
    measured = [tie for tie in found.ties if tie.origin == "measured"]
    views = {member.id: member.view for tie in measured for member in tie.members}
    aliased = [tie.ids for tie in found.ties if tie.origin == "aliased"]
    for ids in classes([*(tie.ids for tie in measured), *aliased]):
        kept = tuple(id for id in ids if keep(model.by_id[id]))
        stored = copies(model, kept)
        if len(stored) < 2:
            continue
        parts = tuple(dict.fromkeys(model.by_id[id].part for id in kept))
        yield Duplicate(
            kept,
            tuple(tuple(names) for names in stored),
            tuple(views.get(id, AS_STORED) for id in kept),
            parts,
            n_bytes_extra(model, [kept]),
        )


@dataclass(frozen=True)
class Declared:
    """The closure of overlapping declarations: one class, and everybody who claims it."""

    members: tuple[str, ...]
    """Ids the model knows, the canonical one first."""
    by: tuple[Declaration, ...]

    @property
    def restores(self) -> bool:
        """Whether the target loader re-creates any missing member: the claims that restore reach all of them."""
        restored = classes(declaration.members for declaration in self.by if declaration.restores)
        return any(set(self.members) <= set(members) for members in restored)

    @property
    def claimed_by(self) -> str:
        return ", ".join(dict.fromkeys(declaration.claimed_by for declaration in self.by))

    @property
    def condition(self) -> str:
        """The setting that switches the tie, if there is one."""
        return next((declaration.condition for declaration in self.by if declaration.condition), "")

    @property
    def honoured_by(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(loader for declaration in self.by for loader in declaration.honoured_by))


def declared(model: Model, *, active: bool) -> list[Declared]:
    """Classes of ids that somebody claims are one (active), or would be under another setting (not active)."""
    claims = [declaration for declaration in model.declarations if declaration.active == active]
    joined = classes(declaration.members for declaration in claims)
    home = {id: number for number, members in enumerate(joined) for id in members}
    by: list[list[Declaration]] = [[] for _ in joined]
    for declaration in claims:
        if declaration.members[0] in home:
            by[home[declaration.members[0]]].append(declaration)
    found = []
    for members, claimed in zip(joined, by, strict=True):
        known = tuple(id for id in members if id in model.by_id)
        if len(known) > 1:
            found.append(Declared(known, tuple(claimed)))
    return found


def stored(subject: Subject, ids: Iterable[str]) -> tuple[str, ...]:
    """Those of `ids` that the files hold."""
    return tuple(id for id in ids if not subject.model.by_id[id].absent)
