"""Several initializers on one byte range of external data: a tie that a plain load and save doubles."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Model, Weight
from tieaudit.printable import listed, printable, size
from tieaudit.regions import overlapping
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.storage import FileStorage, Region
from tieaudit.verdict import CannotTell, Finding, Subject


def _examples() -> Examples:
    from tieaudit.toy import At, ramp, toy

    w = ramp(64, 8)
    parts = {"encoder.embed": "encoder_model", "decoder.embed": "decoder_model"}

    return Examples(
        bad=[toy({"wte.weight": At(w, 0), "lm_head.weight": At(w, 0)}, format="onnx")],
        good=[
            toy({"wte.weight": At(w, 0)}, format="onnx"),
            toy({"wte.weight": At(w, 0), "lm_head.weight": At(ramp(64, 8, seed=1), 2048)}, format="onnx"),
            toy({"encoder.embed": At(w, 0), "decoder.embed": At(w, 0)}, format="onnx", parts=parts),
        ],
        unsure=[toy({"whole": At(w, 0), "rows 16 to 31": At(w[16:32], 512)}, format="onnx")],
    )


@rule(
    "TIE204",
    "shared-external-bytes",
    severity="warning",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """Several initializers on one byte range of external data: a tie that a plain load and save doubles.

    What it does:
        Reports initializers of one ONNX file that name the same (file, offset, length).

    Why it matters:
        The tie is real on disk and for whoever maps the file, but nothing in the graph says so. `onnx.load` followed
        by `onnx.save` writes the range once per name, and so does onnx-ir; runtimes allocate it once per name.

    How it is decided:
        By byte ranges; nothing is compared. Two parts that share a range are the best that several files can do and
        are not reported.

    Example:
        wte.weight and lm_head.weight both point at model.onnx.data, offset 0.

    Fix:
        `--scheme dedup` lets the consumers of all names read one initializer, which every tool keeps. Until then copy
        the file together with its data, and do not load and save it.

    Cannot tell when:
        Two ranges overlap without being the same: a deliberate slice, or a writer's mistake.

    Sources:
        onnx 1.23 and onnx-ir 1.1: 4 MiB became 8 MiB (reproduced).
    """
    model = subject.model
    if model.format != "onnx":
        return
    external = [weight for weight in model.weights if isinstance(weight.storage, FileStorage)]
    for group in overlapping([_region(weight) for weight in external]):
        ranges: dict[Region, list[Weight]] = {}
        for index in group:
            ranges.setdefault(_region(external[index]), []).append(external[index])
        for weights in ranges.values():
            yield from _shared(model, weights)
        if len(ranges) > 1:
            ids = tuple(weights[0].id for weights in ranges.values())
            yield CannotTell(f"whether the overlap of {listed(ids)} in the external data is meant", ids)


def _region(weight: Weight) -> Region:
    if weight.storage is None:
        raise ValueError(f"{weight.id} is absent: it has no region")
    return weight.storage.region


def _shared(model: Model, weights: list[Weight]) -> Iterator[Finding]:
    by_part: dict[str, list[Weight]] = {}
    for weight in weights:
        by_part.setdefault(weight.part, []).append(weight)
    for same in by_part.values():
        if len(same) < 2:
            continue
        ids = tuple(weight.id for weight in same)
        file, begin, end = _region(same[0])
        again = same[0].n_bytes * (len(same) - 1)
        message = (
            f"{listed(ids)} are {len(same)} initializers on bytes {begin:,} to {end:,} of {printable(file)}: "
            f"a plain onnx.load and onnx.save writes {size(again)} more"
        )
        fix = rewrite(model, "dedup", [share(ids)])
        yield Finding(ids, message, fix, {"file": file, "begin": begin, "end": end}, again)
