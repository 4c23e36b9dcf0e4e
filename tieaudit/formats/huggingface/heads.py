"""Which settings of a class count its key and value heads. Runs only in the process that asks a class (`ask.py`).

Nothing is known about names of modules here: the class is built once more with one head, and what has another shape
then is what the setting governs.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from tieaudit.formats.huggingface import ask
from tieaudit.formats.huggingface.naming import loaded_names

NAMED = re.compile(r"(key_value|kv)\w*heads|query_groups")
"""Attributes of a configuration that may count key and value heads; those of an indexer choose tokens instead."""
_OTHERS = re.compile(r"index")


def heads_of(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to {"about": "heads", config, architecture, shapes}: each setting with what one head would change.

    Settings: {"key": dotted path in config.json, "value": heads as configured, "changed": {live name: [shape, shape
    with one head or null]}}, or "error" where the class does not take one head.
    """
    config_class, model_class, config, _ = ask.chosen(question)
    return heads_with(model_class, config_class, config, question["shapes"])


def heads_with(
    model_class: Any, config_class: Any, config: dict[str, Any], stored: dict[str, list[int]]
) -> dict[str, Any]:
    """The same of a class that is known already."""
    import transformers

    model = ask.build(model_class, config_class, config)
    names, converted, _ = loaded_names(model, stored)
    configured = config_class.from_dict(copy.deepcopy(config))
    found: list[dict[str, Any]] = []
    for path in ask.flag_levels(configured):
        level = configured
        for key in path:
            level = getattr(level, key)
        for name, value in list(vars(level).items()):
            if NAMED.search(name) and not _OTHERS.search(name) and type(value) is int and value > 0:
                key = _written_as(name, level, config, path)
                found.append({"key": ".".join((*path, key)), "value": value})
    for setting in found:
        try:
            small = ask.build(model_class, config_class, with_setting(config, setting["key"], 1))
        except Exception as error:  # whatever a class raises over one head
            setting["error"] = ask.reason(error)
        else:
            setting["changed"] = changed(model, small)
    return {
        "version": transformers.__version__, "class": model_class.__name__, "names": names, "converted": converted,
        "settings": found,
    }  # fmt: skip


def _written_as(name: str, level: Any, config: dict[str, Any], path: tuple[str, ...]) -> str:
    """The key for an attribute: the name that the file uses, if that is another one which the class takes for it."""
    written: Any = config
    for key in path:
        written = written.get(key) if isinstance(written, dict) else None
    aliases = (alias for alias, meant in getattr(type(level), "attribute_map", {}).items() if meant == name)
    return next((one for one in aliases if isinstance(written, dict) and one in written), name)


def with_setting(config: dict[str, Any], key: str, value: int) -> dict[str, Any]:
    """The configuration with another number under a dotted key. A level that the file does not spell out is added."""
    made = copy.deepcopy(config)
    level = made
    *path, last = key.split(".")
    for name in path:
        if not isinstance(level.get(name), dict):
            level[name] = {}
        level = level[name]
    level[last] = value
    return made


def changed(one: Any, other: Any) -> dict[str, list[Any]]:
    """Live name of each parameter that has another shape → its shape before and after, null where it is gone."""
    shapes = [{n: list(p.shape) for n, p in model.named_parameters(remove_duplicate=False)} for model in (one, other)]
    return {name: [shape, shapes[1].get(name)] for name, shape in shapes[0].items() if shapes[1].get(name) != shape}
