"""Equal weights that are stored more than once, in a format that could store them once."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import can_declare, duplicates
from tieaudit.printable import listed, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Subject


def _examples() -> Examples:
    from tieaudit.toy import Broken, ramp, toy

    embed, head = "wte.weight", "lm_head.weight"
    w = ramp(64, 8)
    one_bit_off = w.copy()
    one_bit_off.view("uint32")[5, 3] ^= 1

    return Examples(
        bad=[
            toy({embed: w, head: w.copy()}, uses=[(embed, "Gather"), (head, "Gemm")], format="onnx"),
            toy({"layer.0": w, "layer.1": w.copy(), "layer.2": w.copy()}, format="onnx"),
        ],
        good=[
            toy({embed: w}, uses=[(embed, "Gather"), (embed, "Gemm")], format="onnx"),
            toy({embed: w, head: one_bit_off}, format="onnx"),
            toy({embed: w, head: w.T.copy()}, format="onnx"),
            toy({"mask.0": w, "mask.1": w.copy()}, format="onnx", buffers=["mask.0", "mask.1"]),
        ],
        unsure=[toy({embed: w, head: Broken((64, 8))}, format="onnx")],
    )


@rule(
    "TIE201",
    "duplicate-weights",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Equal weights that are stored more than once, in a format that could store them once.

    What it does:
        Reports classes of trained tensors that are equal bit for bit, under the same shape, and stored separately in
        one ONNX file or a bare weight file. A class with a transposed member, or with members in several parts,
        belongs to transposed-copy or copy-across-parts.

    Why it matters:
        An exporter that lost the tie writes one matrix per name: a model with shared layers grows by the number of
        layers, a language model by its largest matrix.

    How it is decided:
        Exactly: canonical bytes, element type and shape; 0.0 is not -0.0, NaN payloads count, integers are exact.
        Tensors filled with one value are constants, not copies. The waste is every stored copy but the first.

    Example:
        wte.weight feeds a Gather, and an equal lm_head.weight feeds a Gemm.

    Fix:
        `--scheme dedup` keeps the first copy and lets every consumer read it. Values do not change.

    Cannot tell when:
        The bytes of a weight cannot be read, while another has the same element type and dimensions.

    Sources:
        pytorch/pytorch#108342, huggingface/transformers#8869 (ALBERT, 7 times its size), onnx/onnx#3278,
        huggingface/optimum#1326.
    """
    model = subject.model
    if can_declare(model):
        return
    for same in duplicates(model, subject.found, lambda weight: weight.parameter is not False):
        if same.kind == "equal":
            n_copies = len(same.copies)
            message = f"{listed(same.ids)} are equal bit for bit, stored {n_copies} times: {size(same.n_bytes)} again"
            fix = rewrite(model, "dedup", [share(same.ids, same.views)])
            yield Finding(same.ids, message, fix, {"copies": n_copies}, same.n_bytes)
    lost = _possible_copies(subject)
    if lost:
        because = f"whether a weight of the same type and dimensions is a copy of {listed(lost)}: no bytes to compare"
        yield CannotTell(because, lost)


def _possible_copies(subject: Subject) -> tuple[str, ...]:
    """Weights without readable bytes of which another one has the element type and, in any order, the dimensions."""
    crowds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for weight in (one for one in subject.model.weights if not one.absent):
        crowds.setdefault((weight.dtype, tuple(sorted(weight.shape))), []).append(weight.id)
    return tuple(subject.unseen(id for crowd in crowds.values() if len(crowd) > 1 for id in crowd))
