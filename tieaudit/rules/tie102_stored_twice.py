"""A declared tie whose members are equal, and stored more than once."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Equality, copies, declared, n_bytes_extra, stored
from tieaudit.printable import listed, printable, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)

    return Examples(
        bad=[
            toy({embed: w, head: w.copy()}, declared=[(embed, head)]),
            toy({"shared": w, "enc": w.copy(), "dec": w.copy()}, declared=[("shared", "enc"), ("shared", "dec")]),
            toy({embed: w, head: w.copy()}, declared=[claim(embed, head, restores=False)]),
        ],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)]),
            toy({embed: w, head: ramp(64, 8, seed=1)}, declared=[(embed, head)]),
            toy({embed: w, head: w.copy()}),
        ],
    )


@rule(
    "TIE102",
    "declared-tie-stored-twice",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A declared tie whose members are equal, and stored more than once.

    What it does:
        Reports weights that are declared one, are equal bit for bit, and are nevertheless stored separately.

    Why it matters:
        The copies are wasted bytes: on disk, in every download, and in loaders that do not re-tie. The next
        fine-tuning run that does not tie them lets them drift apart, and then the declaration is false.

    How it is decided:
        Exactly: canonical bytes, element type and shape. The waste is every stored copy but the first.

    Example:
        save_pretrained(state_dict=...) with a cloned state dict writes lm_head.weight beside the embedding.

    Fix:
        `--scheme dedup` drops the names that the class restores. Values do not change.

    Cannot tell when:
        Never by itself: a member whose bytes cannot be read is reported by broken-tie.

    Sources:
        huggingface/transformers#48972 (reproduced under 4.57 and 5.23), hiyouga/LlamaFactory#10560,
        vllm-project/vllm#3344.
    """
    model = subject.model
    equality = Equality(model, subject.found)
    for claimed in declared(model, active=True):
        for group in equality.groups(stored(subject, claimed.members)):
            if len(copies(model, group)) < 2:
                continue
            n_bytes = n_bytes_extra(model, [group])
            message = (
                f"{printable(claimed.claimed_by)} ties {listed(tuple(group))}, which are equal and stored "
                f"{len(copies(model, group))} times: {size(n_bytes)} for nothing"
            )
            fix = rewrite(model, "dedup", [share(group)])
            if not claimed.restores:
                fix = Fix("manual", "keep the copies: the loader does not restore a dropped one")
            yield Finding(tuple(group), message, fix, {"claimed_by": claimed.claimed_by}, n_bytes)
