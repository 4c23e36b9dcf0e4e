"""A tie that is switched off, while the two tensors are equal."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Declared, Equality, copies, declared, n_bytes_extra, stored
from tieaudit.model import UNWRITTEN, classes
from tieaudit.printable import listed, printable, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Subject


def _examples() -> Examples:
    from tieaudit.toy import Broken, claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)
    off = claim(embed, head, active=False)

    return Examples(
        bad=[toy({embed: w, head: w.copy()}, declared=[off])],
        good=[
            toy({embed: w, head: ramp(64, 8, seed=1)}, declared=[off]),
            toy({embed: w, head: w.copy()}, declared=[(embed, head)]),
        ],
        unsure=[toy({embed: w, head: Broken((64, 8))}, declared=[off])],
    )


@rule(
    "TIE104",
    "untied-but-equal",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A tie that is switched off, while the two tensors are equal.

    What it does:
        Reports weights that the class could tie, that the configuration declares untied, and that are equal bit for
        bit.

    Why it matters:
        Equal trained tensors are no accident: the model was tied when it was trained, and a conversion or a merge
        switched the flag off. The copy is stored, loaded and, in the next fine-tuning run, trained apart.

    How it is decided:
        Exactly: canonical bytes, element type and shape. The flag is read at the level where this class reads it.

    Example:
        config.json says tie_word_embeddings = false; lm_head.weight equals model.embed_tokens.weight.

    Fix:
        `--scheme dedup` switches the flag on where this class reads it and drops the copy; it refuses where the flag
        changes more than the tie (T5 scales its logits with it). `--scheme declare` changes the flag only.

    Cannot tell when:
        The bytes of a member cannot be read.

    Sources:
        huggingface/transformers#46456 (an audit by hand of exactly this), vllm-project/vllm#3344. T5 under 4.57: the
        flag alone multiplies the logits by 1/sqrt(d_model) (reproduced).
    """
    model = subject.model
    equality = Equality(model, subject.found)
    on = classes(declaration.members for declaration in model.declarations if declaration.active)
    home = {id: index for index, members in enumerate(on) for id in members}
    for claimed in declared(model, active=False):
        ids = stored(subject, claimed.members)
        groups = equality.groups(ids)
        for group in groups:
            if len(copies(model, group)) < 2 or len({home.get(id, id) for id in group}) < 2:
                continue
            n_bytes = n_bytes_extra(model, [group])
            message = f"{_who(claimed)}, but {listed(tuple(group))} are equal bit for bit: {size(n_bytes)} stored again"
            evidence = {"claimed_by": claimed.claimed_by, "condition": claimed.condition}
            yield Finding(tuple(group), message, rewrite(model, "dedup", [share(group)]), evidence, n_bytes)
        lost = tuple(subject.unseen(ids))
        if lost and len(groups) > 1:
            because = f"whether {listed(ids)} are equal, though declared untied: {listed(lost)} cannot be read"
            yield CannotTell(because, ids)


def _who(claimed: Declared) -> str:
    """What keeps these untied: a setting as it is written, the default where nothing is written, or the class."""
    claim = next((one for one in claimed.by if one.condition), None)
    if claim is None:
        return f"{printable(claimed.claimed_by)} says untied"
    _, absent, default = claim.because.partition(UNWRITTEN)
    said = f"is {absent}{printable(default)}" if absent else "says untied"
    return f"{printable(claim.condition)} {said}"
