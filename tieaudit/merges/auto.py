"""Whichever policy without further parameters is predicted to cost least."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.merges import Merge, Merged, Sites
from tieaudit.registry import discover

_KEPT = ("head", "embedding", "first", "last")


def _tried(sites: Sites) -> Iterator[tuple[str, Merged]]:
    """What every policy makes of these sites, as far as it can and corrects nothing."""
    for policy in discover("merges", Merge).values():
        if policy.name == "auto":
            continue
        for argument in _KEPT if policy.name == "keep" else ("",):
            try:
                merged = policy.merge(sites, argument)
            except (RewriteRefused, UsageError):
                continue  # what these sites or this calibration cannot give, or what needs an argument
            if not merged.corrections:
                yield f"{policy.name}:{argument}" if argument else policy.name, merged


def _merge(sites: Sites, argument: str) -> Merged:
    tried: list[tuple[float, str, Merged]] = []
    measure = "nats per token predicted" if any(one is not None for one in sites.statistics) else ""
    for name, merged in _tried(sites):
        cost = sites.predicted_nats(merged)
        if cost is None:  # without data: what the worst site loses of what it held
            cost, measure = max(sites.relative_change(merged)), "of the worst site is changed"
        tried.append((cost, name, merged))
    if not tried:
        raise RewriteRefused(f"--merge auto: no policy can merge {', '.join(sites.ids)}")
    usual = next((one for one in tried if one[1] == "keep:head"), None)
    # without data no distance tells which side the model needs; the head is the better survivor of an embedding's tie
    by_rule = measure == "of the worst site is changed" and usual is not None
    chosen = usual if by_rule and usual is not None else min(tried, key=lambda one: one[0])
    others = ", ".join(f"{name} {cost:.3g}" for cost, name, _ in sorted(tried, key=lambda one: one[0]))
    why = "without calibration the head is kept" if by_rule else f"{chosen[1]} is best"
    because = f"{why} ({measure}: {others})"
    return Merged(chosen[2].rows, chosen[2].keeps, chosen[2].corrections, because)


auto = Merge(
    name="auto",
    summary="whichever policy without further parameters is predicted to cost least",
    source="the prediction of gauss-newton, on tokens that the policies were not fitted to",
    merge=_merge,
    page="""auto: tries what the available data allows, and says what it chose and what the others would cost

With calibration by predicted nats per token, on held-out tokens; without, the head's values are kept for an embedding
and its head, and for other classes the policy is chosen that changes the worst site least.""",
)
