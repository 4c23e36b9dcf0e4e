"""Stage: any two models of one signature → Proof. No plan says what was changed, so they are run and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tieaudit import cost, structural
from tieaudit.backward import Across, Summed
from tieaudit.change import Level, Plan, Proof, Written
from tieaudit.end_to_end import Compared, Pair, on_each_device
from tieaudit.end_to_end import compare as run_pair
from tieaudit.levels import Children, label, level_of, training_level
from tieaudit.model import Model, Weight
from tieaudit.printable import counted, listed
from tieaudit.runners import Array, Runner
from tieaudit.running import Opened, Paths, chain_of, opened_whole, parts_of, path_of, runner_for
from tieaudit.sameness import same_value
from tieaudit.sandbox import LIMIT_SECONDS, ChildFailed, Sandbox
from tieaudit.untouched import differences

N_MOST_BYTES_TRAINED = 1 << 30
"""Parameters in float64 of one module, up to which gradients are compared without being asked for: both modules,
their gradients and what the backward pass keeps are several times that."""


def compare(
    before: Model,
    after: Model,
    *,
    device: str = "auto",
    inputs: Mapping[str, Array] | None = None,
    max_drift: float | None = None,
    gradients: bool | None = None,
    seconds: float = LIMIT_SECONDS,
    memory_bytes: int | None = None,
) -> Proof:
    """Compare any two models of one signature: ONNX, folders, live modules, or one of each.

    They are equal if no output differs by more than the noise floor, or by more than `max_drift` where it is given.
    `gradients`: whether two PyTorch models are also compared by what they learn, a fourth level; None: two factories
    of modules that are not too large are. Cost: some twenty runs of each; for gradients a float64 copy of each.
    """
    facts: dict[str, Any] = {
        "n_bytes_stored_before": cost.stored_bytes(before),
        "n_bytes_stored_after": cost.stored_bytes(after),
    }
    levels = [_same_weights(before, after), Level("regional", "not run", "no plan says what was rewritten")]
    found = [runner_for(model) for model in (before, after)]
    runners = [one for one in found if isinstance(one, Runner)]
    reasons = [one for one in found if isinstance(one, str)]
    pairs, left = _pairs(before, after)
    if not reasons and not pairs:
        reasons = [f"no part of one is a part of the other: {', '.join(left)}"]
    if reasons:
        if inputs is None and not runners and levels[0].outcome != "held":
            levels[0] = _same_bytes(before, after)
        levels.append(Level("end to end", "not run", reasons[0]))
        levels += [Level("training", "not run", reasons[0])] if gradients else []
        return Proof(tuple(levels), facts=facts)
    learns, why_not = _gradients_wanted(before, after, gradients)
    runs = _Runs(before, after, inputs, max_drift, learns, facts)
    with Children(seconds, memory_bytes) as child:
        third = runs.level(pairs, runners, device, child)
    if left:
        third = replace(third, because=f"{third.because}; not compared: {', '.join(left)}")
    levels.append(third)
    if learns or gradients or why_not:
        levels.append(_worst(runs.training, why_not or "the outputs were not found equal"))
    return Proof(tuple(levels), (), third.max_difference if max_drift is not None else None, facts)


@dataclass
class _Runs:
    """Both models, part by part and device by device, and what the runs leave behind besides their outcome."""

    before: Model
    after: Model
    inputs: Mapping[str, Array] | None
    max_drift: float | None
    learns: bool
    """Whether gradients are compared as well."""
    facts: dict[str, Any]
    training: list[Level] = field(default_factory=list)

    def level(
        self, pairs: Mapping[str, tuple[Paths, Paths]], runners: Sequence[Runner], device: str, child: Children
    ) -> Level:
        """End to end: the worst of all parts and devices."""

        def boxes(name: str) -> tuple[Sandbox, Sandbox]:
            one, other = (child(runner, name) for runner in runners)
            return one, other

        results = []
        for part, paths in pairs.items():
            run = partial(self._run, paths)
            results += [(part, label, one) for label, one in on_each_device(device, boxes, run)]
        self.facts.update(child.facts())
        return level_of(results)

    def _run(self, paths: tuple[Paths, Paths], one: Sandbox, other: Sandbox) -> Compared:
        pair = Pair(*paths, one, other, self.inputs, strangers=True)
        across = one.runner is not other.runner
        found = _within(run_pair(pair, _n_summed(self.before, across)), self.max_drift)
        self._measure(pair, found)
        if self.learns and found.outcome == "held":
            self.training.append(_trained(pair, found))
        return found

    def _measure(self, pair: Pair, found: Compared) -> None:
        """Latency and memory of both on this device; on the GPU beside what the CPU said."""
        if found.baseline is None or not found.baseline.feeds or found.feed_after is None:
            return
        one = cost.measuring(pair.before, found.baseline.feeds[0], pair.sandbox)
        other = cost.measuring(pair.after, found.feed_after, pair.other)
        facts = cost.alternated(one, other, cost.stored_bytes(self.before) + cost.stored_bytes(self.after))
        if pair.sandbox.device == "cuda":
            self.facts["on_cuda"] = facts
        else:
            self.facts.update(facts)


def _gradients_wanted(before: Model, after: Model, gradients: bool | None) -> tuple[bool, str]:
    """Whether to compare gradients, and why not where that must be said."""
    kinds = {before.format, after.format}
    runner = runner_for(before)
    learns = kinds == {"torch_module"} or kinds == {"huggingface"}
    if gradients is False or (gradients is None and kinds != {"torch_module"}):
        return False, ""
    if not learns or isinstance(runner, str):
        return False, "gradients are compared between two live modules or two folders, run by PyTorch"
    n_bytes = max(8 * sum(w.n_elements for w in model.weights if w.parameter) for model in (before, after))
    if gradients is None and n_bytes > N_MOST_BYTES_TRAINED:
        return False, f"its parameters are {n_bytes / 1e9:.3g} GB in float64; --gradients compares them all the same"
    return True, ""


def _trained(pair: Pair, found: Compared) -> Level:
    """Training parity on the inputs that were run first. Not run where there is no gradient."""
    if found.baseline is None or found.feed_after is None or pair.sandbox is not pair.other:
        return Level("training", "not run", "the two do not run in one process")
    try:
        with opened_whole(pair.sandbox, pair.before) as one, opened_whole(pair.sandbox, pair.after) as other:
            if not isinstance(one, Opened) or not isinstance(other, Opened):
                return Level("training", "not run", "parts that are run as one have no gradients")
            params = {"before": one.handle, "after": other.handle}
            answer, _ = pair.sandbox.ask("gradients", params, found.baseline.feeds[0].arrays)
    except ChildFailed as error:
        return Level("training", "not run", str(error))
    names = ("slots", "reached", "unread")
    rows = tuple(Summed(**{**row, **{key: tuple(row[key]) for key in names}}) for row in answer["summed"])
    where = label(pair.sandbox.device, answer["on"])
    return training_level(Across(rows, tuple(answer["left"]), answer["limit"]), where)


def _worst(levels: list[Level], because: str) -> Level:
    """The level that says most: one that failed, else one that held."""
    for outcome in ("failed", "held", "not run"):
        for level in levels:
            if level.outcome == outcome:
                return level
    return Level("training", "not run", because)


def _within(result: Compared, max_drift: float | None) -> Compared:
    """The verdict under the user's limit instead of the noise floor."""
    if max_drift is None or result.found is None:
        return result
    held = not result.found.problem and result.found.relative <= max_drift
    return Compared(
        "held" if held else "failed", result.because, result.found, max_drift, None, result.baseline, result.spread
    )


def _pairs(before: Model, after: Model) -> tuple[dict[str, tuple[Paths, Paths]], list[str]]:
    """Parts to run against each other, and those without a partner.

    Where one side is a whole and the other an encoder and a decoder, these two are run as one.
    """
    a, b = parts_of(before), parts_of(after)
    if len(a) == 1 or len(b) == 1:
        whole = [
            chain_of(model) if len(parts) > 1 else path_of(model, parts[0])
            for model, parts in ((before, a), (after, b))
        ]
        return {"": (whole[0], whole[1])}, []
    common = [part for part in a if part in b]
    left = [part for part in (*a, *b) if part not in common]
    return {part: (path_of(before, part), path_of(after, part)) for part in common}, left


def _same_weights(before: Model, after: Model) -> Level:
    """Held if both hold the same bytes under the same names; different ones are a matter of drift, not of parity."""
    if before.format != after.format:
        return Level("structural", "not run", f"no plan is known, and one is {before.format}, the other {after.format}")
    if before.by_id.keys() != after.by_id.keys():
        return Level("structural", "not run", "no plan is known, and the two do not hold the same names")
    plan = Plan(before.path, "", (), (), 0, True)
    written = Written(())
    check = structural.check(before, after, plan, written)
    problems = check.problems or differences(before, after, plan, written, check)
    if problems:
        return Level("structural", "not run", f"no plan is known, and the two differ: {problems[0]}")
    return Level("structural", "held", f"{check.n_untouched} weights equal bit for bit, everything else as well")


def _same_bytes(before: Model, after: Model) -> Level:
    """Where nothing can be run, values are all there is to compare: by name, whatever the file they lie in.

    A name that one of them leaves out for an alias is compared as that alias.
    """
    held = [{name: weight for name, weight in _named(model)} for model in (before, after)]
    alone = sorted(held[0].keys() ^ held[1].keys())
    if alone:
        which = "first" if alone[0] in held[0] else "second"
        return Level("structural", "failed", f"{alone[0]} is in the {which} one only ({counted(len(alone), 'name')})")
    apart = [name for name, weight in held[0].items() if not same_value(weight, held[1][name])]
    if apart:
        return Level("structural", "failed", f"{listed(tuple(apart))} differ in value, type or shape")
    return Level("structural", "held", f"{counted(len(held[0]), 'weight')} equal bit for bit; nothing was run")


def _named(model: Model) -> Iterator[tuple[str, Weight]]:
    """Every name with the weight that serves it."""
    by_alias = {id: group for claim in model.declarations for group in (claim.members,) for id in group}
    for weight in model.weights:
        stored = weight
        if weight.absent:
            others = (model.by_id[id] for id in by_alias.get(weight.id, ()) if id in model.by_id)
            stored = next((one for one in others if not one.absent), weight)
        if not stored.absent:
            yield weight.name, stored


def _n_summed(model: Model, across: bool) -> int:
    """The largest inner size of a matrix product in the model, as far as the shapes tell.

    Across runtimes every product has another kernel: their errors add up like those of one longer sum.
    """
    matrices = [min(w.shape) for w in model.weights if len(w.shape) == 2 and w.is_float and min(w.shape) > 1]
    return max(matrices, default=1024) * (len(matrices) + 1 if across else 1)
