"""The totals of one model: weights, parameters counted once and by name, bytes stored and stored twice."""

from __future__ import annotations

from tieaudit.equality import Equality, can_declare, n_bytes_covered, n_bytes_extra, region_of, tells_ties
from tieaudit.model import Model, Weight, classes
from tieaudit.verdict import Found, Summary


def summary(model: Model, found: Found) -> Summary:
    """Totals as `docs/` defines them.

    A class counts once if it is aliased, absent, or declared and equal; in a format that cannot declare, if it is
    measured equal, transposed included. Buffers do not count. Constants are never a tie by measurement.
    Cost: O(n log n) in the number of weights; nothing is read.
    """
    n_parameters, n_named, because = _parameters(model, found)
    stored = [weight for weight in model.weights if not weight.absent]
    groups = classes(tie.ids for tie in found.ties if tie.origin in ("measured", "aliased"))
    return Summary(
        n_weights=len(stored),
        n_parameters=n_parameters,
        n_parameters_named=n_named,
        n_bytes=n_bytes_covered(region for weight in stored if (region := region_of(weight)) is not None),
        n_bytes_duplicate=n_bytes_extra(model, groups),
        n_parameters_because=because,
    )


def one_parameter(model: Model, found: Found) -> list[tuple[str, ...]]:
    """Classes of ids that are one parameter of the live model."""
    groups: list[tuple[str, ...]] = [tie.ids for tie in found.ties if tie.origin in ("aliased", "absent")]
    if not tells_ties(model):
        groups += [tie.ids for tie in found.ties if tie.origin == "measured"]
        # an alias map beside bare weights: the live module had one tensor where the file has one and a note
        groups += [tuple(_documented(model, declaration.members)) for declaration in model.declarations]
    equality = Equality(model, found)
    for declaration in model.declarations:
        if declaration.active and not (declaration.documented and can_declare(model)):  # a class does not read the map
            here = [id for id in declaration.members if id in model.by_id and not model.by_id[id].absent]
            groups += [tuple(group) for group in equality.groups(here)]
    return classes(groups)


def _documented(model: Model, members: tuple[str, ...]) -> list[str]:
    """The kept name and those dropped for it."""
    absent = [id for id in members if id in model.by_id and model.by_id[id].absent]
    return [*(id for id in members[:1] if id in model.by_id), *absent]


def _parameters(model: Model, found: Found) -> tuple[int | None, int | None, str]:
    if not model.weights_here:
        counted = model.metadata.get("n_parameters_live", "")
        because = "as the class counts them: the weights are not here" if counted else "the weights are not here"
        return (int(counted) if counted.isdigit() else None), None, because
    unknown = [weight for weight in model.weights if weight.parameter is None and weight.is_float]
    live = model.metadata.get("n_parameters_live", "")
    if unknown:
        reason = unknown[0].because or "no class and no convention says so"
        because = f"cannot tell whether {len(unknown):,} weights are parameters or buffers ({reason})"
        return (int(live) if live.isdigit() else None), None, because
    once, named = _count(model, found)
    if live.isdigit() and int(live) != once and model.format == "torch_module":
        return int(live), named, f"equal or aliased names in separate Parameter objects count apart; as one, {once:,}"
    if live.isdigit() and int(live) != once:
        return int(live), named, f"the class itself counts {live}; the names in the files add up to {once}"
    return once, named, ""


def _count(model: Model, found: Found) -> tuple[int, int]:
    first = {id: ids[0] for ids in one_parameter(model, found) for id in ids}
    parameters: list[Weight] = [weight for weight in model.weights if weight.parameter]
    # the largest, not the first: a class of an absent member with unknown shape still counts what is stored
    by_class: dict[str, int] = {}
    for weight in parameters:
        key = first.get(weight.id, weight.id)
        by_class[key] = max(by_class.get(key, 0), weight.n_elements)
    return sum(by_class.values()), sum(weight.n_elements for weight in parameters)
