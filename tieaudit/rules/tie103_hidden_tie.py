"""Weights of a folder that are equal bit for bit, and that nothing declares to be one."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Duplicate, can_declare, class_known, duplicates
from tieaudit.model import classes
from tieaudit.printable import listed, size
from tieaudit.remedy import LIVE
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

BY_HAND = (
    "keep both: transformers initialises a dropped, undeclared weight randomly; to tie them, "
    "declare it in the model class (_tied_weights_keys) first"
)
IN_PYTHON = (
    "in Python: tieaudit.tie(module) makes them one parameter; "
    "from_pretrained makes them one again only if the class declares it"
)


def _examples() -> Examples:
    from tieaudit.toy import UNKNOWN_CLASS, claim, ramp, toy

    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    w = ramp(64, 8)

    return Examples(
        bad=[
            toy({first: w, second: w.copy()}),
            toy({first: w, second: w.T.copy()}),
            toy({"shared": w, "enc": w.copy(), "stray": w.copy()}, declared=[("shared", "enc")]),
        ],
        good=[
            toy({first: w, second: ramp(64, 8, seed=1)}),
            toy({first: w, second: w.copy()}, declared=[(first, second)]),
            toy({first: w, second: w.copy()}, declared=[claim(first, second, active=False)]),
            toy({"layers.0.mask": w, "layers.1.mask": w.copy()}, buffers=["layers.0.mask", "layers.1.mask"]),
        ],
        unsure=[toy({first: w, second: w.copy()}, metadata=UNKNOWN_CLASS)],
    )


@rule(
    "TIE103",
    "hidden-tie",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Weights of a folder that are equal bit for bit, and that nothing declares to be one.

    What it does:
        Reports trained tensors of a model whose format can declare ties, that are equal or transposed copies of each
        other, stored separately, and covered by no declaration under any setting.

    Why it matters:
        Either the architecture shares the weight and the saved class forgot to say so, or layers were copied on
        purpose (depth up-scaling, initialisation) and never trained apart. In both cases bytes are stored twice, and
        in neither may a copy simply be dropped: the loader would initialise it randomly.

    How it is decided:
        Exactly: canonical bytes and element type, as stored or transposed. Constants and buffers are not counted.
        Weights that a declaration joins, switched on or off, count as one.

    Example:
        Two layers of a Llama hold the same mlp.up_proj.weight.

    Fix:
        By hand: declare the tie in the model class, or leave it. tieaudit refuses to drop a copy that no class
        restores.

    Cannot tell when:
        It is not known what the class declares (an unknown model type, or remote code): the copies are equal, but
        they may be declared.

    Sources:
        transformers 4.57 and 5.23 both report a dropped undeclared key as missing and initialise it randomly
        (reproduced with Llama and Qwen2); huggingface/transformers#41038.
    """
    if not can_declare(subject.model):
        return
    claims = classes(declaration.members for declaration in subject.model.declarations)
    home = {id: index for index, members in enumerate(claims) for id in members}
    for same in duplicates(subject.model, subject.found, lambda weight: weight.parameter is not False):
        apart = {home.get(id, id): id for id in reversed(same.ids)}
        if len(apart) < 2:
            continue
        if not class_known(subject.model):
            yield CannotTell(f"{listed(same.ids)} are equal; whether the class ties them is not known", same.ids)
        else:
            yield _finding(same, tuple(sorted(apart.values(), key=same.ids.index)), subject.model.format != LIVE)


def _finding(same: Duplicate, apart: tuple[str, ...], folder: bool) -> Finding:
    how = "equal up to a transpose" if same.kind == "transposed" else "equal bit for bit"
    message = f"{listed(apart)} are {how}, stored {len(same.copies)} times ({size(same.n_bytes)}), and nowhere declared"
    evidence = {"views": dict(zip(same.ids, map(str, same.views), strict=True))}
    return Finding(same.ids, message, Fix("manual", BY_HAND if folder else IN_PYTHON), evidence, same.n_bytes)
