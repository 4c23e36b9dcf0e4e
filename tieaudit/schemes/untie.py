"""Every role gets a stored tensor of its own: the inverse of tying."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    several = {id for tie in subject.found.ties if tie.origin == "aliased" and len(tie.ids) > 1 for id in tie.ids}
    for tie in subject.found.ties:
        if len(tie.ids) == 1 and tie.ids[0] in several and any(use.call for use in subject.model.uses_of[tie.ids[0]]):
            continue  # the graph reads a tie of several names through one of them; each name gets its own operations
        if tie.origin in ("aliased", "absent"):
            stored = subject.model.by_id[tie.members[0].id]
            added = stored.n_bytes * (len(tie.members) - 1)
            yield Candidate("untie", tie.members, -added, True, tie.because, action="unshare")


untie = Scheme(
    name="untie",
    summary="every role of a tied tensor gets a stored copy of its own",
    source="what quantisers need before calibrating one role (onnx/ir-py#406, huggingface/transformers#37905)",
    propose=_propose,
    worth_comparing=lambda subject: (),  # saves nothing
    page="""untie: give every role its own copy.

For consumers that cannot hold a tie, or before one role is changed alone (quantised, fine-tuned, pruned). Values do not
change; the file grows by what the tie saved. In a Hugging Face folder the copies are written under the names that the
class ties, and the setting that ties them is switched off where this class reads it.""",
)
