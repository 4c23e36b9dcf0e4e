"""A declared tie that is stored only under a name from which an older loader does not restore it."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import declared, stored
from tieaudit.printable import listed, printable
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)

    return Examples(
        bad=[toy({embed: None, head: w}, declared=[(embed, head)])],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)]),
            toy({embed: w, head: w.copy()}, declared=[(embed, head)]),
            toy({embed: None, head: w}, declared=[claim(embed, head, active=False)]),
        ],
    )


@rule(
    "TIE106",
    "tie-kept-under-the-other-name",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A declared tie that is stored only under a name from which an older loader does not restore it.

    What it does:
        Reports declared ties whose canonical name is not stored, while another member is.

    Why it matters:
        transformers 5.x fills the embedding from the head. transformers 4.57 assigns in one direction only and leaves
        the embedding on the meta device: the first forward pass fails.

    How it is decided:
        By names: the first member of an active declaration is absent and another member is stored. Nothing is read.

    Example:
        tie_word_embeddings = true, and the file holds lm_head.weight but no model.embed_tokens.weight.

    Fix:
        By hand: load with transformers 5.x and save again; it writes the canonical name.

    Cannot tell when:
        Never: the names in the files decide.

    Sources:
        Both versions run on such a folder (reproduced); safetensors keeps the lexicographically first name when it
        removes duplicates, which need not be the canonical one (serialization `_remove_duplicate_names`).
    """
    if subject.model.format != "huggingface":
        return
    for claimed in declared(subject.model, active=True):
        kept = stored(subject, claimed.members)
        source = claimed.by[0].members[0]
        if not kept or source not in subject.model.by_id or not subject.model.by_id[source].absent:
            continue
        message = (
            f"{printable(source)} is not stored, only {listed(kept)}, tied to it by {printable(claimed.claimed_by)}: "
            "transformers 5.x fills it from there, transformers 4.57 does not"
        )
        fix = Fix("manual", "load the folder with transformers 5 and save it again: it writes the canonical name")
        yield Finding((source, *kept), message, fix, {"claimed_by": claimed.claimed_by})
