"""Buffers, masks and constants that are stored more than once."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import copies, duplicates, n_bytes_extra
from tieaudit.printable import counted, printable, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject


def _examples() -> Examples:
    import numpy as np

    from tieaudit.toy import ramp, toy

    mask = np.tri(160, 160, dtype=bool)
    zeros = np.zeros((160, 160), "float32")
    names = ("layers.0.attn.mask", "layers.1.attn.mask", "layers.2.attn.mask", "layers.3.attn.mask")

    return Examples(
        bad=[
            toy({name: mask.copy() for name in names}, format="onnx", buffers=names),
            toy({name: zeros.copy() for name in names}, format="onnx"),
        ],
        good=[
            toy({names[0]: mask}, format="onnx", buffers=names),
            toy({names[0]: ramp(160, 160), names[1]: ramp(160, 160)}, format="onnx"),
        ],
    )


@rule(
    "TIE205",
    "duplicate-constants",
    severity="info",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Buffers, masks and constants that are stored more than once.

    What it does:
        Adds up the copies of tensors that nobody trains (buffers, masks, indices) and of tensors filled with one
        value, in one finding per model.

    Why it matters:
        It costs bytes only. A causal mask per layer of a long-context model takes more than its embedding.

    How it is decided:
        Exactly: canonical bytes, element type and shape. Tensors filled with one value are equal constants, whatever
        they are for: two biases that are zero are not a tie.

    Example:
        Every attention block of an exported GPT-2 holds the same causal mask.

    Fix:
        In ONNX `--scheme dedup` stores each once. A Hugging Face loader expects each under its own name.

    Cannot tell when:
        Never: what cannot be read is reported by incomplete-reading, and whether a tensor is trained does not matter
        to its bytes.

    Sources:
        onnxscript's and ONNX Runtime's constant sharing stop at 1,024 and at 1 elements.
    """
    model, found = subject.model, subject.found
    groups = [same.ids for same in duplicates(model, found, lambda weight: weight.parameter is False)]
    groups += [ids for ids in found.constant_classes if len(copies(model, ids)) > 1]
    if not groups:
        return
    n_bytes = n_bytes_extra(model, groups)
    largest = max(groups, key=lambda ids: n_bytes_extra(model, [ids]))
    again = sum(len(copies(model, ids)) - 1 for ids in groups)
    what = counted(len(groups), "buffer or constant", "buffers and constants")
    message = (
        f"{counted(again, 'further copy', 'further copies')} of {what} ({printable(largest[0])} the largest): "
        f"{size(n_bytes)} again"
    )
    every = tuple(id for ids in groups for id in ids)
    fix = Fix("manual", "keep them: the loader expects each under its own name")
    if model.has_graph:
        fix = rewrite(model, "dedup", [share(ids) for ids in groups])
    yield Finding(every, message, fix, {"classes": [list(ids) for ids in groups]}, n_bytes)
