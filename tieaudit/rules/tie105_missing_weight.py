"""A weight that is not stored, and that no loader restores from another one."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import declared, stored
from tieaudit.model import classes
from tieaudit.printable import listed, printable
from tieaudit.remedy import can_edit
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

NOT_FILLED = "not stored, not tied"
COMPUTED = "computed by "
"""What a loader that asked the class says of an absent weight: nothing fills it, or the class computes it itself."""


def _examples() -> Examples:
    from tieaudit.toy import UNKNOWN_CLASS, claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)
    note = claim(embed, head, restores=False, condition="")

    return Examples(
        bad=[
            toy({embed: w, head: None}, declared=[claim(embed, head, active=False)]),
            toy({embed: None, head: None}, declared=[(embed, head)]),
            toy({embed: w, head: None}, declared=[note]),
        ],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)]),
            toy({embed: w, head: w.copy()}, declared=[claim(embed, head, active=False)]),
            toy({embed: w, head: None}, declared=[claim(embed, head, active=False), (embed, head)]),
        ],
        unsure=[
            toy({embed: w, head: None}, declared=[note], format="safetensors"),
            toy({embed: w, head: None}, metadata=UNKNOWN_CLASS),
        ],
    )


@rule(
    "TIE105",
    "missing-weight",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A weight that is not stored, and that no loader restores from another one.

    What it does:
        Reports weights that the class needs, that the files do not hold, and that no active tie re-creates.

    Why it matters:
        The loader initialises them at random and says so in one log line. The model then runs, and answers nonsense.

    How it is decided:
        By names: a member of a declaration is absent, and no active declaration that its loader restores joins it
        with a stored weight. Nothing is read.

    Example:
        config.json says tie_word_embeddings = false, and the files hold no lm_head.weight.

    Fix:
        `--scheme declare` cannot know whether the tie was meant. If it was, switch the flag on; if it was not, the
        weight is lost here and has to come from the original checkpoint.

    Cannot tell when:
        The absence is only documented (an alias map in safetensors metadata), or it is not known what the class
        declares: an absent weight may be tied or missing.

    Sources:
        transformers 4.57 and 5.23, flag off and head absent: randomly initialised head in both (reproduced);
        huggingface/transformers#43429, vllm-project/vllm#53019, huggingface/transformers#41038 (the alias map is
        ignored on load).
    """
    model = subject.model
    restoring = classes(d.members for d in model.declarations if d.active and d.restores)
    held = {id for members in restoring if any(_is_stored(subject, id) for id in members) for id in members}
    absent = {weight.id: place for place, weight in enumerate(model.weights) if weight.absent and weight.id not in held}
    seen: set[str] = set()
    for claimed in (*declared(model, active=True), *declared(model, active=False)):
        lost = (id for id in claimed.members if id in absent and id not in seen)
        ids = tuple(sorted(lost, key=absent.__getitem__))
        if not ids:
            continue
        seen.update(ids)
        kept = stored(subject, claimed.members)
        if model.format != "huggingface":
            yield CannotTell(f"{listed(ids)}: not stored; {printable(claimed.claimed_by)} documents a tie only", ids)
            continue
        switched = claimed.condition and not any(declaration.active for declaration in claimed.by)
        why = f"not tied ({printable(claimed.by[0].because)})" if switched else "no loader restores it from another"
        message = f"{listed(ids)}: not stored and {why}; transformers initialises it randomly"
        fix = Fix("manual", "take the weight from the original checkpoint")
        if kept and switched and can_edit(model):
            how = f"if it was tied to {printable(kept[0])}, set {printable(claimed.condition)} to true; else restore it"
            fix = Fix("manual", how)
        yield Finding(ids, message, fix, {"claimed_by": claimed.claimed_by, "stored": list(kept)})
    yield from _unclaimed(subject, tuple(id for id in absent if id not in seen))


def _unclaimed(subject: Subject, ids: tuple[str, ...]) -> Iterator[Finding | CannotTell]:
    """Absent weights of which nobody claims a tie: random, computed by the class itself, or not known."""
    because = {id: subject.model.by_id[id].because for id in ids}
    random = tuple(id for id in ids if because[id] == NOT_FILLED)
    if random:
        message = f"{listed(random)}: not stored, and no tie restores them; transformers initialises them randomly"
        yield Finding(random, message, Fix("manual", "take the weights from the original checkpoint"))
    unknown = tuple(id for id in ids if id not in random and not because[id].startswith(COMPUTED))
    if unknown:
        yield CannotTell(f"{listed(unknown)}: not stored, and it is not known whether the class ties it", unknown)


def _is_stored(subject: Subject, id: str) -> bool:
    return id in subject.model.by_id and not subject.model.by_id[id].absent
