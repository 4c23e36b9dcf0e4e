"""Fewer key and value heads in a Hugging Face folder: the tensors shrink and the setting that counts them follows.

Which tensors a setting governs the class itself says: it is built once more with one head (`heads.py`), and all that
has another shape then belongs together. Without transformers the data file `heads.json` answers. A class repeats each
head for its neighbours among the query heads (`repeat_kv`), which is what pooled heads need; the proof runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tieaudit.change import Pool, Pooled, SetConfig
from tieaudit.dtypes import dtype
from tieaudit.formats.huggingface.asking import ask_class
from tieaudit.formats.huggingface.defaults import Spelling
from tieaudit.formats.huggingface.facts import lookup
from tieaudit.formats.huggingface.folder import CONFIG, read_config
from tieaudit.model import Model, Weight, make_id

_KEYS_OR_VALUES = re.compile(r"(?:^|_)(?:k|v|key|keys|value|values)(?:_|\d|$)")
_AXIS = 0
"""Heads lie along the rows of what makes keys and values: `nn.Linear` holds [out, in]."""


@dataclass(frozen=True)
class HeadSetting:
    """One setting that counts heads, and what it governs."""

    key: str
    """Dotted path in config.json."""
    n_heads: int
    members: tuple[str, ...]
    """Names of all tensors whose rows are the heads, as they are stored or would be."""
    stuck: str = ""
    """Why these heads cannot be pooled; empty if they can."""


@dataclass(frozen=True)
class _Known:
    """All settings of a class that count heads, and who says so."""

    said_by: str
    settings: tuple[HeadSetting, ...]


def plan_of(model: Model, id: str, n_groups: int) -> tuple[Pool | SetConfig, ...] | str:
    """The edits after which all projections that share a setting with this one have `n_groups` heads, or why not.

    One setting counts the heads of every layer, so its tensors are pooled together or not at all. Cost: the class is
    built a few times on the meta device, in the process that is asked about it anyway.
    """
    known = _known(model)
    if isinstance(known, str):
        return known
    name = model.by_id[id].name
    setting = next((one for one in known.settings if name in one.members), None)
    if setting is None:
        others = " and ".join(one.key for one in known.settings)
        but = f" of these ({others} counts those of others)" if others else ""
        return f"{known.said_by} has no setting that counts the key and value heads{but}, so {CONFIG} cannot say it"
    reason = setting.stuck or _unfit(setting, n_groups)
    if reason:
        return reason
    found: dict[str, list[Pooled]] = {}
    for stored in setting.members:
        weight = model.by_id.get(make_id(stored))
        if weight is None or weight.absent and not _restored(model, weight):
            return f"{stored}, whose heads {setting.key} counts, is not stored as the class has it"
        if weight.absent:
            continue  # what restores it has the new shape
        if reason := _cannot_be_averaged(weight, setting.n_heads):
            return reason
        found.setdefault(stored.rpartition(".")[0], []).append(Pooled(weight.id, _AXIS))
    because = f"{CONFIG}:{setting.key} = {setting.n_heads} ({known.said_by})"
    pools = [Pool(tuple(_matrix_first(model, one)), setting.n_heads, n_groups, because) for one in found.values()]
    return (*pools, SetConfig(CONFIG, tuple(setting.key.split(".")), n_groups, f"{n_groups} heads are left"))


def _unfit(setting: HeadSetting, n_groups: int) -> str:
    said = f"there are {setting.n_heads} key and value heads ({setting.key})"
    if setting.n_heads <= n_groups:
        return f"{said}, no more than the {n_groups} asked for"
    return f"{said}, which {n_groups} groups do not divide" if setting.n_heads % n_groups else ""


def _restored(model: Model, weight: Weight) -> bool:
    return any(one.active and one.restores and weight.id in one.members for one in model.declarations)


def _cannot_be_averaged(weight: Weight, n_heads: int) -> str:
    if not weight.is_float or dtype(weight.dtype).item_bytes is None:
        return f"{weight.id} holds {weight.dtype}, of which no mean is computed"
    if not weight.shape or weight.shape[_AXIS] % n_heads:
        return f"{weight.id} is {list(weight.shape)}, expected rows of {n_heads} heads"
    return ""


def _matrix_first(model: Model, weights: list[Pooled]) -> list[Pooled]:
    return sorted(weights, key=lambda one: -len(model.by_id[one.id].shape))


def _known(model: Model) -> _Known | str:
    config = read_config(Path(model.path))
    if "quantization_config" in config:
        return f"{CONFIG} has a quantization_config: the heads are stored as codes, of which no mean is computed"
    architecture = model.metadata.get("architecture", "")
    shapes = {weight.name: weight.shape for weight in model.weights if not weight.absent}
    answer = _answer(json.dumps([config, architecture, shapes]))
    if "error" not in answer:
        return _from_answer(answer, shapes)
    found = _from_table(architecture, config, list(shapes))
    if found is not None:
        return found
    return (
        f"{architecture or 'the class'} could not be asked which setting counts its key and value heads "
        f"({answer['error']}), and the data file does not know it"
    )


@lru_cache(maxsize=4)
def _answer(question: str) -> Mapping[str, Any]:
    """The same question comes once for each projection."""
    config, architecture, shapes = json.loads(question)
    return ask_class(config, architecture, shapes, "heads")


def _from_answer(answer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> _Known:
    name = f"{answer['class']} of transformers {answer['version']}"
    stored = {live[0]: one for one, live in answer["names"].items() if len(live) == 1}
    rebuilt = set(answer["converted"])
    settings = []
    for one in answer["settings"]:
        if one.get("changed"):
            members = tuple(stored.get(live, live) for live in one["changed"])
            stuck = next(_stuck(one, stored, rebuilt, shapes), "")
            settings.append(HeadSetting(one["key"], one["value"], members, stuck))
    return _Known(name, tuple(settings))


def _stuck(
    setting: Mapping[str, Any], stored: Mapping[str, str], rebuilt: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Reasons against pooling all that the setting governs."""
    for live, (before, after) in setting["changed"].items():
        name = stored.get(live, live)
        if not rows_are_heads(live, before, after, setting["value"]):
            became = f"would become {after}" if after is not None else "would be gone"
            yield (
                f"{name} depends on {setting['key']} too, and its rows are not the heads of keys or of values alone: "
                f"it is {before} and {became} with one head"
            )
        elif name in rebuilt or tuple(shapes.get(name, before)) != tuple(before):
            yield f"{name} is stored in another layout than the class has it in, {before}"


def rows_are_heads(name: str, before: list[int], after: list[int] | None, n_heads: int) -> bool:
    """Whether the rows of a tensor are the heads of keys or of values, one after the other.

    By its shapes with all heads and with one, and by the name of its module: keys and values in one tensor, or the
    state of a recurrence, may have such shapes too.
    """
    module = name.split(".")[-2] if "." in name else ""
    alone = _KEYS_OR_VALUES.search(module) is not None
    return alone and after is not None and before == [n_heads * after[_AXIS], *after[1:]]


@cache
def _table() -> Mapping[str, Any]:
    """{"transformers": version, "classes": {class: {"prefix", "saved", "settings": {key: {"rows": patterns, "stuck":
    pattern or missing}}}, or nothing where no setting counts heads}}, written by `tools/make_head_settings.py`."""
    found: Mapping[str, Any] = json.loads(
        files("tieaudit.formats.huggingface").joinpath("heads.json").read_text(encoding="utf-8")
    )
    return found


def _from_table(architecture: str, config: Mapping[str, Any], names: list[str]) -> _Known | None:
    """What the data file says; a class that it does not list has no such setting, or is not known at all."""
    data = _table()
    entry = data["classes"].get(architecture)
    if entry is None:
        return None
    spell = Spelling(entry.get("prefix", ""), names, entry.get("saved", {}))
    found = []
    for key, governed in entry.get("settings", {}).items():
        value = lookup(config, key)
        members = tuple(name for pattern in governed["rows"] for name in spell.matching(pattern))
        stuck = (
            f"{governed['stuck']} depends on {key} too, and its rows are not the heads of keys or of values alone"
            if "stuck" in governed
            else ""
        )
        if type(value) is not int or value < 1:
            stuck = stuck or f"{CONFIG} does not say how many heads there are ({key}), and only the class would know"
        found.append(HeadSetting(key, value if isinstance(value, int) else 0, members, stuck))
    return _Known(f"{architecture} of transformers {data['transformers']}", tuple(found))
