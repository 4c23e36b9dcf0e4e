"""A tie that the lock file holds and the model does not have any more."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.sealed import Change
from tieaudit.sealing import changes_since, doubtful
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

MEANT = "if it is meant: run `tieaudit lock` and commit what it writes"


def _examples() -> Examples:
    from tieaudit.sealing import as_locked
    from tieaudit.toy import Away, Broken, claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w, other = ramp(64, 8), ramp(64, 8, seed=1)
    tied = as_locked(toy({embed: w, head: None}, declared=[(embed, head)]))
    served = as_locked(toy({embed: w}, uses=[(embed, "Gather"), (embed, "Gemm")], format="onnx"))

    return Examples(
        bad=[
            toy({embed: w, head: w.copy()}, declared=[(embed, head)], locked=tied),
            toy({embed: w, head: other}, declared=[claim(embed, head, active=False)], locked=tied),
            toy({embed: w, head: w.T.copy()}, uses=[(embed, "Gather"), (head, "MatMul")], format="onnx", locked=served),
            toy({embed: w, head: other.T}, uses=[(embed, "Gather"), (head, "MatMul")], format="onnx", locked=served),
        ],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)], locked=tied),
            toy({"wte.weight": w, head: None}, declared=[("wte.weight", head)], locked=tied),
            toy({embed: other, head: None}, declared=[(embed, head)], locked=tied),
            toy({embed: w, head: other}),
            toy({embed: w}, uses=[(embed, "Gather")], format="onnx", locked=served),  # the head was cut off
        ],
        unsure=[
            toy({embed: w, head: Broken((64, 8))}, locked=tied),
            toy({embed: w, head: Away((64, 8))}, declared=[(embed, head)], locked=tied),
            toy({embed: Away((64, 8)), "norm": ramp(8)}, locked=tied),  # no index: what else is stored is not known
        ],
    )


@rule(
    "TIE206",
    "lost-since-lock",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A tie that the lock file holds and the model does not have any more.

    What it does:
        Compares the model with its entry in `tieaudit.lock`. Reports weights that were one when it was written and now
        are stored apart, differ, or are no longer declared to be one; and a stored tensor that served several
        operations and now serves fewer, beside a copy of it or one more weight of its role. Without an entry it says
        nothing.

    Why it matters:
        A tie gets lost silently: a new exporter, a conversion, a save with another library. The file grows, and the
        next training step makes the copies drift apart.

    How it is decided:
        By names; then, for a tie of which no name is left, by the digest of its value, which is the same in every
        layout; then by what its members are for, where only one tie of that shape is for it. So a renamed, resharded
        or retrained model has lost nothing. A tensor that serves fewer operations, and beside which there is neither a
        further copy nor a further weight of its role, is not stored again and belongs to changed-since-lock.

    Example:
        lm_head.weight was restored from model.embed_tokens.weight when the lock was written; now both are stored.

    Fix:
        `--scheme dedup` where the values are still equal; else tie them again where the model is made. If it is meant,
        `tieaudit lock` writes the new state, and the change of the lock file shows it to whoever reviews it.

    Cannot tell when:
        The bytes of a weight of a locked tie cannot be read, or are elsewhere (git-LFS, DVC).

    Sources:
        docs/lock.md; the ways in which ties get lost are those of TIE101 to TIE203.
    """
    unsure = doubtful(subject)
    if unsure:
        yield CannotTell("whether locked ties still hold: the bytes of a member cannot be read", unsure)
    for change in changes_since(subject):
        if change.kind == "lost" and not set(unsure) & {*change.before, *change.after}:
            ids = tuple(id for id in (change.after or change.before) if id in subject.model.by_id) or change.before
            at_stake = max(change.n_bytes, change.n_bytes_tie)
            yield Finding(ids, change.said, _fix(subject, change), {"locked": list(change.before)}, at_stake)


def _fix(subject: Subject, change: Change) -> Fix:
    """What ties them again, where they are still equal and several."""
    names = {*change.before, *change.after}
    for tie in subject.found.ties:
        if tie.origin == "measured" and names <= set(tie.ids):
            edit = share([member.id for member in tie.members], [member.view for member in tie.members])
            fix = rewrite(subject.model, "dedup", [edit])
            if fix.safety != "manual":
                return fix
    return Fix("manual", f"tie them again where the model is made; {MEANT}")
