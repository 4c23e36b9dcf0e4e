"""Whichever policy without further parameters is predicted to cost least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.merges import Merge, Merged, Sites
from tieaudit.registry import discover

_KEPT = ("head", "embedding", "first", "last")


def _tried(sites: Sites) -> Iterator[tuple[str, Merged]]:
    """What every policy makes of these sites, as far as it can and corrects nothing."""
    for policy in discover("merges", Merge).values():
        if policy.name == "auto" or policy.corrects:
            continue
        for argument in _KEPT if policy.name == "keep" else ("",):
            try:
                merged = policy.merge(sites, argument)
            except (RewriteRefused, UsageError):
                continue  # what these sites or this calibration cannot give, or what needs an argument
            if not merged.corrections:
                yield f"{policy.name}:{argument}" if argument else policy.name, merged


def _merge(sites: Sites, argument: str) -> Merged:
    tried = list(_tried(sites))
    if not tried:
        raise RewriteRefused(f"--merge auto: no policy can merge {', '.join(sites.ids)}")
    cost, measure = _cost_of(sites, [merged for _, merged in tried])
    found = dict(tried)
    costs = {name: cost(merged) for name, merged in tried}
    costs = {name: one if math.isfinite(one) else math.inf for name, one in costs.items()}
    rule = _by_rule(measure, found)
    name = rule[0] if rule is not None else min(costs, key=lambda one: costs[one])
    why = rule[1] if rule is not None else f"{name} is best"
    others = ", ".join(f"{one} {costs[one]:.3g}" for one in sorted(costs, key=lambda one: costs[one]))
    chosen = found[name]
    return Merged(chosen.rows, chosen.keeps, chosen.corrections, f"{why} ({measure}: {others})")


_NATS = "nats per token predicted"
_ERROR = "of what the worst site gives is changed"
_CHANGE = "of the worst site is changed"


def _cost_of(sites: Sites, all_: list[Merged]) -> tuple[Callable[[Merged], float], str]:
    """By what policies are compared: the best measure that there is for every one of them."""
    if any(one is not None for one in sites.statistics):
        if all(sites.predicted_nats(merged) is not None for merged in all_):
            return lambda merged: sites.predicted_nats(merged) or 0.0, _NATS
        if all(None not in sites.weighted_errors(merged) for merged in all_):
            return lambda merged: max(one or 0.0 for one in sites.weighted_errors(merged)), _ERROR
    return lambda merged: max(sites.relative_change(merged)), _CHANGE


def _by_rule(measure: str, found: Mapping[str, Merged]) -> tuple[str, str] | None:
    """What measurements of language models favour where the loss cannot be predicted (docs/merging.md): no error of an
    embedding and none of a head says which of the two the model needs."""
    if measure != _NATS and "gauss-newton" in found:
        return "gauss-newton", "without gradients gauss-newton is taken, from forward passes alone"
    if measure != _NATS and "keep:head" in found:
        return "keep:head", "without calibration the head is kept"
    return None


auto = Merge(
    name="auto",
    summary="whichever policy without further parameters is predicted to cost least",
    source="the prediction of gauss-newton, on tokens that the policies were not fitted to",
    merge=_merge,
    page="""auto: tries what the available data allows, and says what it chose and what the others would cost

With calibration by predicted nats per token, on held-out tokens. Where the runtime computes no gradients (ONNX):
gauss-newton from forward passes alone for an embedding and its head; for other classes the policy that changes least of
what the worst site gives. Without calibration the head's values are kept for an embedding and its head, and for other
classes the policy is chosen that changes the worst site least.""",
)
