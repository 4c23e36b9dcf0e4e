"""Recognisers: what a weight is for, told by what flows through the graph around it. One file for each kind of place.

They run in the order of their `rank`; the first one to tell a weight's role has told it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tieaudit.flow import Flow, Projection
from tieaudit.model import Role
from tieaudit.spine import Spine

ELEMENTWISE = frozenset("view add subtract multiply divide choose activate adjust root".split())
"""Operations behind which an element still belongs to its place."""
_N_MOST_STEPS = 600


@dataclass
class Reading:
    """What has been recognised so far in one graph."""

    flow: Flow
    spine: Spine
    roles: dict[str, Role] = field(default_factory=dict)
    """By weight id."""
    kinds: dict[int, str] = field(default_factory=dict)
    """Index of a product with a learned matrix → what that matrix is there."""
    crossings: set[str] = field(default_factory=set)
    """Values that another stream attends to."""
    attentions: dict[int, int] = field(default_factory=dict)
    """Index of a product with a learned matrix → that of the attention which it feeds, or whose result it takes."""
    norms: set[int] = field(default_factory=set)
    """Operations that apply a learned scale to normalised values."""

    def tell(self, ids: Iterable[str], kind: str, because: str) -> None:
        """These weights are of this kind, unless somebody was surer before."""
        for id in ids:
            self.roles.setdefault(id, Role(kind, because))

    def project(self, one: Projection, kind: str, because: str) -> None:
        """The matrix of this product is of this kind."""
        if one.index not in self.kinds:
            self.kinds[one.index] = kind
            self.tell(one.weights[:1], kind, because)

    def at(self, index: int) -> str:
        """A place in the graph, for people."""
        operation = self.flow.operations[index]
        return f"{operation.op} @ {operation.node}"

    def behind(self, value: str, through: frozenset[str]) -> list[Projection]:
        """The projections that a value is made of, without looking beyond the block's beginning."""
        flow, stops = self.flow, self.spine.on_stream
        return [flow.projections[i] for i in flow.back(value, through, stops) if i in flow.projections]

    def ahead(self, value: str, through: frozenset[str]) -> Iterator[tuple[int, int]]:
        """(operation, slot) of what reads a value, on through `through` up to the end of the block, nearest first."""
        flow, stream = self.flow, self.spine.on_stream
        pending, seen = deque([value]), {value}
        while pending and len(seen) < _N_MOST_STEPS:
            current = pending.popleft()
            for index, slot in flow.readers.get(current, ()):
                flow.n_left -= 1
                if flow.n_left < 0:
                    return
                yield index, slot
                if flow.does(index) not in through or index in flow.projections:
                    continue
                for one in flow.operations[index].outputs:
                    if one and one not in seen and one not in stream:
                        seen.add(one)
                        pending.append(one)


@dataclass(frozen=True)
class Recogniser:
    """Tells the roles of some weights of a graph."""

    name: str
    rank: int
    """Lower ones go first."""
    summary: str
    recognise: Callable[[Reading], None]


def in_order(members: Mapping[str, Recogniser]) -> list[Recogniser]:
    """The order in which they run."""
    return sorted(members.values(), key=lambda one: (one.rank, one.name))
