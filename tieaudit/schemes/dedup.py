"""Every lossless tie that the target can hold: equal and transposed copies become one stored tensor."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import of_buffers
from tieaudit.folding import folded_apart
from tieaudit.model import Member, Model
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject

MIN_CONSTANT_BYTES = 1024
"""Equal constants, masks and shapes below this size are left alone: merging a thousand of them helps nobody."""


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    model = subject.model
    for tie in subject.found.ties:
        worth_it = tie.n_bytes_saved >= MIN_CONSTANT_BYTES or not of_buffers(model, tie)
        if tie.origin == "measured" and worth_it:
            yield Candidate("dedup", tie.members, tie.n_bytes_saved, True, tie.because)
        elif tie.origin == "aliased" and _loses_names(model) and _twice_in_a_part(model, tie.ids):
            because = f"{tie.because}: one name survives a plain load and save, several come back as copies"
            yield Candidate("dedup", tie.members, 0, True, because)
    declared = {id: index for index, claim in enumerate(model.declarations) if claim.active for id in claim.members}
    for ids in subject.found.constant_classes:
        yield from _constants(subject, ids, declared)
    measured = [tie.ids for tie in subject.found.ties if tie.origin == "measured"]
    for id, uses in folded_apart(model, measured).items():
        because = f"{len(uses)} of its uses go through a Transpose that a runtime folds into a second copy"
        yield Candidate("dedup", (Member(id),), 0, True, because, action="respell")


def _loses_names(model: Model) -> bool:
    """Whether names are the graph's own business: in an exported program they are parameters, which may be trained."""
    return model.has_graph and model.format != "torch_export"


def _twice_in_a_part(model: Model, ids: tuple[str, ...]) -> bool:
    """Whether one file has several names for one range; files that share a range are as good as files can be."""
    parts = [model.by_id[id].part for id in ids]
    return len(set(parts)) < len(parts)


def _constants(subject: Subject, ids: tuple[str, ...], declared: dict[str, int]) -> Iterator[Candidate]:
    """Equal constants are no tie, but one copy is enough: where a class ties them, or where a graph's are large."""
    model = subject.model
    groups: dict[int, list[str]] = {}
    for id in ids:
        if _loses_names(model) or id in declared:
            groups.setdefault(declared.get(id, -1), []).append(id)
    for group in groups.values():
        saved = sum(model.by_id[id].n_bytes for id in group[1:])
        if len(group) > 1 and (not model.has_graph or saved >= MIN_CONSTANT_BYTES):
            yield Candidate("dedup", tuple(Member(id) for id in group), saved, True, f"{len(group)} equal constants")


dedup = Scheme(
    name="dedup",
    listed_by_scan=False,
    summary="every lossless tie that the target can hold becomes one stored tensor",
    source="onnx-ir DeduplicateHashedInitializersPass sees equal bytes of one graph; here also transposes, subgraphs, "
    "parts and what the declaring class restores",
    propose=_propose,
    page="""dedup: keep one stored copy of everything that is bit for bit the same.

Takes every measured tie (equal or transposed, never constants that merely look alike) and stores it once. In ONNX the
consumers of a transposed copy are rewritten so that no runtime folds the copy back; in a Hugging Face folder a name is
dropped only if the class restores it. A tie that already is one tensor, but is expressed as Transpose(W), is
re-expressed so that it stays one. Values never change.""",
)
