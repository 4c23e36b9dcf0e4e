"""What is known about a model class: the one noun that the live class, the data files and plain convention all fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tieaudit.model import UNWRITTEN

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class ClassTie:
    """One group of parameters that a class makes one."""

    members: tuple[str, ...]
    """Live names, the one that saving keeps first."""
    active: bool
    """Whether it is made with this configuration."""
    flag: str
    """Dotted key in config.json that switches it; empty where the class ties it whatever the configuration says."""
    because: str


@dataclass(frozen=True)
class ClassFacts:
    """A class as one version of transformers has it, for one configuration and one set of stored names."""

    source: str
    """Who says so, for the user: `transformers 5.23.0`, `the data file of transformers 5.23.0`, `convention`."""
    asked: bool
    """Whether the installed class itself answered; otherwise parameters and shapes are not known."""
    architecture: str
    live: Mapping[str, tuple[str, ...]]
    """Stored name → names in the live model; a stored name that is missing here is ignored by the loader."""
    ties: tuple[ClassTie, ...]
    converted: frozenset[str] = frozenset()
    """Stored names that loading fuses, splits or permutes: no live parameter equals them byte for byte."""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Live names and shapes of parameters, every name of a shared one."""
    buffers: frozenset[str] = frozenset()
    """Live names of buffers that are stored, or (from a data file) endings of their names."""
    input: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_bias: tuple[str, ...] = ()
    saved: Mapping[str, str] = field(default_factory=dict)
    """Live name → the name that saving would give it, where it differs."""
    recomputed: frozenset[str] = frozenset()
    """Live names of parameters that are never stored, because the class computes them."""
    n_parameters: int | None = None
    """Of the live model, shared ones counted once."""

    def stored_name(self, live: str) -> str:
        """The name under which a live one is stored or would be stored."""
        return self._stored.get(live) or self.saved.get(live, live)

    def makes_one(self, names: Sequence[str]) -> bool:
        """Whether one active tie holds all these names, which are spelt as they are stored."""
        return any(set(names) <= members for members in self._active.get(names[0], ()))

    @cached_property
    def _active(self) -> Mapping[str, list[frozenset[str]]]:
        found: dict[str, list[frozenset[str]]] = {}
        for tie in self.ties:
            if tie.active:
                members = frozenset(self.stored_name(live) for live in tie.members)
                for name in members:
                    found.setdefault(name, []).append(members)
        return found

    @cached_property
    def _stored(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for stored, targets in self.live.items():
            if stored not in self.converted and len(targets) == 1:
                found.setdefault(targets[0], stored)
        return found


def from_answer(answer: Mapping[str, Any], config: Mapping[str, Any]) -> ClassFacts:
    """The answer of the child process as facts."""
    version = str(answer["version"])
    return ClassFacts(
        source=f"transformers {version}",
        asked=True,
        architecture=str(answer["class"]),
        live={stored: tuple(targets) for stored, targets in answer["names"].items()},
        ties=tuple(_ties(answer, config, version)),
        converted=frozenset(answer["converted"]),
        parameters={name: tuple(shape) for name, shape in answer["parameters"].items()},
        buffers=frozenset(answer["buffers"]),
        input=tuple(answer["input"]),
        head=tuple(answer["head"]),
        head_bias=tuple(answer["head_bias"]),
        saved=dict(answer["saved"]),
        recomputed=frozenset(answer["recomputed"]),
        n_parameters=int(answer["n_parameters"]),
    )


def _ties(answer: Mapping[str, Any], config: Mapping[str, Any], version: str) -> list[ClassTie]:
    """Every group that is tied now or that some flag would tie, with the flag that decides."""
    now, always = answer["groups"], answer["off"] or []
    candidates: list[list[str]] = []
    for groups in (answer["on"], *(level["on"] for level in answer["levels"].values()), now, always):
        for group in groups or []:
            if not any(set(group) <= set(known) for known in candidates):
                candidates.append(group)
    found = []
    for group in candidates:
        active = _among(group, now)
        found.append(_tie(group, active, answer, config, version))
        if not active:  # a flag would add members to what is tied anyway: that smaller group is a tie of its own
            inner = [smaller for smaller in now if set(smaller) < set(group)]
            found.extend(_tie(smaller, True, answer, config, version) for smaller in inner)
    return found


def _among(group: list[str], groups: list[list[str]] | None) -> bool:
    return any(set(group) <= set(other) for other in groups or [])


def _tie(
    group: list[str], active: bool, answer: Mapping[str, Any], config: Mapping[str, Any], version: str
) -> ClassTie:
    name = f"{answer['class']} of transformers {version}"
    if _among(group, answer["off"]):
        return ClassTie(tuple(group), active, "", f"{name} ties these whatever {FLAG} says")
    for path, level in answer["levels"].items():
        changed = level["off"] if active else level["on"]
        if changed is not None and _among(group, changed) != active:
            key = f"{path}.{FLAG}" if path else FLAG
            return ClassTie(tuple(group), active, key, f"{name} reads {key}: {said(config, key, level['value'])}")
    if answer["levels"]:
        return ClassTie(tuple(group), active, "", f"{name} decides by several keys together")
    return ClassTie(tuple(group), active, "", f"{name} ties these")


def lookup(config: Mapping[str, Any], key: str) -> object:
    """The value under a dotted key, None where it is absent."""
    value: object = config
    for field_name in key.split("."):
        value = value.get(field_name) if isinstance(value, Mapping) else None
    return value


def said(config: Mapping[str, Any], key: str, value: object) -> str:
    """What the file says under the key, or that it says nothing and what then holds."""
    written = lookup(config, key)
    if isinstance(written, bool):
        return str(written).lower()
    default = str(value).lower() if isinstance(value, bool) else "no such attribute, which reads as false"
    return f"{UNWRITTEN}, the class default is {default}"
