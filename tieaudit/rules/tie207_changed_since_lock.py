"""A tie that is new since the lock file was written, or that has other members."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.rules import Examples, rule
from tieaudit.sealing import changes_since, doubtful
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

_FIX = Fix("manual", "look whether it is meant; then run `tieaudit lock` and commit what it writes")


def _examples() -> Examples:
    from tieaudit.sealing import as_locked
    from tieaudit.toy import Away, Broken, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w, other = ramp(64, 8), ramp(64, 8, seed=1)
    tied = as_locked(toy({embed: w, head: None}, declared=[(embed, head)]))
    served = as_locked(toy({embed: w}, uses=[(embed, "Gather"), (embed, "Gemm")], format="onnx"))
    untied = as_locked(toy({embed: w, head: other}))

    return Examples(
        bad=[
            toy({embed: w, head: None}, declared=[(embed, head)], locked=untied),
            toy({"wte.weight": w, head: None}, declared=[("wte.weight", head)], locked=tied),
            toy({embed: w, head: None, "tail": None}, declared=[(embed, head, "tail")], locked=tied),
            toy({embed: w}, uses=[(embed, "Gather")], format="onnx", locked=served),  # the head was cut off
        ],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)], locked=tied),
            toy({embed: other, head: None}, declared=[(embed, head)], locked=tied),
            toy({embed: other, head: w}, locked=untied),
            toy({embed: w, head: None}, declared=[(embed, head)]),
        ],
        unsure=[
            toy({embed: w, head: Broken((64, 8))}, locked=tied),
            toy({embed: w, head: Away((64, 8))}, declared=[(embed, head)], locked=tied),
            toy({embed: Away((64, 8)), "norm": ramp(8)}, locked=tied),  # no index: what else is stored is not known
        ],
    )


@rule(
    "TIE207",
    "changed-since-lock",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A tie that is new since the lock file was written, or that has other members.

    What it does:
        Compares the model with its entry in `tieaudit.lock`. Reports ties that were not there, ties with other or
        renamed members, and stored tensors that serve more operations, or fewer while no other tensor serves the rest.
        Lost ties belong to lost-since-lock. A tie whose common value is another one is still the same tie: a model
        that was trained further is no finding (`tieaudit lock --check` says so). Without an entry it says nothing.

    Why it matters:
        What changed on purpose is committed with its lock; what changed without anybody noticing is how a model with
        ties that its training did not have gets released.

    How it is decided:
        As in lost-since-lock.

    Example:
        A merge copied model.embed_tokens.weight over lm_head.weight, and the folder stores one tensor for both.

    Fix:
        Look whether the change is meant; then `tieaudit lock` writes the new state.

    Cannot tell when:
        The bytes of a weight of a locked tie cannot be read, or are elsewhere (git-LFS, DVC).

    Sources:
        docs/lock.md.
    """
    unsure = doubtful(subject)
    if unsure:
        yield CannotTell("whether locked ties are what they were: the bytes of a member cannot be read", unsure)
    for change in changes_since(subject):
        if change.kind not in ("lost", "value") and not set(unsure) & {*change.before, *change.after}:
            known = tuple(id for id in change.after if id in subject.model.by_id)
            at_stake = max(change.n_bytes, change.n_bytes_tie)
            yield Finding(known, f"{change.kind}: {change.said}", _FIX, {"locked": list(change.before)}, at_stake)
