"""The model has more parameters than the policy allows."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.rules import Examples, rule
from tieaudit.summary import summary
from tieaudit.verdict import CannotTell, Demands, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)  # 512 parameters; 1,024 by name
    return Examples(
        bad=[
            toy({embed: w, head: ramp(64, 8, seed=1)}, demands=Demands(max_parameters=512)),
            toy({embed: w}, demands=Demands(max_parameters=511)),
        ],
        good=[
            toy({embed: w, head: None}, declared=[(embed, head)], demands=Demands(max_parameters=512)),
            toy({embed: w, head: ramp(64, 8, seed=1)}),
        ],
        unsure=[toy({embed: w, "mystery": w}, unknown=["mystery"], demands=Demands(max_parameters=4096))],
    )


@rule(
    "TIE109",
    "too-many-parameters",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """The model has more parameters than the policy allows.

    What it does:
        Compares the number of parameters, each tie counted once, with `max-parameters`.

    Why it matters:
        A lost tie adds a vocabulary times a width to a model, and nothing fails. The number that the model card states
        is the one that its users plan with.

    How it is decided:
        The number that `scan` shows: what `sum(p.numel() for p in model.parameters())` of the live model gives; for
        ONNX the parameters that are present in the file, equal ones once.

    Example:
        max-parameters = 125_000_000, and the folder holds an untied head besides.

    Fix:
        By hand: find out which tie is missing (`tieaudit scan`), or state the new size.

    Cannot tell when:
        It cannot be told which weights are parameters and which are buffers; or there are too many only if weights
        whose bytes cannot be read are no copies of others.

    Sources:
        The owner's policy.
    """
    limit = subject.demands.max_parameters
    if limit is None:
        return
    total = summary(subject.model, subject.found)
    if total.n_parameters is None:
        yield CannotTell(f"whether there are more than {limit:,} parameters: {total.n_parameters_because}")
    elif total.n_parameters - (n_unseen := _n_unseen(subject)) <= limit < total.n_parameters:
        because = f"{total.n_parameters:,} are named, and {n_unseen:,} of them cannot be read: they may be copies"
        yield CannotTell(f"whether there are more than {limit:,} parameters: {because}")
    elif total.n_parameters > limit:
        message = f"the model has {total.n_parameters:,} parameters, {total.n_parameters - limit:,} more than {limit:,}"
        fix = Fix("manual", "find the tie that is missing with `tieaudit scan`, or raise max-parameters")
        yield Finding((), message, fix, {"n_parameters": total.n_parameters, "limit": limit})


def _n_unseen(subject: Subject) -> int:
    """Elements of weights that were counted though nobody has seen whether they are copies."""
    if not subject.model.weights_here:
        return 0  # then it is the class that counts, and a class knows what it ties
    counted = [one for one in subject.model.weights if one.parameter and not one.absent]
    hidden = subject.unseen(one.id for one in counted)
    return sum(one.n_elements for one in counted if one.id in hidden)
