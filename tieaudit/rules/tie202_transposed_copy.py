"""A weight that is stored a second time with its axes swapped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tieaudit.equality import can_declare, duplicates
from tieaudit.printable import listed, printable, size
from tieaudit.remedy import rewrite
from tieaudit.rules import rule
from tieaudit.toy import ramp, toy
from tieaudit.verdict import CannotTell, Finding, Subject

EMBED, HEAD = "wte.weight", "onnx::MatMul_11"
W = ramp(64, 8)
SQUARE = ramp(24, 24)
SYMMETRIC = np.add(SQUARE, SQUARE.T)
ONE_ELEMENT_OFF = W.T.copy()
ONE_ELEMENT_OFF[3, 5] += 1


@rule(
    "TIE202",
    "transposed-copy",
    severity="warning",
    since="0.1",
    bad=[
        toy({EMBED: W, HEAD: W.T.copy()}, uses=[(EMBED, "Gather"), (HEAD, "MatMul")], format="onnx"),
        toy({"a": SQUARE, "b": SQUARE.T.copy()}, format="onnx"),
        toy({"a": W, "b": W.copy(), "c": W.T.copy()}, format="onnx"),
    ],
    good=[
        toy({EMBED: W}, uses=[(EMBED, "Gather"), (EMBED, "Gemm")], format="onnx"),
        toy({EMBED: W, HEAD: ONE_ELEMENT_OFF}, format="onnx"),
        toy({EMBED: W, HEAD: W.copy()}, format="onnx"),
        toy({"symmetric": SYMMETRIC, "copy": SYMMETRIC.copy()}, format="onnx"),
    ],
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A weight that is stored a second time with its axes swapped.

    What it does:
        Reports classes of trained matrices of which one is the exact transpose of another, stored separately in one
        ONNX file.

    Why it matters:
        This is how a tied output head gets lost: the exporter writes Transpose(E) for the head, and constant folding,
        in the exporter, in ONNX Runtime's offline optimisation or in onnxsim, stores the result as a second matrix.
        No tool that compares tensors of one shape can see it.

    How it is decided:
        Exactly, element by element through the transpose. A symmetric matrix and its copy are equal, not transposed.
        The waste is every stored copy but the first.

    Example:
        wte.weight [512, 64] feeds a Gather, and onnx::MatMul_11 [64, 512] feeds the last MatMul.

    Fix:
        `--scheme dedup` keeps one layout and rewrites the other consumer so that no runtime folds the copy back.
        Values do not change.

    Cannot tell when:
        Never by itself: a weight whose bytes cannot be read is reported by duplicate-weights.

    Sources:
        torch/csrc/jit/passes/onnx/deduplicate_initializers.cpp runs after constant folding (reproduced: 279 KB
        instead of 153 KB); ONNX Runtime 1.32 at BASIC wrote the second copy for 93 of 93 exported tied architectures
        (reproduced); huggingface/transformers#12985, k2-fsa/sherpa-onnx#328.
    """
    model = subject.model
    if can_declare(model):
        return
    for same in duplicates(model, subject.found, lambda weight: weight.parameter is not False):
        if same.kind != "transposed":
            continue
        first = same.views[0]
        turned = tuple(id for id, view in zip(same.ids, same.views, strict=True) if view != first)
        kept = tuple(id for id in same.ids if id not in turned)
        message = (
            f"{listed(turned)} {'is' if len(turned) == 1 else 'are'} {printable(kept[0])} stored again with the axes "
            f"swapped, bit for bit: {size(same.n_bytes)} again"
        )
        evidence = {"views": dict(zip(same.ids, map(str, same.views), strict=True))}
        yield Finding(same.ids, message, rewrite(model, "dedup", same.ids), evidence, same.n_bytes)
