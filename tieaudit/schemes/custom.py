"""Groups of the user's own, from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tieaudit.errors import UsageError
from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.schemes import Scheme
from tieaudit.tables import seen_as
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.whole import read_whole

_MAX_BYTES = 4_000_000
_KEYS = ("match", "role", "layers", "each")
_LISTS: dict[str, type] = {"match": str, "layers": int}
"""Keys that take a list, and of what."""
_EACH = ("layer", "side", "part", "expert")


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    for number, group in enumerate(_read(argument), 1):
        weights = [one for one in subject.model.weights if not one.absent and _chosen(subject, one, group)]
        apart: dict[object, list[Weight]] = {}
        for weight in weights:
            apart.setdefault(_key(subject, weight, group.get("each")), []).append(weight)
        found = [members for members in apart.values() if len(members) > 1]
        if not found:
            held = f"only {weights[0].id}" if len(weights) == 1 else "one weight at a time" if weights else "nothing"
            yield Refusal("custom", (), f"group {number} of {argument} matches {held}: there is nothing to share")
        for members in found:
            yield from _share(subject, f"group {number} of {argument}", members)


def _share(subject: Subject, where: str, weights: list[Weight]) -> Iterator[Candidate | Refusal]:
    first, members = weights[0], [Member(weights[0].id)]
    for weight in weights[1:]:
        view = seen_as(subject, weight, first)
        if view is None:
            shapes = f"{list(weight.shape)} {weight.dtype} does not fit {list(first.shape)} {first.dtype}"
            yield Refusal("custom", (first.id, weight.id), f"{weight.id} cannot be one with {first.id}: {shapes}")
        else:
            members.append(Member(weight.id, view))
    regions = {one.storage.region: one.n_bytes for one in weights if one.storage is not None}
    if len(members) > 1 and len(regions) > 1:
        lossless = one_value(subject).holds(members)
        yield Candidate("custom", tuple(members), sum(regions.values()) - max(regions.values()), lossless, where)


def _chosen(subject: Subject, weight: Weight, group: Mapping[str, Any]) -> bool:
    role = subject.roles[weight.id]
    return (
        any(fnmatchcase(weight.id, pattern) for pattern in group.get("match", ["*"]))
        and role.kind == group.get("role", role.kind)
        and ("layers" not in group or role.layer in group["layers"])
    )


def _key(subject: Subject, weight: Weight, each: str | None) -> object:
    return weight.part if each == "part" else getattr(subject.roles[weight.id], each) if each else None


def _read(argument: str) -> list[dict[str, Any]]:
    """The groups of the file. UsageError that names the file, the group and the key."""
    if not argument:
        raise UsageError("--scheme custom: expected the path of a TOML file behind a colon", hint="custom:ties.toml")
    try:
        held = tomllib.loads(read_whole(argument, _MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{argument}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{argument}: expected TOML, found what is none: {error}") from error
    groups: Any = held.pop("group", [])
    if held or not groups or not isinstance(groups, list) or not all(isinstance(one, dict) for one in groups):
        found = f"the key {next(iter(held))!r}" if held else "something else" if groups else "no group"
        raise UsageError(f"{argument}: expected one or more [[group]] and nothing else, found {found}")
    for number, group in enumerate(groups, 1):
        _check(f"{argument}, group {number}", group)
    return list(groups)


def _check(where: str, group: Mapping[str, Any]) -> None:
    for key, value in group.items():
        if key not in _KEYS:
            raise UsageError(f"{where}: expected the keys {', '.join(_KEYS)}, found {key!r}")
        inside = _LISTS.get(key)
        if inside is None:
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, list) and all(isinstance(one, inside) for one in value)
        if not fits:
            what = {"match": "a list of patterns", "layers": "a list of numbers"}.get(key, "a text")
            raise UsageError(f"{where}: expected {what} for {key}, found {value!r}")
    if group.get("each", "layer") not in _EACH:
        raise UsageError(f"{where}: expected one of {', '.join(_EACH)} for each, found {group['each']!r}")
    if "match" not in group and "role" not in group:
        raise UsageError(f"{where}: expected match or role, found neither: this would take every weight of the model")


custom = Scheme(
    name="custom",
    argument="FILE.toml",
    worth_comparing=lambda subject: (),
    merge="mean",
    summary="groups of your own, by pattern and role, from a TOML file",
    source="the groups that a configuration cannot express (PyTorch: module.a.weight = module.b.weight by hand)",
    propose=_propose,
    page="""custom:ties.toml: every [[group]] of the file becomes one tensor.

    [[group]]
    match = ["model.layers.*.mlp.up_proj.weight"]   # patterns of weight ids: *, ?, [abc]
    layers = [4, 5, 6, 7]                            # only in these layers

    [[group]]
    role = "attention_key"                           # by role, instead of a pattern or as well
    each = "layer"                                   # one tensor for each layer, side, part or expert

What fits the first weight of its group transposed is seen transposed; what fits in no way is refused by name.""",
)
