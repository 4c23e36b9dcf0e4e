"""Write the data file that says what each transformers class ties, out of the transformers that is installed.

    python tools/make_tie_defaults.py [--only TYPE,TYPE] [--out FILE]

Run it with transformers 4.57 (writes ties_v4.json) and with 5.x (ties_v5.json). Every class of every model type is
built on the meta device with its default configuration, made smaller where it can be, with the tying flags on, off and
one by one, and what it really ties is recorded; `_tied_weights_keys` is not interpreted. Classes that cannot be built
that way are listed under "failed" with the pairs that they declare. Takes some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tieaudit.formats.safetensors.weights import by_convention  # noqa: E402

FOLDER = ROOT / "tieaudit" / "formats" / "huggingface"
SECONDS_PER_CLASS = 20
FEW = {
    **dict.fromkeys("num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers".split(), 2),
    **dict.fromkeys("num_decoder_layers num_encoder_layers".split(), 2),
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts".split(), 4),
}
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="model types, comma separated")
    parser.add_argument("--out", type=Path, help="file to write (default: the package's own)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_long)
    types, classes, failed = collect(set(filter(None, options.only.split(","))))
    major = transformers.__version__.split(".")[0]
    out = options.out or FOLDER / f"ties_v{major}.json"
    out.write_text(rendered(transformers.__version__, types, classes, failed))
    print(
        f"{out}: {len(types)} model types, {len(classes)} classes, {len(failed)} not built, {out.stat().st_size} bytes"
    )


def _too_long(*_: object) -> None:
    raise TimeoutError(f"{SECONDS_PER_CLASS} s")


def rendered(version: str, types: dict[str, Any], classes: dict[str, Any], failed: dict[str, str]) -> str:
    """One line per entry, so that a new version shows as a readable difference."""

    def table(entries: dict[str, Any]) -> str:
        lines = (f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in sorted(entries.items()))
        return "{\n" + ",\n".join(lines) + "\n}"

    return (
        f'{{"transformers":{json.dumps(version)},\n"types":{table(types)},\n"classes":{table(classes)},\n'
        f'"failed":{table(failed)}}}\n'
    )


def collect(only: set[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Flag defaults per model type, ties per class, and what could not be built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        if only and model_type not in only:
            continue
        try:
            config_class = CONFIG_MAPPING[model_type]
            flags = flag_defaults(config_class)
        except Exception as error:  # composite types without a default
            failed[model_type] = one_line(error)
            continue
        types[model_type] = flags
        for model_class in classes_of(config_class):
            if model_class.__name__ in classes:
                continue
            signal.alarm(SECONDS_PER_CLASS)
            try:
                classes[model_class.__name__] = describe(model_class, config_class, model_type)
            except Exception as error:
                failed[model_class.__name__] = one_line(error)
                if (entry := declared_only(model_class, model_type)) is not None:
                    classes[model_class.__name__] = entry
            finally:
                signal.alarm(0)
        print(model_type, flags, len(classes), file=sys.stderr, flush=True)
    return types, classes, failed


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:80]


def flag_defaults(config_class: Any) -> dict[str, bool | None]:
    """Dotted path of each level → what the flag is when no key is given; null where the level has no such flag."""
    from tieaudit.formats.huggingface.ask import FLAG, flag_levels

    config = config_class.from_dict({})
    found: dict[str, bool | None] = {}
    for path in flag_levels(config):
        inner = config
        for key in path:
            inner = getattr(inner, key)
        value = getattr(inner, FLAG, None)
        found[".".join(path)] = value if isinstance(value, bool) else None
    return found


def classes_of(config_class: Any) -> Iterator[Any]:
    """All public model classes of the package that take this configuration."""
    import transformers

    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except Exception:  # no PyTorch model for this configuration, or an optional package is missing
        return
    for item in list(vars(module).values()):  # looking at a lazy module may fill it
        if not (isinstance(item, type) and issubclass(item, transformers.PreTrainedModel)):
            continue
        if getattr(item, "config_class", None) is config_class and not re.search(
            "PreTrainedModel$|[Pp]retrained", item.__name__
        ):
            if item.__module__ == name and hasattr(transformers, item.__name__):
                yield item


def describe(model_class: Any, config_class: Any, model_type: str) -> dict[str, Any]:
    """One entry: what the class ties under which flag, where its embedding and head are, what buffers it stores."""
    from tieaudit.formats.huggingface import ask
    from tieaudit.formats.huggingface.naming import saved_names

    config = small_config(model_class, config_class)
    paths = flags_accepted(model_class, config_class, config)
    on, off = dict.fromkeys(paths, True), dict.fromkeys(paths, False)
    tied = ask.build(model_class, config_class, ask.with_flags(config, on))
    untied = ask.build(model_class, config_class, ask.with_flags(config, off))
    with_flag, without = ask.kept_first(tied, ask.groups(tied)), ask.kept_first(untied, ask.groups(untied))
    entry: dict[str, Any] = {"type": model_type, "prefix": tied.base_model_prefix or ""}
    lost_at: dict[tuple[str, ...], str] = {}
    for path in paths if with_flag != without else ():
        remaining = ask.groups(ask.build(model_class, config_class, ask.with_flags(config, {**on, path: False})))
        for group in with_flag:
            if sorted(group) not in remaining:
                lost_at.setdefault(tuple(group), ".".join((*path, ask.FLAG)))
    ties = [
        pattern(g, None if sorted(g) in map(sorted, without) else lost_at.get(tuple(g), ask.FLAG)) for g in with_flag
    ]
    ties += [pattern(g, None) for g in without if sorted(g) not in map(sorted, with_flag)]
    if ties:
        entry["ties"] = [json.loads(text) for text in dict.fromkeys(json.dumps(tie) for tie in ties)]
    parameters = {name for name, _ in untied.named_parameters(remove_duplicate=False)}
    buffers = buffer_endings(set(untied.state_dict()) - parameters, parameters)
    if buffers:
        entry["buffers"] = buffers
    roles = {key: sorted(map(general, names)) for key, names in ask._roles(untied).items() if names}
    if ties or "head" in roles:
        entry.update(roles)
        named = {name for group in (*with_flag, *without) for name in group}
        named |= {name for names in ask._roles(untied).values() for name in names}
        saved = {general(a): general(b) for a, b in sorted(saved_names(untied, sorted(named)).items())}
        if saved:
            entry["saved"] = saved
    return entry


def flags_accepted(model_class: Any, config_class: Any, config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Levels at which the flag may be true: some classes refuse it at some."""
    from tieaudit.formats.huggingface import ask

    paths = ask.flag_levels(config_class.from_dict(json.loads(json.dumps(config))))
    try:
        ask.build(model_class, config_class, ask.with_flags(config, dict.fromkeys(paths, True)))
    except TimeoutError:
        raise
    except Exception:
        return [path for path in paths if accepts(model_class, config_class, ask.with_flags(config, {path: True}))]
    return paths


def accepts(model_class: Any, config_class: Any, config: dict[str, Any]) -> bool:
    from tieaudit.formats.huggingface import ask

    try:
        ask.build(model_class, config_class, config)
    except TimeoutError:
        raise
    except Exception:
        return False
    return True


def declared_only(model_class: Any, model_type: str) -> dict[str, Any] | None:
    """For a class that cannot be built here: the pairs that it declares by plain names (transformers 5 only)."""
    keys = getattr(model_class, "_tied_weights_keys", None)
    if not isinstance(keys, dict):
        return None
    by_source: dict[str, list[str]] = {}
    for target, source in keys.items():
        if re.fullmatch(r"[\w.]+", target) and re.fullmatch(r"[\w.]+", source):
            by_source.setdefault(source, []).append(target)
    ties = [{"members": [source, *targets], "flag": "tie_word_embeddings"} for source, targets in by_source.items()]
    return {"type": model_type, "prefix": model_class.base_model_prefix or "", "ties": ties} if ties else None


def buffer_endings(buffers: set[str], parameters: set[str]) -> list[str]:
    """The shortest endings that tell these buffers from every parameter; those that convention tells are left out."""
    taken = {ending for name in parameters for ending in endings(general(name))}
    found = set()
    for name in sorted(buffers):
        known, _ = by_convention(name, "float32", (1, 1, 1))
        if known is not False:
            found.add(next((e for e in endings(general(name)) if e not in taken), general(name)))
    return sorted(found)


def endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])


def general(name: str) -> str:
    """The name with every index replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def pattern(group: list[str], flag: str | None) -> dict[str, Any]:
    """A group, the kept name first, indices generalised: per index where all members share theirs, else all as one."""
    indices = {tuple(re.findall(r"(?<=\.)\d+(?=\.|$)", name)) for name in group}
    entry: dict[str, Any] = {"members": list(dict.fromkeys(map(general, group))), "flag": flag}
    if len(indices) > 1:
        entry["across"] = True
    return entry


def small_config(model_class: Any, config_class: Any) -> dict[str, Any]:
    """The default configuration with few layers if the class can be built so, else as it is."""
    full = json.loads(json.dumps(config_class.from_dict({}).to_dict(), default=str))
    small = shrink(json.loads(json.dumps(full)))
    return small if accepts(model_class, config_class, small) else {}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    for key, value in config.items():
        if key in FEW and isinstance(value, int) and value > FEW[key]:
            config[key] = FEW[key]
        elif key in PER_LAYER_LISTS and isinstance(value, list):
            config[key] = value[:2]
        elif isinstance(value, dict):
            shrink(value)
    return config


if __name__ == "__main__":
    main()
