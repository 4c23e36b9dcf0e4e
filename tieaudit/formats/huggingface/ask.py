"""The child process that asks an installed transformers about a model class: JSON lines on stdin, answers on stdout.

`python -m tieaudit.formats.huggingface.ask`. It builds the class on torch's meta device (no weights, no files, no
network) from a config that the parent read. Code from a repository (`auto_map`, `trust_remote_code`) is never run:
only classes of the transformers package itself are looked up by name. It is a process of its own because building a
foreign configuration may take long, print, or die; the parent limits it and falls back to the data files.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tieaudit.formats.huggingface.naming import loaded_names

FLAG = "tie_word_embeddings"
BUDGET_SECONDS = 25.0
"""Time for building variants of the configuration (flags on, off, one by one); what is left over stays unknown."""


def main() -> None:
    """Answer questions until stdin ends. Whatever the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        _reply(line, answers)


def _reply(line: str, answers: TextIO) -> None:
    try:
        answer = answer_question(json.loads(line))
    except Exception as error:  # whatever a foreign class raises while it is built: the parent falls back
        answer = {"error": reason(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def reason(error: Exception) -> str:
    """One line; the kind of error only where the library did not mean to say something."""
    text = str(error).split("\n")[0][:300]
    return (
        text
        if isinstance(error, LookupError) and not isinstance(error, KeyError)
        else f"{type(error).__name__}: {text}"
    )


def answer_question(question: dict[str, Any]) -> dict[str, Any]:
    """One answer: what the class holds and ties as configured, and how stored names become live ones.

    Question: config (object), architecture (name or ""), shapes (stored name → shape); `about`: "heads" for
    `heads.heads_of` in place of this.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_grad_enabled(False)
    if question.get("about") == "heads":
        from tieaudit.formats.huggingface.heads import heads_of

        return heads_of(question)
    shapes: dict[str, list[int]] = question["shapes"]
    config_class, model_class, config, left_out = chosen(question)
    model = build(model_class, config_class, config)
    unique = {id(p): p for p in model.parameters()}
    names, converted, saved = loaded_names(model, shapes)
    return {
        "version": transformers.__version__,
        "class": model_class.__name__,
        "left_out": left_out,
        "prefix": model.base_model_prefix or "",
        "parameters": {n: list(p.shape) for n, p in model.named_parameters(remove_duplicate=False)},
        "buffers": sorted(
            n for n in model.state_dict() if n not in dict(model.named_parameters(remove_duplicate=False))
        ),
        "n_parameters": sum(p.numel() for p in unique.values()),
        "recomputed": sorted(recomputed(model)),
        "names": names,
        "converted": converted,
        "saved": saved,
        **_roles(model),
        **ties(model_class, config_class, config, model),
    }


def chosen(question: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], list[str]]:
    """The configuration's class, the model's, the configuration as they take it, and the keys that had to go."""
    config = plain_config(question["config"])
    config_class = _config_class(config)
    config, left_out = accepted(config_class, config)
    return config_class, _model_class(question["architecture"], config, question["shapes"]), config, left_out


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as its class takes it, without what points to a quantiser or to code of a repository."""
    return {key: _floats(value) for key, value in config.items() if key not in ("quantization_config", "auto_map")}


def _floats(value: Any) -> Any:
    """Infinities as numbers again: transformers 5 writes them as {"__float__": "Infinity"}, which JSON can hold."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def _config_class(config: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise LookupError(f"this transformers does not know the model type {model_type!r}")
    return CONFIG_MAPPING[model_type]


def accepted(config_class: Any, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without the keys over which the class refuses it, and those keys.

    Some released configurations do not pass their own class's checks. Names, ties and buffers rarely hang on such a
    key, so an answer without it, which says so, is better than none.
    """
    left_out: list[str] = []
    for _ in range(3):
        try:
            config_class.from_dict(json.loads(json.dumps(config)))
            break
        except Exception as error:
            named = [key for key in re.findall(r"`(\w+)`", str(error)) if _mentions(config, key) and key != FLAG]
            if not named:
                raise
            left_out.append(named[0])
            config = _without(config, named[0])
    return config, left_out


def _mentions(config: Any, key: str) -> bool:
    return isinstance(config, dict) and (key in config or any(_mentions(inner, key) for inner in config.values()))


def _without(config: Any, key: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: _without(inner, key) for name, inner in config.items() if name != key}


def _model_class(architecture: str, config: dict[str, Any], shapes: dict[str, list[int]]) -> Any:
    """The package's own class that the configuration names; without a name the one that fits the tensors best."""
    import transformers

    if architecture:
        found = getattr(transformers, architecture, None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise LookupError(f"transformers {transformers.__version__} has no class {architecture}")
        return found
    best, fits = None, -1.0
    for candidate in _candidates(config["model_type"]):
        try:
            model = build(candidate, _config_class(config), config)
        except Exception:  # one of several candidates; the others may do
            continue
        live = model.state_dict().keys()
        fit = len(shapes.keys() & live) - 0.5 * len(live - shapes.keys())
        if best is None or fit > fits:
            best, fits = candidate, fit
    if best is None:
        raise LookupError(
            f"the configuration names no architecture, and no class of {config['model_type']} can be built"
        )
    return best


def _candidates(model_type: str) -> Iterator[Any]:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    seen = set()
    for kind in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "PRETRAINING", ""):
        mapping = getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES", {})
        names = mapping.get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in seen and hasattr(transformers, name):
                seen.add(name)
                yield getattr(transformers, name)


def build(model_class: Any, config_class: Any, config: dict[str, Any]) -> Any:
    """The class on the meta device as the configuration says, tied as the class ties it."""
    import copy

    import torch

    configured = config_class.from_dict(copy.deepcopy(config))
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(configured, wanted):
        inner = [v for v in vars(configured).values() if isinstance(v, wanted)]
        if not inner:
            raise LookupError(f"{model_class.__name__} takes a {wanted.__name__}, not a {config_class.__name__}")
        configured = inner[0]
    try:
        with torch.device("meta"), _no_initialisation():
            model = model_class(configured)
    except NotImplementedError:  # a class of transformers 4 that looks at a buffer while it is built
        from transformers.integrations.accelerate import init_empty_weights

        with init_empty_weights(), _no_initialisation():
            model = model_class(configured)
    model.tie_weights()
    return model


def _no_initialisation() -> Any:
    """On the meta device there is nothing to initialise; transformers 5 would also tie there, which is done after."""
    try:
        from transformers.initialization import no_init_weights  # transformers 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights  # transformers 4
    return no_init_weights()


def groups(model: Any) -> list[list[str]]:
    """Names of parameters that are one object."""
    by_object: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in by_object.values() if len(names) > 1)


def dropped(model: Any) -> set[str]:
    """Names that saving drops in favour of another: the targets of the class's own mapping, in either version."""
    if hasattr(model, "get_expanded_tied_weights_keys"):  # transformers 5: {target: source}
        return set(model.get_expanded_tied_weights_keys(all_submodels=True))
    patterns = []  # transformers 4: a list of patterns, one list per class
    for prefix, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None) or ()
        patterns += [f"{prefix}.{key}" if prefix else key for key in keys]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def kept_first(model: Any, found: list[list[str]]) -> list[list[str]]:
    """The groups with the name that saving keeps in front."""
    gone = dropped(model)
    return [sorted(group, key=lambda name: (name in gone, name)) for group in found]


def recomputed(model: Any) -> set[str]:
    """Parameters that saving leaves out on purpose, because the class computes them (sinusoidal positions)."""
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def flag_levels(configured: Any) -> list[tuple[str, ...]]:
    """Paths of the configurations inside a configuration, the outermost first: where a flag can be."""
    from transformers import PretrainedConfig

    found: list[tuple[str, ...]] = [()]
    for path in found:
        outer = configured
        for key in path:
            outer = getattr(outer, key)
        if len(path) < 3:
            found.extend((*path, k) for k, v in vars(outer).items() if isinstance(v, PretrainedConfig))
    return found


def with_flags(config: dict[str, Any], values: dict[tuple[str, ...], bool]) -> dict[str, Any]:
    """The configuration with the flag set at some levels. A level that the file does not spell out is added."""
    import copy

    changed = copy.deepcopy(config)
    for path, value in values.items():
        level = changed
        for key in path:
            if not isinstance(level.get(key), dict):
                level[key] = {}
            level = level[key]
        level[FLAG] = value
    return changed


def ties(
    model_class: Any, config_class: Any, config: dict[str, Any], model: Any, *, seconds: float = BUDGET_SECONDS
) -> dict[str, Any]:
    """What is tied as configured, with every flag off, with every flag on, and how each single flag changes that.

    `levels`: dotted path → {"value": the flag as this class reads it, "on": groups, "off": groups}.
    """
    started = time.monotonic()
    now = kept_first(model, groups(model))
    paths = flag_levels(config_class.from_dict(json.loads(json.dumps(config))))
    cache: dict[str, list[list[str]] | None] = {}

    def tied(values: dict[tuple[str, ...], bool]) -> list[list[str]] | None:
        changed = with_flags(config, values)
        key = json.dumps(changed, sort_keys=True)
        if key not in cache:
            if time.monotonic() - started > seconds:
                return None
            try:
                changed_model = build(model_class, config_class, changed)
                cache[key] = kept_first(changed_model, groups(changed_model))
            except Exception:  # a combination that the class refuses is no answer about the others
                cache[key] = None
        return cache[key]

    configured = config_class.from_dict(json.loads(json.dumps(config)))
    on, off = tied(dict.fromkeys(paths, True)), tied(dict.fromkeys(paths, False))
    levels = {}
    for path in paths if on != off else ():
        inner = configured
        for key in path:
            inner = getattr(inner, key)
        levels[".".join(path)] = {
            "value": getattr(inner, FLAG, None),
            "on": tied({path: True}),
            "off": tied({path: False}),
        }
    return {"groups": now, "on": on, "off": off, "levels": levels}


def _roles(model: Any) -> dict[str, list[str]]:
    """Live names of the input embedding, the output head and its bias, as the class itself answers."""

    def names_of(getter: str) -> tuple[list[str], Any]:
        try:
            module = getattr(model, getter)()
        except Exception:  # classes without one raise several kinds of errors
            return [], None
        if module is None or not hasattr(module, "weight"):
            return [], None
        return [n for n, m in model.named_modules(remove_duplicate=False) if m is module], module

    inputs, table = names_of("get_input_embeddings")
    heads, head = names_of("get_output_embeddings")
    heads = [name for name in heads if head is not table]
    bias = getattr(head, "bias", None) if heads else None
    biases = [n for n, p in model.named_parameters(remove_duplicate=False) if bias is not None and p is bias]
    return {
        "input": [f"{name}.weight" for name in inputs],
        "head": [f"{name}.weight" for name in heads],
        "head_bias": biases,
    }


if __name__ == "__main__":
    main()
