"""Equal weights that are stored in several files of one model."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Duplicate, can_declare, duplicates, n_bytes_extra
from tieaudit.model import Model
from tieaudit.printable import counted, listed, size
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Subject


def _examples() -> Examples:
    from tieaudit.toy import ramp, toy

    w, v = ramp(64, 8), ramp(8, 64, seed=3)
    parts = {"encoder.embed": "encoder_model", "decoder.embed": "decoder_model", "head": "decoder_model"}
    parts |= {"x": "encoder_model", "y": "decoder_model"}

    return Examples(
        bad=[
            toy({"encoder.embed": w, "decoder.embed": w.copy()}, format="onnx", parts=parts, path="bart-onnx"),
            toy(
                {"encoder.embed": w, "decoder.embed": w.copy(), "head": w.T.copy()},
                format="onnx",
                parts=parts,
                path="b",
            ),
            toy(
                {"encoder.embed": w, "decoder.embed": w.copy(), "x": v, "y": v.copy()},
                format="onnx",
                parts=parts,
                path="b",
            ),
        ],
        good=[
            toy({"encoder.embed": w, "decoder.embed": ramp(64, 8, seed=1)}, format="onnx", parts=parts),
            toy({"decoder.embed": w, "head": w.copy()}, format="onnx", parts=parts),
        ],
    )


@rule(
    "TIE203",
    "copy-across-parts",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Equal weights that are stored in several files of one model.

    What it does:
        Reports trained tensors that are equal, as stored or transposed, in two or more parts of one export, one
        finding per set of parts.

    Why it matters:
        Exporters write every part on its own: the token embedding comes once in the encoder and once or twice in the
        decoder, and decoder_with_past repeats the whole decoder. No pass that looks at one file can see it.

    How it is decided:
        Exactly: canonical bytes and element type, as stored or transposed. The waste is every stored copy of a class
        but the first, copies inside one part included.

    Example:
        encoder_model.onnx and decoder_model.onnx of a BART both hold the embedding.

    Fix:
        `--scheme dedup` lets the parts read one byte range of one external data file. Values do not change.

    Cannot tell when:
        Never by itself: a weight whose bytes cannot be read is reported by duplicate-weights.

    Sources:
        microsoft/onnxruntime#15365 (Whisper, +40 %), kcosta42/Marian-ONNX-Converter#2, moonshine-ai/moonshine#73.
        Two ONNX files that share one range of external data pass the checker, load and run (reproduced).
    """
    model = subject.model
    if can_declare(model):
        return
    by_parts: dict[tuple[str, ...], list[Duplicate]] = {}
    for same in duplicates(model, subject.found, lambda weight: weight.parameter is not False):
        if same.kind == "across parts":
            by_parts.setdefault(tuple(sorted(same.parts)), []).append(same)
    for parts, group in by_parts.items():
        yield _finding(model, parts, group)


def _finding(model: Model, parts: tuple[str, ...], group: list[Duplicate]) -> Finding:
    n_bytes = n_bytes_extra(model, [same.ids for same in group])
    group = sorted(group, key=lambda same: -same.n_bytes)
    message = f"{listed(group[0].ids)} are one weight, stored {len(group[0].copies)} times in {listed(parts)}"
    if len(group) > 1:
        message = (
            f"{counted(len(group), 'weight')} of {listed(parts)} are stored in each, {listed(group[0].ids)} the largest"
        )
    message += f": {size(n_bytes)} again"
    ids = tuple(id for same in group for id in same.ids)
    evidence = {"parts": list(parts), "classes": [list(same.ids) for same in group]}
    fix = rewrite(model, "dedup", [share(same.ids, same.views) for same in group])
    return Finding(ids, message, fix, evidence, n_bytes)
