"""Output head and token embedding become one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from tieaudit.model import Member, Weight
from tieaudit.onevalue import OneValue, one_value
from tieaudit.roles import projects
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    heads = _of_kind(subject, "output_head")
    embeddings = _of_kind(subject, "token_embedding")
    known, restored = one_value(subject), _restored(subject)
    if not heads or not embeddings:
        if not _tied_already(subject, embeddings):
            missing = "token embedding" if not embeddings else "output head"
            yield Refusal("io", (), f"no {missing} was recognised in this model")
        return
    done: set[frozenset[str]] = set()
    for head in heads:
        fitting = [(weight, view) for weight in embeddings if (view := _view(known, weight, head)) is not None]
        if not fitting:
            yield _unfit(subject, head, embeddings)
            continue
        tied = [
            (weight, view)
            for weight, view in fitting
            if {weight.id, head.id} in restored or known.holds((Member(weight.id), Member(head.id, view)))
        ]
        weight, view = tied[0] if tied else min(fitting, key=lambda pair: _distance(subject, pair[0], head))
        if weight.absent or head.absent or frozenset((weight.id, head.id)) in done:
            continue
        done.add(frozenset((weight.id, head.id)))
        if _same_region(weight, head):
            continue
        if not tied and not weight.is_float:
            because = f"{head.id} and {weight.id} are codes, each with a scale of its own"
            yield Refusal("io", (weight.id, head.id), f"{because}: to the other's reader they mean other numbers")
            continue
        because = f"{head.id} scores the vocabulary that {weight.id} embeds"
        members = (Member(weight.id), Member(head.id, view))
        yield Candidate("io", members, head.n_bytes, bool(tied), because)


def _unfit(subject: Subject, head: Weight, embeddings: list[Weight]) -> Candidate | Refusal:
    """The pair that would be one if it had one shape, with what it lacks; a refusal where only the role agrees."""
    near = [one for one in embeddings if not one.absent and _agrees(one, head)]
    if head.absent or not near or not head.n_elements:
        tables = ", ".join(map(_described, embeddings[:3]))
        return Refusal("io", (head.id,), f"the output head {_described(head)} fits no token embedding ({tables})")
    table = min(near, key=lambda one: (one.shape[0] not in head.shape, *_distance(subject, one, head)))
    of_head = head.shape if head.shape[0] == table.shape[0] or head.shape[1] == table.shape[1] else head.shape[::-1]
    (n_rows, width), (n_scored, n_in), size = table.shape, of_head, head.n_bytes // head.n_elements
    pair = f"{_described(head)} and {_described(table)}"
    if n_rows == n_scored:
        because = f"{pair} have one vocabulary and two widths: one table needs a learned map of {width}×{n_in} between"
        saved = max(head.n_bytes - width * n_in * size, 0)
    else:
        n_common = min(n_rows, n_scored)
        because = f"{pair} have one width and two vocabularies: one table could serve only the {n_common} rows of both"
        saved = n_common * width * size
    members = (Member(table.id), Member(head.id, AS_STORED if of_head == head.shape else TRANSPOSED))
    return Candidate("io", members, saved, False, because, action="fit")


def _agrees(table: Weight, head: Weight) -> bool:
    """Whether a table and a head share the vocabulary or the width."""
    if table.dtype != head.dtype or not table.is_float or not len(table.shape) == len(head.shape) == 2:
        return False
    return any(table.shape[axis] == shape[axis] for shape in (head.shape, head.shape[::-1]) for axis in (0, 1))


def _described(weight: Weight) -> str:
    """With its element type: tensors of one shape in two types do not fit, either."""
    return f"{weight.id} {weight.dtype} {list(weight.shape)}"


def _of_kind(subject: Subject, kind: str) -> list[Weight]:
    return [weight for weight in subject.model.weights if subject.roles[weight.id].kind == kind]


def _restored(subject: Subject) -> list[set[str]]:
    """Pairs of which one is not stored: its loader makes it the other."""
    absent = [tie for tie in subject.found.ties if tie.origin == "absent"]
    known = subject.model.by_id
    return [{id, other} for tie in absent for id in tie.ids for other in tie.ids if id in known and known[id].absent]


def _tied_already(subject: Subject, embeddings: list[Weight]) -> bool:
    """One stored tensor that embeds and scores: nothing to propose, and nothing to refuse."""
    tables = {weight.id for weight in embeddings}
    for tie in subject.found.ties:
        if tie.origin in ("aliased", "absent") and tables & set(tie.ids):
            scores = any(subject.roles[id].kind == "output_head" for id in tie.ids if id in subject.roles)
            if scores or any(projects(use) for id in tie.ids for use in subject.model.uses_of.get(id, ())):
                return True
    return False


def _view(known: OneValue, embedding: Weight, head: Weight) -> View | None:
    if embedding.dtype != head.dtype or len(embedding.shape) != 2:
        return None
    if embedding.shape == head.shape:
        return known.view(embedding.id, head.id) or AS_STORED
    return TRANSPOSED if embedding.shape == head.shape[::-1] else None


def _same_region(a: Weight, b: Weight) -> bool:
    return a.storage is not None and b.storage is not None and a.storage.region == b.storage.region


def _distance(subject: Subject, embedding: Weight, head: Weight) -> tuple[bool, bool, bool, bool, int, bool]:
    """Prefer the head's own part and scope, what is used, what the class answers, what stands in the head's own module,
    and the decoder's over the encoder's.

    Where a class keeps a table for both sides and a copy in each (T5), its answer is the one that it ties the head to;
    a graph that does not read that table has its word first.
    """
    model = subject.model
    answer = next((id for id, kind in model.hints.items() if kind == "token_embedding"), embedding.id)
    unused = model.has_graph and not model.uses_of.get(embedding.id)
    is_encoder = "encoder" in (subject.roles[embedding.id].side or embedding.id.lower())
    path = zip(embedding.name.split("."), head.name.split("."), strict=False)
    n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], path))
    apart = embedding.part != head.part, embedding.scope != head.scope
    return *apart, unused, embedding.id != answer, -n_common, is_encoder


io = Scheme(
    name="io",
    summary="the output head and the token embedding become one tensor",
    source="Press & Wolf 2017, Using the Output Embedding to Improve Language Models (EACL), section 3; "
    "Inan, Khosravi & Socher 2017 (ICLR)",
    propose=_propose,
    page="""io: one matrix embeds the input tokens and scores the output tokens.

Lossless where the two are already equal bit for bit. Where they differ, tying changes the model: it is refused with the
measured difference unless --allow-lossy is given, and --merge says which values survive (keep:head, keep:embedding or
mean). For trained, untied language models the head is the better survivor.""",
)
