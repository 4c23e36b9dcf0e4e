"""Something of the model could not be read, so that what is said about it is not the whole truth."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.printable import listed, printable
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import Broken, ramp, toy

    w = ramp(64, 8)

    return Examples(
        bad=[toy({"a": w, "b": Broken((64, 8))})],
        good=[toy({"a": w, "b": ramp(64, 8, seed=1)})],
        unsure=[toy({"a": w}, notes=("model type 'unheard_of' is not known: what it ties cannot be told",))],
    )


@rule(
    "TIE902",
    "incomplete-reading",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Something of the model could not be read, so that what is said about it is not the whole truth.

    What it does:
        Reports weights whose bytes cannot be read, and repeats what the loader could not tell.

    Why it matters:
        A tie between unreadable weights is not found. Ignorance must not read as clean.

    How it is decided:
        A read failed: the file is shorter than its header says, was removed, or may not be opened.

    Example:
        The last shard was downloaded half.

    Fix:
        Download or copy the file again; compare its size and digest with the source.

    Cannot tell when:
        The loader read everything but does not know what some of it means (an unknown class, custom operators).

    Sources:
        docs/decisions and the format pages; nothing external.
    """
    lost = tuple(subject.found.unreadable)
    if lost:
        reason = subject.found.unreadable[lost[0]]
        message = f"the bytes of {listed(lost)} cannot be read: {printable(reason, None)}"
        fix = Fix("manual", "copy or download the file again, then compare its size and digest with the source")
        yield Finding(lost, message, fix, {"reasons": dict(subject.found.unreadable)})
    for note in subject.model.notes:
        yield CannotTell(note)
