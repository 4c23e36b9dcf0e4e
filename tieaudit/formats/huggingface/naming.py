"""How transformers renames tensors while loading and saving. Runs only in the process that asks a class (`ask.py`)."""

from __future__ import annotations

import re
from typing import Any


def loaded_names(model: Any, shapes: dict[str, list[int]]) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """How loading renames: stored → live names; which are converted (fused, split, transposed) and not only renamed;
    and for live names that no stored one becomes, the spelling that saving would use beside the stored ones."""
    try:
        import transformers.core_model_loading  # noqa: F401 - only in transformers 5
    except ImportError:
        return _names_v4(model, list(shapes))
    return _names_v5(model, shapes)


def _names_v5(model: Any, shapes: dict[str, list[int]]) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """The loop of `convert_and_load_state_dict_in_model`, on meta tensors.

    Source: transformers 5.23, core_model_loading.py.
    """
    from copy import deepcopy

    import torch
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, list[str]] = {}
    fused: dict[str, tuple[Any, list[str]]] = {}
    for stored in sorted(shapes, key=loading.dot_natural_key):
        live, pattern = loading.rename_source_key(stored, renamings, converters, prefix, state)
        if live not in state and stored in state:
            live, pattern = loading.rename_source_key(stored, [], [], prefix, state)
        if live not in state:
            continue
        if pattern is None:
            names.setdefault(stored, []).append(live)
            continue
        if live not in fused:  # a copy is slow, and thousands of experts become one tensor
            fused[live] = (deepcopy(by_pattern[pattern]), [])
        entry, parts = fused[live]
        parts.append(stored)
        meta = torch.empty(shapes[stored], device="meta")
        entry.add_tensor(live, stored, pattern, lambda tensor=meta: tensor)
    converted = []
    for first, (entry, parts) in fused.items():
        try:
            targets = [name for name in entry.convert(first, model=model, config=model.config) if name in state]
        except Exception:  # an incomplete or quantised checkpoint: the first target is known all the same
            targets = [first]
        for stored in parts:
            names[stored] = targets
            converted.append(stored)
    loaded = {live for targets in names.values() for live in targets}
    own = get_model_conversion_mapping(model, add_legacy=False)
    renamed = any(entry.was_used() and not isinstance(entry, loading.PrefixChange) for entry in mapping[: len(own)])
    if not renamed:
        return names, sorted(converted), {}
    used = [
        new for new, old in zip(own, mapping, strict=False) if old.was_used() or type(new) is loading.WeightRenaming
    ]
    return names, sorted(converted), saved_names(model, [live for live in state if live not in loaded], used)


def saved_names(model: Any, names: list[str], conversions: list[Any] | None = None) -> dict[str, str]:
    """Live name → the name that `save_pretrained` gives it, where it differs and loading turns it back.

    `conversions`: those that loading used; without them all of the class's own, as for a model made from nothing.
    """
    import torch

    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return _saved_names_v4(model, names)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    state, found = model.state_dict(), {}
    model._weight_conversions = conversions
    for live in names:
        try:
            (name,) = loading.revert_weight_conversion(model, {live: torch.empty(0, device="meta")})
            back, _ = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        except Exception:  # not every conversion can be reverted for a tensor alone
            continue
        if name != live and back == live:
            found[live] = str(name)
    return found


def _saved_names_v4(model: Any, names: list[str]) -> dict[str, str]:
    """The reverse key mapping of `save_pretrained` of transformers 4.57."""
    mapping = getattr(type(model), "_checkpoint_conversion_mapping", None) or {}
    found = {}
    for live in names:
        for replacement, pattern in mapping.items():
            name, n_replaced = re.subn(pattern, re.sub(r"\(.*\)", "", replacement.lstrip("^")), live)
            if n_replaced:
                found[live] = name
                break
    return found


def _names_v4(model: Any, stored: list[str]) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """`_load_pretrained_model` of transformers 4.57: class renames, then the base prefix added or removed."""
    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in stored)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    key_mapping = getattr(type(model), "_checkpoint_conversion_mapping", None) or None
    state = model.state_dict()
    try:
        renamed = model._get_key_renaming_mapping(
            stored, key_mapping, has_prefix and not expects_prefix, bool(prefix) and expects_prefix and not has_prefix
        )
    except ValueError:  # a task-specific key in what looks like a base checkpoint
        renamed = {name: name for name in stored}
    names = {name: [live] for name, live in renamed.items() if live in state}
    loaded = {live for targets in names.values() for live in targets}
    is_old = any(_saved_names_v4(model, targets) == {targets[0]: name} for name, targets in names.items())
    return names, [], _saved_names_v4(model, [live for live in state if live not in loaded]) if is_old else {}
