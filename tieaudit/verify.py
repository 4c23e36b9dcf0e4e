"""Stage: two models → Proof. Whether a rewrite did what its plan says (parity), and what the plan changed (drift).

Three levels, each held, failed, or not run because …: *structural* (bytes, views, nodes; runs nothing), *regional*
(what was rewritten, alone), *end to end* (both models on the same inputs). Models run in child processes with limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tieaudit import controls, cost, pooling, regional, structural
from tieaudit.change import Equalise, Level, Plan, Pool, Proof, SetConfig, Share, Written
from tieaudit.end_to_end import Compared, Pair, on_each_device
from tieaudit.end_to_end import compare as run_pair
from tieaudit.levels import Children, level_of
from tieaudit.model import Model, Use
from tieaudit.overlay import CannotChange, Overlay
from tieaudit.runners import Array, Runner
from tieaudit.running import opened, parts_of, path_of, runner_for
from tieaudit.sandbox import LIMIT_SECONDS, Sandbox
from tieaudit.strangers import compare
from tieaudit.untouched import differences

__all__ = ["LEVELS", "compare", "prove"]

LEVELS: tuple[Literal["structural", "regional", "end to end"], ...] = ("structural", "regional", "end to end")
"""From the least to the most."""


@dataclass
class _Gathered:
    """What the end-to-end level leaves behind besides its outcome."""

    silent: list[str] = field(default_factory=list)
    drift: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def prove(
    before: Model,
    after: Model,
    plan: Plan,
    written: Written,
    *,
    device: str = "auto",
    inputs: Mapping[str, Array] | None = None,
    max_drift: float | None = None,
    seconds: float = LIMIT_SECONDS,
    memory_bytes: int | None = None,
    reached: Callable[[Level], None] = lambda level: None,
) -> Proof:
    """Prove that `after`, read back from what was written, is `before` changed by `plan` and nothing else.

    Runs every level that can run; only a failed structural level stops the others. `apply` decides what is enough.
    `seconds` limits one request to a child, `memory_bytes` the child's private memory on the CPU; `reached` hears of
    the first two levels as soon as they are decided.
    Cost: reads both models in full; runs the original about six times per input and the result once or twice.
    """
    check = structural.check(before, after, plan, written)
    problems = check.problems or differences(before, after, plan, written, check)
    if problems:
        blocked = "the structural proof failed"
        level = Level("structural", "failed", "; ".join(problems[:4]))
        return Proof((level, Level("regional", "not run", blocked), Level("end to end", "not run", blocked)))
    first = Level("structural", "held", _what_held(before, check))
    reached(first)
    facts: dict[str, Any] = {
        "n_bytes_stored_before": cost.stored_bytes(before),
        "n_bytes_stored_after": cost.stored_bytes(after),
    }
    runner = runner_for(before)
    if isinstance(runner, str):
        return Proof((first, Level("regional", "not run", runner), Level("end to end", "not run", runner)), facts=facts)
    gathered = _Gathered(facts=facts)
    with Children(seconds, memory_bytes) as child:
        try:
            with nullcontext(None) if plan.lossless else _reference(before, plan) as reference:
                work = _Work(before, after, plan, written, check, reference, runner, child, device, inputs)
                second = _regional(work)
                reached(second)
                third = _proved_by_running(work, gathered)
        except CannotChange as error:
            said = f"the reference of a lossy plan cannot be made: {error}"
            second, third = Level("regional", "not run", said), Level("end to end", "not run", said)
    if (
        third.outcome == "failed"
        and second.outcome == "held"
        and third.max_difference is not None
        and _only_settings(plan)
    ):
        said = "the bytes are the same, but the setting changes what this loader makes of them: drift, not parity"
        gathered.drift, third = third.max_difference, replace(third, outcome="held", because=said)
    if gathered.drift is not None and max_drift is not None and gathered.drift > max_drift and third.outcome == "held":
        said = f"drift {gathered.drift:.3g} against the original is more than the limit {max_drift:g}"
        third = Level("end to end", "failed", said, gathered.drift, max_drift, third.device)
    return Proof((first, second, third), tuple(gathered.silent), gathered.drift, gathered.facts)


def _only_settings(plan: Plan) -> bool:
    return bool(plan.edits) and all(isinstance(edit, SetConfig) for edit in plan.edits)


def _what_held(before: Model, check: structural.Check) -> str:
    said = f"{check.n_untouched} other weights unchanged, {len(check.served)} planned ones as planned"
    return f"{said}, {check.n_uses} uses read the planned bytes" if before.has_graph else said


@dataclass(frozen=True)
class _Work:
    """What the levels that run something share."""

    before: Model
    after: Model
    plan: Plan
    written: Written
    check: structural.Check
    reference: Overlay | None
    """For a lossy plan: the original with the planned values in its untied slots."""
    runner: Runner
    child: Children
    device: str
    inputs: Mapping[str, Array] | None

    @property
    def against(self) -> Model:
        """What the result is compared with: the reference of a lossy plan, else the original."""
        return self.before if self.reference is None else self.reference.as_model()

    @property
    def n_summed(self) -> int:
        """The largest number of products in one sum among the touched uses."""
        touched = structural.touched_ids(self.plan)
        seen = [
            (use.slot, use.view.shape(self.before.by_id[use.weight].shape))
            for use in self.before.uses
            if use.weight in touched
        ]
        inner = [shape[0] if slot == 1 else shape[1] for slot, shape in seen if len(shape) == 2]
        shapes = [self.before.by_id[id].shape for id in touched]
        return max(inner or [min(shape) for shape in shapes if shape], default=1)

    @property
    def rounded(self) -> str:
        """Element type of the tables that the reference holds rounded, and the result computes as it goes."""
        shares = [edit for edit in self.plan.edits if isinstance(edit, Share)]
        return next((one.dtype for edit in shares for one in edit.adjustments.values()), "")


def _regional(work: _Work) -> Level:
    if work.before.format == "onnx":
        return regional.of_onnx(work.against, work.after, work.written, work.child(work.runner, "cpu"))
    return regional.of_folder(work.before, work.after, work.plan, work.child(work.runner, "cpu"))


def _proved_by_running(work: _Work, gathered: _Gathered) -> Level:
    """The end-to-end level, the controls and the facts."""
    results: list[tuple[str, str, Compared]] = []
    for part in parts_of(work.before):
        path, against = path_of(work.before, part), path_of(work.before, part)
        if work.reference is not None:
            against = str(work.reference.file(path) if Path(path).is_file() else work.reference.path)

        def run(one: Sandbox, other: Sandbox, part: str = part, path: str = path, against: str = against) -> Compared:
            original = None if work.reference is None else path
            paths = (against, path_of(work.after, part))
            return run_pair(Pair(*paths, one, other, work.inputs, original, work.rounded), work.n_summed)

        def boxes(name: str) -> tuple[Sandbox, Sandbox]:
            return work.child(work.runner, name), work.child(work.runner, name)

        results += [(part, label, result) for label, result in on_each_device(work.device, boxes, run)]
    drifts = [result.drift for _, _, result in results if result.drift is not None]
    gathered.drift = max(drifts) if drifts else None
    moved = [result.moved for _, _, result in results if result.moved is not None]
    if moved:
        most = max(moved, key=lambda one: (one.kl_mean, one.max_abs))
        gathered.facts["moved"] = {**asdict(most), "yardstick": most.yardstick}
    _control(work, results, gathered)
    gathered.facts.update(work.child.facts())
    gathered.facts["spread_of_the_original"] = max((result.spread for _, _, result in results), default=0.0)
    return level_of(results)


@contextmanager
def _reference(before: Model, plan: Plan) -> Iterator[Overlay]:
    """The original with the planned values in its untied slots. CannotChange."""
    with Overlay(before) as overlay:
        for edit in plan.edits:
            if isinstance(edit, Pool):
                for weight, seen in pooling.planned_values(before, edit):
                    overlay.change(weight, _setter(seen))
            if not isinstance(edit, (Share, Equalise)):
                continue
            if structural.planned_value(before, edit) is None:
                raise CannotChange(f"{edit.members[0].id} stores nothing")
            for weight, seen in structural.planned_values(before, edit):
                overlay.change(weight, _setter(seen))
        yield overlay


def _setter(values: Array) -> Callable[[Array], None]:
    def put(array: Array) -> None:
        array[...] = values

    return put


def _control(work: _Work, results: Sequence[tuple[str, str, Compared]], gathered: _Gathered) -> None:
    """Perturb every touched use in what was compared against, on the CPU, and measure what both models cost there."""
    before, after, box = work.against, work.after, work.child(work.runner, "cpu")
    touched = structural.touched_ids(work.plan)
    for part in parts_of(before):
        ran = next((r for p, label, r in results if p == part and label == "CPU" and r.outcome == "held"), None)
        uses = _read([use for use in before.uses if use.weight in touched and use.part == part])
        if ran is None or ran.baseline is None:
            gathered.silent.extend(f"{controls.label(use)} (did not run on the CPU)" for use in uses)
            continue
        if before.format == "onnx":
            gathered.silent.extend(controls.of_onnx(before, part, uses, ran.baseline, box))
        else:
            gathered.silent.extend(_control_folder(before, work.plan, ran, box))
        served = sorted({one.id for one in work.check.served.values() if after.by_id[one.id].part == part})
        facts = cost.of_part(work.before, after, part, served, ran.baseline.feeds[0], box)
        gathered.facts.update(facts if not part else {f"{key} ({part})": value for key, value in facts.items()})
    _cost_on_gpu(work, results, gathered)


def _cost_on_gpu(work: _Work, results: Sequence[tuple[str, str, Compared]], gathered: _Gathered) -> None:
    """Latency and device memory of both models where the proof ran on a GPU as well; of the first part that did."""
    for part, label, ran in results:
        if label.startswith("CUDA") and ran.outcome == "held" and ran.baseline is not None:
            box, feed = work.child(work.runner, "cuda"), ran.baseline.feeds[0]
            sides = [cost.measuring(path_of(model, part), feed, box) for model in (work.before, work.after)]
            n_bytes = cost.stored_bytes(work.before) + cost.stored_bytes(work.after)
            gathered.facts["on_cuda"] = cost.alternated(sides[0], sides[1], n_bytes)
            return


def _read(uses: Sequence[Use]) -> list[Use]:
    """Uses whose values matter: not by Shape, and not as a graph's own output."""
    return [use for use in uses if use.op not in ("Shape", "Size") and not use.node.startswith("@")]


def _control_folder(before: Model, plan: Plan, ran: Compared, sandbox: Sandbox) -> list[str]:
    if ran.baseline is None:
        return []
    hints = before.hints
    usual = "" if "token_embedding" in hints.values() else "embedding"  # a class that said nothing
    names = [
        (id, before.by_id[id].name, "embedding" in hints.get(id, usual) and "head" not in id)
        for id in sorted(structural.touched_ids(plan))
        if not before.by_id[id].absent and before.by_id[id].is_float
    ]
    with opened(sandbox, path_of(before, "")) as model:
        return controls.of_folder(model, names, ran.baseline, sandbox)
