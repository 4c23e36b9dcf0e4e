"""A Hugging Face folder as a `Model`: stored tensors, what the class ties, and what is realised by absence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tieaudit.formats.huggingface.asking import ask_class
from tieaudit.formats.huggingface.defaults import Major, from_convention, from_table, table
from tieaudit.formats.huggingface.facts import FLAG, ClassFacts, ClassTie, from_answer
from tieaudit.formats.huggingface.folder import CONFIG, architecture_of, read_config, weight_set
from tieaudit.formats.huggingface.pickled import read_weights
from tieaudit.formats.huggingface.unfetched import read_unfetched, unfetched, unsure, with_shapes
from tieaudit.formats.safetensors.sharded import Checkpoint
from tieaudit.formats.safetensors.weights import by_convention, documented, stored_weights
from tieaudit.model import Declaration, Model, Part, Weight, make_id

LOADERS: Mapping[Major, str] = {5: "transformers 5", 4: "transformers 4"}


@dataclass(frozen=True)
class Known:
    """What every source that answered says about the class of one folder."""

    best: ClassFacts
    """The installed class if it answered, else the newest data file that knows the class, else convention."""
    by_major: Mapping[Major, ClassFacts]
    """The same question put to each major version of transformers."""
    notes: tuple[str, ...]


def load(path: Path, files: tuple[Path, ...]) -> Model:
    """Read one folder: headers only, plus one question to the class.

    Raises: CorruptFile, UnreadableModel. Cost: the headers; a few seconds for the first class that is asked.
    """
    config = read_config(path)
    chosen = weight_set(path)
    away = unfetched(chosen)
    if away is None:
        checkpoint, facts, lost = read_weights(chosen.main)
        known = know(config, checkpoint)
    else:
        checkpoint, facts, lost = read_unfetched(chosen, away, config), {"weights": away.said}, (away.note,)
        known = know(config, checkpoint)
        checkpoint = with_shapes(checkpoint, known.best, config)
        if known.best.n_parameters is not None and "quantization_config" not in config:
            facts["n_parameters_live"] = str(known.best.n_parameters)
    weights = {weight.id: weight for weight in stored_weights(checkpoint)}
    weights = {id: unsure(_classified(weight, known.best, config)) for id, weight in weights.items()}
    claims, absent, notes = declarations(known, weights)
    extra, documented_ties = documented(checkpoint, {**weights, **absent})
    absent.update({weight.id: weight for weight in extra})
    weights.update(absent)
    if "quantization_config" not in config:  # a quantiser replaces parameters by tensors that the bare class lacks
        unfilled = _unfilled(known.best, weights)
        weights.update(unfilled)
    return Model(
        path=str(path),
        format="huggingface",
        parts=(Part("", tuple(str(file) for file in (path / CONFIG, *checkpoint.files))),),
        weights=tuple(weights.values()),
        declarations=(*claims, *documented_ties),
        hints=_hints(known.best, weights),
        dimensions=dict(_dimensions(config)),
        flags=flags(config),
        metadata={**_metadata(config, known, checkpoint, chosen.others), **facts},
        notes=(*known.notes, *notes, *lost),
    )


def know(config: Mapping[str, Any], checkpoint: Checkpoint) -> Known:
    """Ask the installed class, and both data files for the versions that are not installed."""
    architecture, names = architecture_of(config), list(checkpoint.entries)
    shapes = {name: entry.shape for name, (_, entry) in checkpoint.entries.items()}
    answer = ask_class(config, architecture, shapes)
    notes: list[str] = []
    by_major: dict[Major, ClassFacts] = {}
    asked = None
    if "error" not in answer:
        asked = from_answer(answer, config)
        if answer.get("left_out"):
            keys = ", ".join(answer["left_out"])
            notes.append(
                f"{asked.architecture} of {asked.source} refuses this configuration for {keys}; asked without it"
            )
        architecture = architecture or asked.architecture
        if 2 * len(asked.live) >= len(names) or "quantization_config" in config:
            by_major[4 if str(answer["version"]).startswith("4.") else 5] = asked
        else:  # names of another version: what this class would do with them says nothing about the model
            notes.append(f"{asked.architecture} of {asked.source} knows {len(asked.live)} of {len(names)} stored names")
            asked = None
    elif answer["error"] != "transformers is not installed":
        notes.append(f"the class {architecture or '(none named)'} could not be asked: {answer['error']}")
    for major in LOADERS:
        if major not in by_major and (facts := from_table(major, architecture, config, names)) is not None:
            by_major[major] = facts
    best = asked or by_major.get(5) or by_major.get(4)
    if best is None:
        best = from_convention(architecture, config, names)
        what = f"the class {architecture}" if architecture else "a configuration that names no class"
        notes.append(f"{what} is not known here: its ties are guessed from the usual names")
    return Known(best, by_major, tuple(notes))


def _classified(weight: Weight, facts: ClassFacts, config: Mapping[str, Any]) -> Weight:
    """Whether a stored tensor is a parameter: by the class if it was asked, by its name otherwise."""
    targets = facts.live.get(weight.name, ())
    if not facts.asked:
        if any(weight.name == ending or weight.name.endswith("." + ending) for ending in facts.buffers):
            return replace(weight, parameter=False, because=f"{facts.source}: a buffer of {facts.architecture}")
        return weight
    if any(name in facts.parameters for name in targets):
        return replace(weight, parameter=True, because=f"a parameter of {facts.architecture} ({facts.source})")
    if targets:
        return replace(weight, parameter=False, because=f"a buffer of {facts.architecture} ({facts.source})")
    parameter, because = by_convention(weight.name, weight.dtype, weight.shape)
    if parameter is not False and "quantization_config" in config:
        return replace(weight, parameter=None, because="one tensor of a quantised layer")
    if parameter is None:
        return weight
    ignored = f"{facts.architecture} of {facts.source} has no such tensor and ignores it"
    return replace(weight, parameter=False, because=because if parameter is False else ignored)


def declarations(known: Known, weights: Mapping[str, Weight]) -> tuple[list[Declaration], dict[str, Weight], list[str]]:
    """Class ties as declarations over stored names, with an absent weight for every member that is not stored."""
    found: list[Declaration] = []
    absent: dict[str, Weight] = {}
    notes: list[str] = []
    converted = {name for stored in known.best.converted for name in known.best.live.get(stored, ())}
    for tie in known.best.ties:
        if converted & set(tie.members):
            notes.append(f"{', '.join(tie.members)}: tied by the class, but stored in another layout; not compared")
            continue
        names = [known.best.stored_name(member) for member in tie.members]
        stored = [weights[make_id(name)] for name in names if make_id(name) in weights]
        if not stored:
            notes.append(f"none of {', '.join(names)} is stored: the file is incomplete for {known.best.architecture}")
            continue
        for name, live in zip(names, tie.members, strict=True):
            if make_id(name) not in weights:
                absent[make_id(name)] = _absent(name, live, stored[0], tie, known.best)
        found.append(_declaration(names, tie, known))
    return found, absent, notes


def _absent(name: str, live: str, like: Weight, tie: ClassTie, facts: ClassFacts) -> Weight:
    shape = facts.parameters.get(live, like.shape)
    because = f"tied by {facts.architecture} and not stored" if tie.active else "not stored, and not tied as configured"
    return Weight(make_id(name), name, shape, like.dtype, None, parameter=like.parameter, because=because)


def _declaration(names: list[str], tie: ClassTie, known: Known) -> Declaration:
    honoured, differing = [], []
    for major, loader in LOADERS.items():
        facts = known.by_major.get(major)
        if facts is None:  # a version that does not know the class restores nothing that it could be relied on for
            continue
        does = facts.makes_one(names)
        if does:
            honoured.append(loader)
        if does != tie.active:
            differing.append(
                f"{facts.source.removeprefix('the data file of ')} {'ties' if does else 'does not tie'} these"
            )
    return Declaration(
        members=tuple(make_id(name) for name in names),
        claimed_by=f"{known.best.architecture or 'convention'} ({known.best.source})",
        active=tie.active,
        restores=tie.active and LOADERS[5] in honoured,
        honoured_by=tuple(honoured),
        condition=f"{CONFIG}:{tie.flag}" if tie.flag else "",
        because="; but ".join((tie.because, *differing)),
    )


def _hints(facts: ClassFacts, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Role kinds by weight id, as the class itself answers."""
    hints: dict[str, str] = {}
    for kind, names in (
        ("output_head", facts.head),
        ("output_head_bias", facts.head_bias),
        ("token_embedding", facts.input),
    ):
        for name in names:
            hints.setdefault(make_id(facts.stored_name(name)), kind)
    embeddings = set(facts.input)
    for tie in facts.ties:  # copies of the table inside encoder and decoder are token embeddings too
        if embeddings & set(tie.members):
            for member in tie.members:
                hints.setdefault(make_id(facts.stored_name(member)), "token_embedding")
    heads = {make_id(facts.stored_name(name)) for name in facts.head_bias}
    for tie in facts.ties:
        ids = [make_id(facts.stored_name(member)) for member in tie.members]
        if heads & set(ids):
            for id in ids:
                hints.setdefault(id, "output_head_bias")
    for id, weight in weights.items():
        if weight.parameter is False:
            hints.setdefault(id, "buffer")
    return {id: kind for id, kind in hints.items() if id in weights}


def _dimensions(config: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """The integers of a configuration by dotted key, at most four levels deep."""
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth < 4:
            yield from _dimensions(value, f"{prefix}{key}.", depth + 1)


def flags(config: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, object]:
    """The tying flag by dotted key at every level that states it, at most four levels deep; whatever stands there."""
    found: dict[str, object] = {f"{prefix}{FLAG}": config[FLAG]} if FLAG in config else {}
    for key, value in config.items() if depth < 4 else ():
        if isinstance(value, Mapping):
            found |= flags(value, f"{prefix}{key}.", depth + 1)
    return found


def _unfilled(facts: ClassFacts, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Live parameters that no file and no tie fills, as absent weights that say why."""
    missing = sorted(
        name for name in set(facts.parameters) - _filled(facts) if make_id(facts.stored_name(name)) not in weights
    )
    like = next((weight.dtype for weight in weights.values() if weight.is_float and weight.parameter), "float32")
    found = {}
    for live in missing:
        name = facts.stored_name(live)
        because = (
            f"computed by {facts.architecture}, never stored" if live in facts.recomputed else "not stored, not tied"
        )
        found[make_id(name)] = Weight(
            make_id(name), name, facts.parameters[live], like, None, parameter=True, because=because
        )
    return found


def _filled(facts: ClassFacts) -> set[str]:
    """Live names that get a value from the files, directly or through an active tie."""
    filled = {name for targets in facts.live.values() for name in targets}
    for tie in facts.ties:
        if tie.active and filled & set(tie.members):
            filled |= set(tie.members)
    return filled


def _metadata(
    config: Mapping[str, Any], known: Known, checkpoint: Checkpoint, others: tuple[str, ...]
) -> dict[str, str]:
    facts = known.best
    found = {"model_type": str(config.get("model_type", "")), "architecture": facts.architecture}
    if facts.asked:
        found["transformers"] = facts.source.removeprefix("transformers ")
    else:
        found["transformers"] = f"not asked: {facts.source if facts.source != 'convention' else 'convention'}"
    found["data_files"] = ", ".join(str(table(major)["transformers"]) for major in sorted(LOADERS))
    if others:
        found["alternatives"] = ", ".join(others)
    for key, value in checkpoint.metadata.items():
        if key == "format":
            found["format"] = value
    stored = {name for targets in facts.live.values() for name in targets}
    as_built = all(
        facts.parameters.get(facts.live[name][0], entry.shape) == entry.shape
        for name, (_, entry) in checkpoint.entries.items()
        if name in facts.live and name not in facts.converted
    )
    doubled = any(len(stored & set(tie.members)) > 1 for tie in facts.ties if tie.active)
    if facts.n_parameters is not None and as_built and not doubled and "quantization_config" not in config:
        found["n_parameters_live"] = str(facts.n_parameters)
    return found
