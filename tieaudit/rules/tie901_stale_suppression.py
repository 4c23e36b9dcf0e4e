"""A suppression of the policy hides nothing any more."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Demands, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import ramp, toy

    said = "TIE101 lm_head.weight hides no finding: `lm_head.weight was trained apart on purpose`"
    return Examples(
        bad=[toy({"model.embed_tokens.weight": ramp(64, 8)}, demands=Demands(stale=(said,)))],
        good=[toy({"model.embed_tokens.weight": ramp(64, 8)})],
    )


@rule(
    "TIE901",
    "stale-suppression",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A suppression of the policy hides nothing any more.

    What it does:
        Reports entries `[[suppress]]` that hid no finding in a run that looked at every model they speak of.

    Why it matters:
        A suppression that outlives its finding hides the next one: the day the tie breaks again, nobody hears of it.

    How it is decided:
        Code, weight and path of the entry fit no finding of this run. An entry is judged only if all models of the
        policy were looked at and every one of them could be read, so that a hook that sees one file says nothing.

    Example:
        TIE101 on lm_head.weight is suppressed, and the folder has been tied since.

    Fix:
        Remove the entry from the policy.

    Cannot tell when:
        The run was about some of the models only, or one of them could not be read: then nothing is said.

    Sources:
        The practice of linters: unused `noqa` (ruff RUF100), unused `type: ignore` (mypy).
    """
    for sentence in subject.demands.stale:
        yield Finding((), sentence, Fix("manual", "remove the suppression from the policy"), {"suppression": sentence})
