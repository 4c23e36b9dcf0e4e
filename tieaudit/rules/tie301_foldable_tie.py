"""A tie expressed as Transpose(W), which runtimes and optimisers fold into a second stored matrix."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.change import Respell
from tieaudit.folding import folded_apart
from tieaudit.model import Use
from tieaudit.printable import printable, size
from tieaudit.remedy import rewrite
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Subject
from tieaudit.view import TRANSPOSED


def _examples() -> Examples:
    from tieaudit.toy import ramp, toy

    e = "wte.weight"
    w = ramp(64, 8)
    trans_b = Use(e, "Gemm", "logits", 1, view=TRANSPOSED, feeds_output=True)

    return Examples(
        bad=[
            toy({e: w}, uses=[(e, "Gather"), (e, "Transpose MatMul")], format="onnx"),
            toy({e: w.T.copy()}, uses=[(e, "Transpose Gather"), (e, "MatMul")], format="onnx"),
        ],
        good=[
            toy({e: w}, uses=[(e, "Gather"), trans_b], format="onnx"),
            toy({e: w}, uses=[(e, "Transpose MatMul")], format="onnx"),
            toy({e: w.T.copy()}, uses=[(e, "Gather"), (e, "MatMul")], format="onnx"),
            toy({e: w}, uses=[(e, "Gather"), (e, "Transpose MatMul")], format="onnx", overridable=[e]),
        ],
        unsure=[toy({e: w}, uses=[(e, "Gather"), (e, "Transpose MatMul")], format="onnx", unknown=[e])],
    )


@rule(
    "TIE301",
    "foldable-tie",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A tie expressed as Transpose(W), which runtimes and optimisers fold into a second stored matrix.

    What it does:
        Reports matrices that the graph uses as stored in one place and through a Transpose node in another.

    Why it matters:
        The file holds the matrix once, the running model twice: constant folding evaluates Transpose(W) while the
        session is created and keeps both. onnxsim, onnx-graphsurgeon and ONNX Runtime's offline optimisation write
        the second copy to disk. In memory, ONNX Runtime's CPU provider packs the product's operand by default and
        then holds two copies of a Gemm as well: one copy needs the session option session.disable_prepacking=1 too.

    How it is decided:
        By the graph: at least one use goes through a Transpose node that moves something, and at least one does not.
        A transB attribute, FusedMatMul and Gather along axis 1 are not folded; a weight with only transposed uses is
        merely replaced. What a caller may override is no constant and is left alone.

    Example:
        Gather(E, ids) embeds, and MatMul(x, Transpose(E)) is the output head: torch.onnx.export writes it so.

    Fix:
        `--scheme dedup` expresses the transposed use as Gemm(transB=1), or as a flattened Gather along axis 1.

    Cannot tell when:
        It is not known whether the tensor is a weight or a computed constant that the runtime may drop anyway.

    Sources:
        ONNX Runtime 1.32, CPU, at BASIC, EXTENDED and ALL: 63 MB on disk become 125 MB after optimisation, for
        Transpose → MatMul and for Transpose → Gather; Gemm(transB), FusedMatMul(transB) and Gather(axis=1) stay at
        63 MB (reproduced). onnxsim 0.8.1 and onnx-graphsurgeon 0.6.1: 4.46 MB become 8.65 MB (reproduced).
        microsoft/onnxruntime#20709, #26208.
    """
    model = subject.model
    for id, uses in folded_apart(model).items():
        weight = model.by_id[id]
        if weight.overridable:
            continue
        if weight.parameter is None:
            yield CannotTell(f"whether {printable(id)}, used through a Transpose, is a weight: {weight.because}", (id,))
            continue
        through = ", ".join(f"{printable(use.op)} @ {printable(use.node)}" for use in uses[:3])
        message = (
            f"{printable(id)} {list(weight.shape)} is stored once, but {through} reads it through a Transpose node: "
            f"runtimes fold that into a second copy of {size(weight.n_bytes)}"
        )
        evidence = {"transposed_uses": [[use.part, use.scope, use.node, use.slot] for use in uses]}
        yield Finding((id,), message, rewrite(model, "dedup", [Respell(id)]), evidence, weight.n_bytes)
