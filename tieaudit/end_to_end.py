"""The end-to-end proof: both models on the same inputs, against the noise floor of the original, with controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from tieaudit import matching
from tieaudit.controls import Baseline
from tieaudit.drift import Drift
from tieaudit.drift import drift as drift_of
from tieaudit.floor import Difference, difference, limit_of, rounding_bound, says_something, unstable_elements
from tieaudit.formats.onnx.limits import id_limits
from tieaudit.inputs import Feed, Sizes, corrected, made_up, stored_beside
from tieaudit.printable import counted
from tieaudit.runners import Array, Signature
from tieaudit.running import VARIATIONS, Chained, Opened, Paths, opened_whole
from tieaudit.sandbox import ChildFailed, Sandbox

N_FEEDS = 3
_N_CORRECTIONS = 4
_SECONDS_FOR_FEEDS = 20.0
"""A slow model gets fewer inputs, but at least one."""
_SECONDS_FOR_SETTINGS = 120.0
"""A slow model is perturbed in fewer ways, but at least in one."""
_LARGEST_SPREAD = 0.1
"""A model that differs from itself by more is random, and agreeing with it proves nothing."""


@dataclass(frozen=True)
class Pair:
    """Two things to run and compare."""

    before: Paths
    """What is compared against."""
    after: Paths
    sandbox: Sandbox
    """Runs `before`."""
    other: Sandbox
    """Runs `after`; the same one if the runtime is the same."""
    given: Mapping[str, Array] | None = None
    """The user's inputs."""
    original: str | None = None
    """For a lossy plan: the original, from which drift is measured; `before` is then the reference."""
    rounded: str = ""
    """Element type of tables that `before` holds rounded and `after` computes as it goes; empty for none."""
    strangers: bool = False
    """Two models that the user named: that they take the same inputs is to be found out, not known."""


@dataclass(frozen=True)
class Compared:
    """What came of one pair on one device."""

    outcome: str
    """held, failed or not run."""
    because: str
    found: Difference | None = None
    limit: float = 0.0
    drift: float | None = None
    baseline: Baseline | None = None
    spread: float = 0.0
    feed_after: Feed | None = None
    """What the second model got for the first of the inputs."""
    moved: Drift | None = None
    """Of a lossy plan: how far all outputs moved, and what that means for predictions."""


def compare(pair: Pair, n_summed: int) -> Compared:
    """Run both and compare. Never raises for what a runtime does.

    `n_summed`: the largest number of products in one sum, for the rounding bound.
    """
    try:
        with opened_whole(pair.sandbox, pair.before) as before:
            signature = with_limits(before.signature, pair.before)
            if pair.strangers:
                common = _common(signature, pair)
                if isinstance(common, str):
                    return Compared("not run", common)
                signature = common
            feeds, complaint = _feeds(before, signature, pair)
            if not feeds:
                return Compared("not run", f"the original does not run either: {complaint}")
    except ChildFailed as error:
        return Compared("not run", f"the original does not load or run either: {error}")
    if not any(says_something(result) for _, result in feeds):
        return Compared("not run", "the original gives only NaN, constants or nothing: agreeing with it proves nothing")
    spread, unstable = _spread(pair, feeds)
    if spread > _LARGEST_SPREAD:
        said = f"the original differs from itself by {spread:.3g} under settings that may not matter: is it random?"
        return Compared("not run", said, spread=spread)
    try:
        with opened_whole(pair.other, pair.after) as after:
            return _against(pair, after, signature, feeds, spread, unstable, n_summed)
    except ChildFailed as error:
        known = _baseline(pair, feeds, spread, n_summed)
        return Compared("failed", f"the original runs, the result does not: {error}", baseline=known)


def _common(signature: Signature, pair: Pair) -> Signature | str:
    """The first model's signature with what the second one fixes, or why there is none."""
    try:
        with opened_whole(pair.other, pair.after) as after:
            if not signature.inputs:  # the first one does not say what it takes
                return after.signature
            return matching.narrowed(signature, after.signature)
    except ChildFailed as error:
        return f"the second model does not load: {error}"


Ran = tuple[Feed, Mapping[str, Array]]


def with_limits(signature: Signature, path: Paths) -> Signature:
    """The ports with the number of valid ids, where an ONNX file tells it."""
    limits: dict[str, int] = {}
    for file in (path,) if isinstance(path, str) else path:
        if Path(file).is_file() and not file.endswith(".pt2"):
            for name, limit in id_limits(Path(file)).items():
                limits[name] = min(limit, limits.get(name, limit))
    if limits and not isinstance(path, str):
        limits.setdefault("decoder_input_ids", limits.get("input_ids", 1))
    ports = tuple(replace(port, limit=limits.get(port.name, port.limit)) for port in signature.inputs)
    return replace(signature, inputs=ports)


def _feeds(model: Opened | Chained, signature: Signature, pair: Pair) -> tuple[list[Ran], str]:
    """Inputs that the original accepts, with what it gave; and its last complaint."""
    if pair.given is not None:
        given = _by_name(pair.given, signature)
        missing = [port.name for port in signature.inputs if port.name not in given]
        if missing:
            return [], f"--inputs lacks {', '.join(missing)}"
        feed = Feed(given, "the given inputs")
        return _first_runs(model, signature, iter([feed]))
    if isinstance(model, Opened) and not signature.inputs and (reason := model.facts.get("no_inputs")):
        return [], str(reason)
    home = pair.original or pair.before
    stored = stored_beside(Path(home), signature) if isinstance(home, str) and Path(home).is_file() else []
    if stored:
        feeds, complaint = _first_runs(model, signature, iter(stored))
        if feeds:
            return feeds, complaint
    if any(not port.dtype for port in signature.inputs):
        names = [port.name for port in signature.inputs if not port.dtype]
        return [], f"the input {names[0]} is no tensor; give --inputs"
    offers = (feed for sizes, feed in made_up(signature) if _fits(sizes, signature, pair))
    own = [Feed(model.sample, "its own sample inputs")] if isinstance(model, Opened) and model.sample else []
    return _first_runs(model, signature, chain(own, offers))


def _by_name(given: Mapping[str, Array], signature: Signature) -> Mapping[str, Array]:
    """Arrays that `numpy.savez` numbered (arr_0, arr_1 …) are the inputs in their order."""
    numbered = [f"arr_{index}" for index in range(len(signature.inputs))]
    if set(given) != set(numbered):
        return given
    return {port.name: given[name] for port, name in zip(signature.inputs, numbered, strict=True)}


def _fits(sizes: Sizes, signature: Signature, pair: Pair) -> bool:
    """Across runtimes a cache cannot be handed over, so it must be empty."""
    across = pair.sandbox.runner is not pair.other.runner
    return not across or sizes.past == 0 or not any("past" in port.name for port in signature.inputs)


def _first_runs(model: Opened | Chained, signature: Signature, offers: Iterator[Feed]) -> tuple[list[Ran], str]:
    began = time.perf_counter()
    found: list[Ran] = []
    complaint = "no inputs could be made up"
    for offer in offers:
        known = signature
        for _ in range(_N_CORRECTIONS):
            try:
                found.append((offer, model.run(offer.arrays)))
                break
            except ChildFailed as error:
                complaint = str(error)
                if error.kind in ("crashed", "timed out"):
                    return found, complaint
                learned = corrected(known, offer, complaint)
                if learned is None or "made up" not in offer.source:
                    break
                known = learned
                offer = next((feed for _, feed in made_up(known) if feed.source == offer.source), offer)
        if len(found) == N_FEEDS or found and time.perf_counter() - began > _SECONDS_FOR_FEEDS:
            break
    return found, complaint


def _spread(pair: Pair, feeds: Sequence[Ran]) -> tuple[float, list[dict[str, Array]]]:
    """The largest difference of the original from itself, and per feed the integers it does not reproduce."""
    worst, began = 0.0, time.perf_counter()
    variants: list[list[Mapping[str, Array]]] = [[] for _ in feeds]
    for setting in VARIATIONS.get(pair.sandbox.runner.name, ()):
        if variants[0] and time.perf_counter() - began > _SECONDS_FOR_SETTINGS:
            break
        try:
            with opened_whole(pair.sandbox, pair.before, setting) as model:
                for index, (feed, usual) in enumerate(feeds):
                    result = model.run(feed.arrays)
                    variants[index].append(result)
                    floats = matching.outputs(usual, result)
                    found = difference(floats.before, floats.after)
                    worst = max(worst, 0.0 if found.problem else found.relative)
        except ChildFailed:
            continue  # a setting that the original does not survive says nothing about noise
    return worst, [unstable_elements(usual, variants[index]) for index, (_, usual) in enumerate(feeds)]


def _baseline(pair: Pair, feeds: Sequence[Ran], spread: float, n_summed: int) -> Baseline:
    limits = [limit_of(spread, rounding_bound(result, n_summed, pair.rounded)) for _, result in feeds]
    return Baseline([feed for feed, _ in feeds], [result for _, result in feeds], limits)


def _against(
    pair: Pair, after: Opened | Chained, signature: Signature, feeds: Sequence[Ran], spread: float,
    unstable: Sequence[Mapping[str, Array]], n_summed: int,
) -> Compared:  # fmt: skip
    baseline = _baseline(pair, feeds, spread, n_summed)
    worst, worst_limit, alone = Difference(0.0, 0.0, ""), min(baseline.limits), ()
    results: list[Mapping[str, Array]] = []
    first: Feed | None = None
    for (feed, usual), limit, mask in zip(feeds, baseline.limits, unstable, strict=True):
        own = matching.feed_for(feed, signature, after.signature)
        if isinstance(own, str):
            return Compared("not run", own, baseline=baseline, spread=spread)
        first = first or own
        results.append(after.run(own.arrays))
        matched = matching.outputs(usual, results[-1])
        if not matched.before:
            names = f"{', '.join(usual)}; {', '.join(results[-1])}"
            return Compared("not run", f"no output of one is an output of the other: {names}", baseline=baseline)
        alone = alone or tuple(matched.alone)  # type: ignore[assignment]
        found = difference(matched.before, matched.after, mask)
        if found.problem or found.relative / max(limit, 1e-300) > worst.relative / max(worst_limit, 1e-300):
            worst, worst_limit = found, limit
        if found.problem:
            break
    said = _said(feeds, alone, worst)
    outcome = "failed" if worst.problem or worst.relative > worst_limit else "held"
    if outcome == "failed":
        apart = f"{worst.where} differs by {worst.absolute:.3g}, {worst.relative:.3g} of its size"
        said = f"{worst.problem or apart}; {said}"
    drift, moved = _drift(pair, feeds, results, signature) if outcome == "held" else (None, None)
    return Compared(outcome, said, worst, worst_limit, drift, baseline, spread, first, moved)


def _said(feeds: Sequence[Ran], alone: Sequence[str], worst: Difference) -> str:
    sources = ", ".join(dict.fromkeys(feed.source.split(":")[0] for feed, _ in feeds))
    count = len(feeds[0][1]) - sum(name in feeds[0][1] for name in alone)
    said = f"{counted(len(feeds), 'input')} ({sources}), {counted(count, 'output')}"
    if worst.equal:
        said += ", equal bit for bit"
    return said + (f"; without a partner: {', '.join(alone[:3])}" if alone else "")


def _drift(
    pair: Pair, feeds: Sequence[Ran], results: Sequence[Mapping[str, Array]], signature: Signature
) -> tuple[float | None, Drift | None]:
    """The largest difference of the result from the original, where that is not what it was compared against."""
    if pair.original is None:
        return None, None
    worst = 0.0
    vocabularies = {port.limit for port in signature.inputs if port.limit is not None}
    before: list[Array] = []
    after: list[Array] = []
    scores: list[bool] = []
    with opened_whole(pair.sandbox, pair.original) as original:
        for (feed, _), result in zip(feeds, results, strict=True):
            matched = matching.outputs(original.run(feed.arrays), result)
            floats = [name for name, array in matched.before.items() if array.dtype.kind not in "iub"]
            one, other = ({name: held[name] for name in floats} for held in (matched.before, matched.after))
            worst = max(worst, difference(one, other).relative)
            for name in floats:
                if one[name].shape == other[name].shape and one[name].dtype.kind != "c":
                    before.append(one[name])
                    after.append(other[name])
                    scores.append("logits" in name or bool(one[name].ndim) and one[name].shape[-1] in vocabularies)
    return worst, drift_of(before, after, scores)


def on_each_device(
    device: str, sandboxes: Callable[[str], tuple[Sandbox, Sandbox]], run: Callable[[Sandbox, Sandbox], Compared]
) -> list[tuple[str, Compared]]:
    """`run` on the CPU and, where there is one, the GPU (auto), or only where asked; (device name, outcome) each."""
    found: list[tuple[str, Compared]] = []
    first = sandboxes("cpu" if device == "auto" else device)
    try:
        known = [box.ask("hello")[0]["devices"] for box in dict.fromkeys(first)]
    except ChildFailed as error:
        return [(device, Compared("not run", str(error)))]
    for name in ("cpu", "cuda") if device == "auto" else (device,):
        if all(name in devices for devices in known):
            label = "CPU" if name == "cpu" else f"CUDA ({known[0][name]})"
            found.append((label, run(*(first if first[0].device == name else sandboxes(name)))))
        elif name == device:
            found.append((name, Compared("not run", f"{first[0].runner.title} has no {name} device here")))
    return found
