"""Output head and token embedding become one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member, Weight, classes
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    heads = _of_kind(subject, "output_head")
    embeddings = _of_kind(subject, "token_embedding")
    one_value = _one_value(subject)
    if not heads or not embeddings:
        if not _tied_already(subject, embeddings):
            missing = "token embedding" if not embeddings else "output head"
            yield Refusal("io", (), f"no {missing} was recognised in this model")
        return
    done: set[frozenset[str]] = set()
    for head in heads:
        fitting = [(weight, view) for weight in embeddings if (view := _view(weight, head)) is not None]
        if not fitting:
            tables = ", ".join(map(_described, embeddings[:3]))
            because = f"the output head {_described(head)} fits no token embedding ({tables})"
            yield Refusal("io", (head.id,), because)
            continue
        tied = [pair for pair in fitting if one_value.get(pair[0].id, pair[0].id) == one_value.get(head.id, head.id)]
        weight, view = tied[0] if tied else min(fitting, key=lambda pair: _distance(pair[0], head))
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


def _described(weight: Weight) -> str:
    """With its element type: tensors of one shape in two types do not fit, either."""
    return f"{weight.id} {weight.dtype} {list(weight.shape)}"


def _of_kind(subject: Subject, kind: str) -> list[Weight]:
    return [weight for weight in subject.model.weights if subject.roles[weight.id].kind == kind]


def _one_value(subject: Subject) -> dict[str, str]:
    """Id → representative of its class under what was measured or is one by construction."""
    groups = [tie.ids for tie in subject.found.ties if tie.origin in ("measured", "aliased", "absent")]
    return {id: members[0] for members in classes(groups) for id in members}


def _tied_already(subject: Subject, embeddings: list[Weight]) -> bool:
    """One stored tensor that embeds and scores: nothing to propose, and nothing to refuse."""
    ids = {weight.id for weight in embeddings}
    return any(tie.origin in ("aliased", "absent") and ids & set(tie.ids) for tie in subject.found.ties)


def _view(embedding: Weight, head: Weight) -> View | None:
    if embedding.dtype != head.dtype or len(embedding.shape) != 2:
        return None
    if embedding.shape == head.shape:
        return AS_STORED
    return TRANSPOSED if embedding.shape == head.shape[::-1] else None


def _same_region(a: Weight, b: Weight) -> bool:
    return a.storage is not None and b.storage is not None and a.storage.region == b.storage.region


def _distance(embedding: Weight, head: Weight) -> tuple[bool, bool, bool]:
    """Prefer the embedding of the head's own part and scope, and the decoder's over the encoder's."""
    return (embedding.part != head.part, embedding.scope != head.scope, "encoder" in embedding.id.lower())


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
    listed_by_scan=True,
)
