"""A weight that is stored a second time with its axes swapped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tieaudit.equality import Equality, can_declare, duplicates
from tieaudit.model import Use, Weight
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
CODES = np.random.default_rng(0).integers(0, 255, (64, 8)).astype(np.uint8)
LOOKUP = Use(EMBED, "Gather", "x", 0, reads_ids=True)
PROJECTION = Use(HEAD, "MatMulInteger", "logits", 1, feeds_output=True)


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
        toy({EMBED: W, HEAD: ramp(8, 64, seed=1)}, uses=[LOOKUP, PROJECTION], format="onnx"),
    ],
    unsure=[
        toy({EMBED: CODES, HEAD: (CODES.T // 2).astype(np.int8)}, uses=[LOOKUP, PROJECTION], format="onnx"),
        toy({EMBED: W, HEAD: (CODES.T // 2).astype(np.int8)}, uses=[LOOKUP, PROJECTION], format="onnx"),
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
        Embedding and head have the shape of one matrix, but one of them or both were quantised: each quantiser chose
        its own scales, and equal bytes are no longer the question. Bytes that cannot be read: see duplicate-weights.

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
    yield from _quantised_apart(subject)


def _quantised_apart(subject: Subject) -> Iterator[CannotTell]:
    """An embedding and a head that may have been one matrix before a quantiser took each by itself."""
    equality = Equality(subject.model, subject.found)
    embeddings, heads = (_of(subject, kind) for kind in ("token_embedding", "output_head"))
    for embedding in embeddings:
        for head in heads:
            quantised = [weight for weight in (embedding, head) if not weight.is_float]
            if quantised and _fits(embedding, head) and not equality.same(embedding.id, head.id):
                packed_alike = embedding.n_bytes == head.n_bytes and sorted(embedding.shape) != sorted(head.shape)
                because = (
                    f"whether {printable(embedding.id)} ({embedding.dtype}) and {printable(head.id)} ({head.dtype}) "
                    "were one matrix before they were quantised"
                    + (": two packings are not compared" if packed_alike else " apart: their bytes cannot say")
                )
                yield CannotTell(because, (embedding.id, head.id))


def _fits(embedding: Weight, head: Weight) -> bool:
    """Whether both may hold one matrix: of one shape, or packed two 4-bit values to a byte, in blocks or not."""
    if sorted(embedding.shape) == sorted(head.shape):
        return True
    fewer, more = sorted((embedding.n_elements, head.n_elements))
    return fewer > 0 and more in (fewer, 2 * fewer) and embedding.shape[0] in head.shape


def _of(subject: Subject, kind: str) -> list[Weight]:
    return [weight for weight in subject.model.weights if subject.roles[weight.id].kind == kind and not weight.absent]
