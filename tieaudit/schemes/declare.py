"""The configuration is made to tell the truth about the weights that are there."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member, classes
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    model = subject.model
    if not model.declarations:
        yield Refusal("declare", (), f"nothing in a model of format {model.format} can declare a tie")
        return
    one_value = {
        id: group[0] for group in classes(t.ids for t in subject.found.ties if t.origin == "measured") for id in group
    }
    for declaration in model.declarations:
        stored = [id for id in declaration.members if id in model.by_id and not model.by_id[id].absent]
        if len(stored) < 2:
            continue
        equal = len({one_value.get(id, id) for id in stored}) == 1
        if declaration.active and not equal:
            because = f"{declaration.claimed_by} says tied, but the stored tensors differ"
        elif not declaration.active and equal:
            because = f"{declaration.claimed_by} says untied, but the stored tensors are equal"
        else:
            continue
        yield Candidate("declare", tuple(Member(id) for id in stored), 0, True, because, action="declare")


declare = Scheme(
    name="declare",
    summary="the configuration tells the truth: tied where the stored tensors are equal, untied where they differ",
    source="the same folder is two models under transformers 4.57 and 5.x while flag and weights disagree "
    "(vllm-project/vllm#51063, huggingface/transformers#42612)",
    propose=_propose,
    worth_comparing=lambda subject: (),  # saves nothing
    page="""declare: change the configuration, not the weights.

A flag that says *tied* over two different trained tensors makes transformers 4.57 discard the head and 5.x keep it.
This scheme switches the flag off where the tensors differ, and on where they are equal but declared untied, where this
class reads it. No weight file changes.""",
)
