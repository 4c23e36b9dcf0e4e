"""A weight that is stored a second time with its axes swapped, or its codes in another packing."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Equality, can_declare, duplicates
from tieaudit.model import Use, Weight
from tieaudit.printable import listed, printable, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import Apart, CannotTell, Finding, Fix, Subject


def _examples() -> Examples:
    import numpy as np

    from tieaudit.toy import ramp, toy

    embed, head = "wte.weight", "onnx::MatMul_11"
    w = ramp(64, 8)
    square = ramp(24, 24)
    symmetric = np.add(square, square.T)
    one_element_off = w.T.copy()
    one_element_off[3, 5] += 1
    codes = np.random.default_rng(0).integers(0, 255, (64, 8)).astype(np.uint8)
    lookup = Use(embed, "Gather", "x", 0, reads_ids=True)
    projection = Use(head, "MatMulInteger", "logits", 1, feeds_output=True)

    return Examples(
        bad=[
            toy({embed: w, head: w.T.copy()}, uses=[(embed, "Gather"), (head, "MatMul")], format="onnx"),
            toy({"a": square, "b": square.T.copy()}, format="onnx"),
            toy({"a": w, "b": w.copy(), "c": w.T.copy()}, format="onnx"),
        ],
        good=[
            toy({embed: w}, uses=[(embed, "Gather"), (embed, "Gemm")], format="onnx"),
            toy({embed: w, head: one_element_off}, format="onnx"),
            toy({embed: w, head: w.copy()}, format="onnx"),
            toy({"symmetric": symmetric, "copy": symmetric.copy()}, format="onnx"),
            toy({embed: w, head: ramp(8, 64, seed=1)}, uses=[lookup, projection], format="onnx"),
        ],
        unsure=[
            toy({embed: codes, head: (codes.T // 2).astype(np.int8)}, uses=[lookup, projection], format="onnx"),
            toy({embed: w, head: (codes.T // 2).astype(np.int8)}, uses=[lookup, projection], format="onnx"),
        ],
    )


_MOST_STEPS = 2.0
"""Median distance up to which two matrices may be roundings of one, which are at most one step apart where nothing is
clipped."""


@rule(
    "TIE202",
    "transposed-copy",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A weight that is stored a second time with its axes swapped, or its codes in another packing.

    What it does:
        Reports classes of trained matrices of which one is the exact transpose of another, stored separately in one
        ONNX file; and of matrices quantised in blocks whose codes are stored once for the lookup
        (GatherBlockQuantized) and once for the product (MatMulNBits), with equal scales and zero points.

    Why it matters:
        This is how a tied output head gets lost: the exporter writes Transpose(E) for the head, and constant folding,
        in the exporter, in ONNX Runtime's offline optimisation or in onnxsim, stores the result as a second matrix.
        No tool that compares tensors of one shape can see it.

    How it is decided:
        Exactly, element by element through the transpose; packed codes bit by bit, where signed ones differ from
        unsigned ones in their top bit only. A symmetric matrix and its copy are equal, not transposed. The waste is
        every stored copy but the first. An embedding and a head of other codes are compared by their numbers, (code -
        zero point) · scale, at some 3,000 places: all equal, and then everything equal, is a finding; a median distance
        of more than 2 quantisation steps means two matrices, and nothing is said.

    Example:
        wte.weight [512, 64] feeds a Gather, and onnx::MatMul_11 [64, 512] feeds the last MatMul.

    Fix:
        `--scheme dedup` keeps one layout and rewrites the other consumer so that no runtime folds the copy back.
        Values do not change.

    Cannot tell when:
        Embedding and head have the shape of one matrix and were quantised apart, each with scales of its own: the
        distance of their numbers is told, in steps, but two roundings of one matrix look like two similar matrices.
        Scales that are not found in the graph, and bytes that cannot be read: see duplicate-weights.

    Sources:
        onnxruntime.quantization.matmul_nbits_quantizer packs one matrix in two ways where both operations are chosen
        (reproduced, 1.32); torch/csrc/jit/passes/onnx/deduplicate_initializers.cpp runs after constant folding
        (reproduced: 279 KB instead of 153 KB); ONNX Runtime 1.32 at BASIC wrote the second copy for 93 of 93 exported
        tied architectures (reproduced); huggingface/transformers#12985, k2-fsa/sherpa-onnx#328.
    """
    model = subject.model
    if can_declare(model):
        return
    for same in duplicates(model, subject.found, lambda weight: weight.parameter is not False):
        if same.kind not in ("transposed", "repacked"):
            continue
        first = same.views[0]
        turned = tuple(id for id, view in zip(same.ids, same.views, strict=True) if view != first)
        kept = tuple(id for id in same.ids if id not in turned)
        verb = "is" if len(turned) == 1 else "are"
        what = "in another packing, code for code" if same.kind == "repacked" else "with the axes swapped, bit for bit"
        message = f"{listed(turned)} {verb} {printable(kept[0])} stored again {what}: {size(same.n_bytes)} again"
        evidence = {"views": dict(zip(same.ids, map(str, same.views), strict=True))}
        yield Finding(same.ids, message, rewrite(model, "dedup", [share(same.ids, same.views)]), evidence, same.n_bytes)
    yield from _quantised_apart(subject)


def _quantised_apart(subject: Subject) -> Iterator[Finding | CannotTell]:
    """An embedding and a head that may have been one matrix before a quantiser took each by itself."""
    equality = Equality(subject.model, subject.found)
    distances = {(one.table, one.matrix): one for one in subject.found.apart}
    embeddings, heads = (_of(subject, kind) for kind in ("token_embedding", "output_head"))
    for embedding in embeddings:
        for head in heads:
            quantised = any(not weight.is_float for weight in (embedding, head))
            if not quantised or equality.same(embedding.id, head.id):
                continue
            measured = distances.get((embedding.id, head.id))
            if measured is not None:
                yield from _measured(embedding, head, measured)
            elif _fits(embedding, head):
                yield CannotTell(f"{_question(embedding, head)}: their bytes cannot say", (embedding.id, head.id))


def _question(embedding: Weight, head: Weight) -> str:
    one, other = (f"{printable(weight.id)} ({weight.dtype})" for weight in (embedding, head))
    return f"whether {one} and {other} were one matrix before they were quantised apart"


def _measured(embedding: Weight, head: Weight, apart: Apart) -> Iterator[Finding | CannotTell]:
    """What the distance of the numbers says."""
    ids = (embedding.id, head.id)
    if apart.equal:
        n_bytes = min(embedding.n_bytes, head.n_bytes)
        one, other = (f"{printable(weight.id)} ({weight.dtype})" for weight in (embedding, head))
        message = f"{other} holds the numbers of {one} again, in codes of its own: {size(n_bytes)} again"
        fix = Fix("manual", "quantise the matrix once, and let lookup and product read the same codes and scales")
        yield Finding(ids, message, fix, {"view": str(apart.view), "n_steps": 0.0}, n_bytes)
    elif apart.n_steps <= _MOST_STEPS:
        steps = f"{apart.n_steps:.2g} quantisation steps apart in the middle, {apart.n_most_steps:.2g} at most"
        said = f"at {apart.n_looked_at} places their numbers are {steps}; roundings of one matrix are less than 1 apart"
        yield CannotTell(f"{_question(embedding, head)}: {said}", ids)


def _fits(embedding: Weight, head: Weight) -> bool:
    """Whether both may hold one matrix: of one shape, or packed two 4-bit values to a byte, in blocks or not."""
    if sorted(embedding.shape) == sorted(head.shape):
        return True
    fewer, more = sorted((embedding.n_elements, head.n_elements))
    return fewer > 0 and more in (fewer, 2 * fewer) and embedding.shape[0] in head.shape


def _of(subject: Subject, kind: str) -> list[Weight]:
    return [weight for weight in subject.model.weights if subject.roles[weight.id].kind == kind and not weight.absent]
