"""Runners: execute a model in a child process and bring back its outputs. One file each.

A runner module is imported by the parent too, so it imports its runtime only inside functions; those functions run
in the child (`sandbox.py`), where a crash, an endless loop or a memory hog is a result and not our crash.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import NDArray

from tieaudit.errors import MissingPackage

Array = NDArray[Any]
Params = Mapping[str, Any]
"""What JSON can hold."""
Answer = tuple[dict[str, Any], dict[str, Array]]
"""JSON-able facts, and arrays by name."""
Verb = Callable[[Params, Mapping[str, Array]], Answer]


@dataclass(frozen=True)
class Port:
    """One input or output of a model."""

    name: str
    dtype: str
    """Canonical element type; empty for what is no dense tensor (sequences, maps, optionals)."""
    dims: tuple[int | str | None, ...]
    """Sizes; a symbol's name where the size is free, None where it is free and unnamed."""
    limit: int | None = None
    """For ids: how many there are, so that valid ids are 0 … limit − 1."""


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, in its own order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ranges: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Symbol of a free size → the least and the largest one that the model takes, where it says so."""

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """The signature that `to_json` wrote."""
        inputs, outputs = (
            tuple(Port(p["name"], p["dtype"], tuple(p["dims"]), p.get("limit")) for p in value[side])
            for side in ("inputs", "outputs")
        )
        ranges = {symbol: (least, most) for symbol, (least, most) in value.get("ranges", {}).items()}
        return cls(inputs, outputs, ranges)


@dataclass(frozen=True)
class Runner:
    """One runtime.

    Verbs that every runner has: `hello` → versions and devices; `open` → a handle and the signature; `run` → outputs
    by name; `time` → seconds per run; `close`. Others belong to one runner.
    """

    name: str
    title: str
    """Its name in a sentence."""
    formats: tuple[str, ...]
    """Names of the formats it runs."""
    packages: tuple[str, ...]
    """What must be importable."""
    extra: str
    """The extra of tieaudit that brings them."""
    start: Callable[[str], Mapping[str, Verb]]
    """Called in the child with the device (`cpu` or `cuda`): the verbs, sharing one set of open models."""

    def available(self) -> str | None:
        """Why it cannot run here, or None. Imports nothing."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return str(MissingPackage(package, self.extra, "running this model"))
        return None
