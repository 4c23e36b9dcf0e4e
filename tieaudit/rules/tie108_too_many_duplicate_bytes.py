"""More bytes are stored again than the policy allows."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import duplicates
from tieaudit.printable import counted, size
from tieaudit.rules import Examples, rule
from tieaudit.summary import summary
from tieaudit.verdict import CannotTell, Demands, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import Away, Broken, ramp, toy

    w = ramp(64, 8)  # 64 · 8 · 4 = 2,048 bytes
    return Examples(
        bad=[toy({"a": w, "b": w.copy()}, format="onnx", demands=Demands(max_duplicate_bytes=2047))],
        good=[
            toy({"a": w, "b": w.copy()}, format="onnx", demands=Demands(max_duplicate_bytes=2048)),
            toy({"a": w, "b": w.copy()}, format="onnx"),
        ],
        unsure=[
            toy({"a": w, "b": Broken((64, 8))}, format="onnx", demands=Demands(max_duplicate_bytes=0)),
            toy({"a": w, "b": Away((64, 8))}, demands=Demands(max_duplicate_bytes=0)),
        ],
    )


@rule(
    "TIE108",
    "too-many-duplicate-bytes",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """More bytes are stored again than the policy allows.

    What it does:
        Compares the bytes of further copies of equal tensors with `max-duplicate-bytes`.

    Why it matters:
        A download, a container image and a phone have a budget. Single copies may be under every threshold and still
        add up.

    How it is decided:
        The total that `scan` shows as stored twice: every stored copy but the first of each class of equal tensors,
        transposed ones included; bytes that two names share count once; constants do not count.

    Example:
        max-duplicate-bytes = "1 MB", and the file stores an embedding of 4.1 MB twice.

    Fix:
        `--scheme dedup`, which the findings on the single classes recommend, too.

    Cannot tell when:
        Bytes of a weight cannot be read, or are elsewhere (git-LFS, DVC): they may be a copy. Nothing is said if the
        rest alone is over the limit.

    Sources:
        The owner's policy.
    """
    limit = subject.demands.max_duplicate_bytes
    if limit is None:
        return
    n_bytes = summary(subject.model, subject.found).n_bytes_duplicate
    ids = tuple(dict.fromkeys(id for one in duplicates(subject.model, subject.found) for id in one.ids))
    if n_bytes > limit:
        message = f"{size(n_bytes)} ({n_bytes:,} bytes) are stored again, {size(limit)} ({limit:,} bytes) may be"
        fix = Fix("manual", "see the findings on the single copies, or raise max-duplicate-bytes")
        yield Finding(ids, message, fix, {"n_bytes": n_bytes, "limit": limit}, n_bytes)
    elif not subject.seen_whole:
        lost = subject.unseen(one.id for one in subject.model.weights if not one.absent)
        what = f"the bytes of {counted(len(lost), 'weight')}" if lost else "the weights"
        yield CannotTell(f"whether more than {size(limit)} are stored again: {what} cannot be read")
