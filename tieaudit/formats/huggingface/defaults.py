"""The data files `ties_v4.json` and `ties_v5.json`: what every class ties, for when no transformers can be asked.

They are written by `tools/make_tie_defaults.py` out of an installed transformers; see there for their form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from tieaudit.formats.huggingface.facts import FLAG, ClassFacts, ClassTie, lookup, said
from tieaudit.model import UNWRITTEN

Major = Literal[4, 5]


@cache
def table(major: Major) -> Mapping[str, Any]:
    """One data file: {"transformers": version, "types": …, "classes": …, "failed": …}."""
    text = files("tieaudit.formats.huggingface").joinpath(f"ties_v{major}.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


def from_table(major: Major, architecture: str, config: Mapping[str, Any], stored: Iterable[str]) -> ClassFacts | None:
    """What the data file says about a class, in names that fit the stored ones; None if it does not know the class."""
    data = table(major)
    entry = data["classes"].get(architecture)
    if entry is None:
        return None
    names = list(stored)
    source = f"the data file of transformers {data['transformers']}"
    named = config.get("model_type")  # whatever the file holds there, a list for one
    flags = data["types"].get(named if isinstance(named, str) else None, data["types"].get(entry["type"], {}))
    spell = Spelling(entry["prefix"], names, entry.get("saved", {}))
    ties = []
    for tie in entry.get("ties", ()):
        active, because = _active(tie["flag"], config, flags, f"{architecture} of transformers {data['transformers']}")
        for members in _instances(tie, spell):
            ties.append(ClassTie(members, active, tie["flag"] or "", because))
    ties = _outermost(ties)

    def expand(patterns: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for pattern in patterns for name in spell.matching(pattern) or [spell.live(pattern)])

    return ClassFacts(
        source=source,
        asked=False,
        architecture=architecture,
        live={name: (name,) for name in names},
        ties=tuple(ties),
        buffers=frozenset(entry.get("buffers", ())),
        input=expand(entry.get("input", ())),
        head=expand(entry.get("head", ())),
        head_bias=expand(entry.get("head_bias", ())),
    )


def _active(flag: str | None, config: Mapping[str, Any], flags: Mapping[str, Any], name: str) -> tuple[bool, str]:
    if flag is None:
        return True, f"{name} ties these whatever {FLAG} says"
    default = flags.get(flag.removesuffix(FLAG).removesuffix("."))
    written = lookup(config, flag)
    value = written if isinstance(written, bool) else default
    return value is True, f"{name} reads {flag}: {said(config, flag, default)}"


def _outermost(ties: list[ClassTie]) -> list[ClassTie]:
    """Without those whose members a larger active tie makes one anyway. A checkpoint may hold thousands of them."""
    larger: dict[str, list[frozenset[str]]] = {}
    for tie in ties:
        if tie.active:
            members = frozenset(tie.members)
            for name in members:
                larger.setdefault(name, []).append(members)
    return [tie for tie in ties if not any(set(tie.members) < one for one in larger.get(tie.members[0], ()))]


class Spelling:
    """Live patterns of a class against stored names, which may carry the base model's prefix or not."""

    def __init__(self, prefix: str, names: list[str], saved: Mapping[str, str]) -> None:
        self.prefix = f"{prefix}." if prefix else ""
        self.saved: Mapping[str, str] = {}
        self.names = names
        self.known = set(names)
        bare = self.prefix and not any(name.startswith(self.prefix) for name in names)
        self.bare = bool(bare)
        if saved and not any(self.matching(pattern) for pattern in saved):
            self.saved = saved  # names as this version saves them, which older checkpoints have too

    def live(self, pattern: str) -> str:
        """A pattern in the spelling of this checkpoint."""
        pattern = self.saved.get(pattern, pattern)
        if self.bare and pattern.startswith(self.prefix):
            return pattern[len(self.prefix) :]
        return pattern

    def matching(self, pattern: str) -> list[str]:
        """Stored names of a pattern, in their order."""
        spelled = self.live(pattern)
        if "*" not in spelled:
            return [spelled] if spelled in self.known else []
        regex = re.compile(re.escape(spelled).replace(r"\*", r"(\d+)"))
        return [name for name in self.names if regex.fullmatch(name)]

    def indices(self, pattern: str) -> set[tuple[str, ...]]:
        regex = re.compile(re.escape(self.live(pattern)).replace(r"\*", r"(\d+)"))
        return {match.groups() for name in self.names if (match := regex.fullmatch(name))}


def _instances(tie: Mapping[str, Any], spell: Spelling) -> Iterable[tuple[str, ...]]:
    """A generalised group → groups of names: one for each index, or all indices together."""
    patterns: list[str] = tie["members"]
    if tie.get("across"):
        members = tuple(name for pattern in patterns for name in spell.matching(pattern))
        return [members] if len(members) > 1 else []
    indices = sorted({index for pattern in patterns for index in spell.indices(pattern)})
    return [tuple(_filled(spell.live(pattern), index) for pattern in patterns) for index in indices]


def _filled(pattern: str, index: tuple[str, ...]) -> str:
    for number in index:
        pattern = pattern.replace("*", number, 1)
    return pattern


CONVENTIONAL = (
    ("transformer.wte.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("embed_tokens.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("shared.weight", "lm_head.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
)
"""(embedding, head) of the spellings that nearly every class follows."""


_NO_FLAG = f"{FLAG} is {UNWRITTEN}, and the class is not known here, nor what it does without"


def from_convention(architecture: str, config: Mapping[str, Any], stored: Iterable[str]) -> ClassFacts:
    """Without class and data: the usual names, tied if the flag says so (without a flag: not known, so not tied)."""
    names = set(stored)
    key = next((k for k in (FLAG, f"text_config.{FLAG}") if isinstance(lookup(config, k), bool)), "")
    active = lookup(config, key) is True if key else False
    because = f"by convention: config.json says {key}: {str(active).lower()}" if key else _NO_FLAG
    ties: list[ClassTie] = []
    head: tuple[str, ...] = ()
    for table_name, head_name in CONVENTIONAL:
        if table_name in names and (key or head_name in names):
            ties = [ClassTie((table_name, head_name), active, key or FLAG, because)]
            head = (head_name,)
            break
    return ClassFacts(
        "convention",
        False,
        architecture,
        {name: (name,) for name in names},
        tuple(ties),
        input=(ties[0].members[0],) if ties else (),
        head=head,
    )
