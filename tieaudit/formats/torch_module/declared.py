"""What the transformers classes inside a live module declare to be one, asked as for a folder, on the meta device.

The class and its configuration are those of the live object, so that code from a repository that the user has loaded
answers, too. Which names it makes one object as configured, with its flag on and with it off is tried on torch's meta
device (`huggingface/ask.py`), whatever spelling of `_tied_weights_keys` the installed version has.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tieaudit.model import Declaration, Weight, make_id

if TYPE_CHECKING:
    import torch

    from tieaudit.formats.huggingface.facts import ClassFacts

FLAG = "tie_word_embeddings"
SECONDS = 5.0
"""For the variants of a configuration; the twin of a model of 1,000 layers alone takes longer than a scan should."""


@dataclass(frozen=True)
class Declared:
    """What the classes said."""

    declarations: tuple[Declaration, ...] = ()
    version: str = ""
    """Of transformers, if all were asked; `not asked: convention` if one gave no answer; empty without such a class."""
    notes: tuple[str, ...] = ()


def declared(module: torch.nn.Module, weights: Mapping[str, Weight]) -> Declared:
    """Declarations over the names of the live module. Nothing where it holds no class of transformers.

    `weights`: by id. Members that the module does not hold under the class's name (an adapter took their place) are
    left out. Cost: up to `2 + 2·levels` constructions of the class on the meta device, `SECONDS` for all but the first.
    """
    found: list[Declaration] = []
    notes: list[str] = []
    version = ""
    for prefix, one in _classes(module):
        try:
            said = _said(prefix, one, weights)
        except Exception as error:  # whatever a foreign class raises while it is built
            said, version = (), _UNKNOWN
            why = " ".join(str(error).split())[:200]
            notes.append(
                f"the class {type(one).__name__} could not be asked which ties it declares: "
                f"{type(error).__name__}: {why}"
            )
        found.extend(said)
        version = version or str(sys.modules["transformers"].__version__)
    return Declared(tuple(found), version, tuple(notes))


_UNKNOWN = "not asked: convention"


def _classes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models in a module, with the dotted path of each; imports nothing."""
    library = sys.modules.get("transformers.modeling_utils")  # without it no such object can exist
    if library is None:
        return
    inside: list[str] = []
    for path, one in module.named_modules():
        if isinstance(one, library.PreTrainedModel) and not any(path.startswith(outer) for outer in inside):
            inside.append(f"{path}." if path else "")
            yield inside[-1], one


def _said(prefix: str, one: Any, weights: Mapping[str, Weight]) -> tuple[Declaration, ...]:
    from tieaudit.formats.huggingface.ask import plain_config
    from tieaudit.formats.huggingface.defaults import Major, from_table
    from tieaudit.formats.huggingface.read import Known, declarations

    config = plain_config(one.config.to_dict())
    facts = _present(_facts(one, config), prefix, weights)
    major: Major = 4 if facts.source.startswith("transformers 4.") else 5
    other: Major = 5 if major == 4 else 4
    by_major = {major: facts}
    elsewhere = from_table(other, type(one).__name__, config, facts.live)
    if elsewhere is not None:
        by_major[other] = elsewhere
    own = {make_id(name): weights[make_id(prefix + name)] for name in facts.live if make_id(prefix + name) in weights}
    said, _, _ = declarations(Known(facts, by_major, ()), own)
    names = {make_id(name): make_id(prefix + name) for name in facts.live}
    return tuple(
        replace(
            claim,
            members=tuple(names[id] for id in claim.members),
            condition=claim.condition.replace("config.json:", "config."),
        )
        for claim in said
    )


def _facts(one: Any, config: dict[str, Any]) -> ClassFacts:
    """The answer of the class, as the child process gives it for a folder; live names are stored as such."""
    import torch
    import transformers

    from tieaudit.formats.huggingface.ask import build, flag_levels, ties
    from tieaudit.formats.huggingface.facts import from_answer

    kind, copies = type(one), _Copies(one.config)
    flags = _flags(one.config, flag_levels(one.config))
    with torch.no_grad():
        made = ties(kind, copies, flags, build(kind, copies, flags), seconds=SECONDS)
    names = [name for name, _ in one.named_parameters(remove_duplicate=False)]
    answer = {
        "version": transformers.__version__,
        "class": kind.__name__,
        "names": {name: [name] for name in names},
        "parameters": {name: list(p.shape) for name, p in one.named_parameters(remove_duplicate=False)},
        "n_parameters": sum(p.numel() for p in one.parameters()),
        **dict.fromkeys(("converted", "buffers", "input", "head", "head_bias", "recomputed"), ()),
        "saved": {},
        **made,
    }
    return from_answer(answer, config)


@dataclass(frozen=True)
class _Copies:
    """Stands for the class of a configuration: what it makes is the live object again, with the flags of a dict.

    Read back from its own dictionary a live configuration may not pass the checks of its class.
    """

    live: Any

    def from_dict(self, flags: dict[str, Any]) -> Any:
        copied = copy.deepcopy(self.live)
        if hasattr(copied, "quantization_config"):
            del copied.quantization_config
        _switch(copied, flags)
        return copied


def _switch(config: Any, flags: Mapping[str, Any]) -> None:
    for key, value in flags.items():
        if isinstance(value, Mapping):
            _switch(getattr(config, key), value)
        else:
            setattr(config, key, value)


def _flags(config: Any, levels: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """What a configuration itself says about tying, at every level that says anything."""
    found: dict[str, Any] = {}
    for path in levels:
        inner, place = config, found
        for key in path:
            inner, place = getattr(inner, key), place.setdefault(key, {})
        if FLAG in vars(inner):
            place[FLAG] = vars(inner)[FLAG]
    return found


def _present(facts: ClassFacts, prefix: str, weights: Mapping[str, Weight]) -> ClassFacts:
    """The ties between names that the module holds."""
    found = []
    for tie in facts.ties:
        members = tuple(name for name in tie.members if make_id(prefix + name) in weights)
        if len(members) > 1:
            found.append(replace(tie, members=members))
    return replace(facts, ties=tuple(found))
