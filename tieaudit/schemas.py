"""JSON Schemas of what every command but scan prints, made from the nouns themselves so that they cannot disagree."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from tieaudit.change import Plan, Proof
from tieaudit.comparison import Choice
from tieaudit.difference import Told
from tieaudit.storage import Storage
from tieaudit.survival.ties import Survived
from tieaudit.view import View

COMMANDS: Mapping[str, Mapping[str, type]] = {
    "plan": {"plan": Plan, "choices": tuple[Choice, ...]},
    "apply": {"plan": Plan, "proof": Proof, "output": str, "receipt": str},
    "verify": {"before": str, "after": str, "proof": Proof},
    "diff": {"before": str, "after": str, "told": tuple[Told, ...], "counts": Mapping[str, int], "n_bytes_read": int},
    "survival": {"model": str, "ties": tuple[tuple[str, ...], ...], "rows": tuple[Survived, ...]},
    "receipt-check": {"receipt": str, "problems": tuple[str, ...]},
    "undo": {"receipt": str, "removed": tuple[str, ...]},
}
_SPELT = {"survival": "verify --survival", "receipt-check": "verify --receipt", "undo": "apply --undo"}
"""How a document is asked for, where it has not the name of its command."""

PER_SIDE: Mapping[str, Any] = {
    "n_bytes_stored": int,
    "n_bytes_optimised": int,
    "n_bytes_resident": int,
    "n_bytes_process_peak": int,
    "n_bytes_device_peak": int,
    "seconds_per_run": float,
    "seconds_per_run_quartiles": tuple[float, float],
    "n_runs": int,
    "operations": Mapping[str, int],
}
"""Facts of a proof that come twice, with `_before` and `_after`."""
FACTS: Mapping[str, Any] = {
    "runs_on": str,
    "time_differs": bool,
    "not_deterministic": tuple[str, ...],
    "spread_of_the_original": float,
    "moved": Mapping[str, float],
    "loss": Mapping[str, float],
    "loss_not_measured": str,
    "folded_apart_by_the_runtime": str,
    "held_in_a_wider_type_by_the_runtime": str,
    "n_bytes_peak_writing": int,
    "n_bytes_peak_verifying": int,
    "n_bytes_peak_running": int,
    "onnxruntime": str,
    "numpy": str,
    "torch": str,
    "transformers": str,
    "cuda": str,
}
"""The others."""


def schemas() -> dict[str, str]:
    """File name → text of the schema of every command but scan, whose contract is written by hand."""
    return {f"schema/{name}-1.schema.json": _text(name, fields) for name, fields in COMMANDS.items()}


def _text(command: str, fields: Mapping[str, type]) -> str:
    nouns: dict[str, Any] = {}
    spelt = _SPELT.get(command, command)
    tool = {"type": "object", "properties": {"name": {"const": "tieaudit"}, "version": {"type": "string"}}}
    content = {name: _of(kind, nouns) for name, kind in fields.items()}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://tieaudit.invalid/schema/{command}-1.schema.json",
        "title": f"tieaudit {spelt}, version 1",
        "description": f"What `tieaudit {spelt} --format json` prints. Additive only. Made by tools/make_docs.py.",
        "type": "object",
        "properties": {"schema": {"const": f"tieaudit/{command}/1"}, "tool": tool, **content},
        "required": ["schema", "tool", *fields],
        "$defs": dict(sorted(nouns.items())),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _of(kind: Any, nouns: dict[str, Any]) -> dict[str, Any]:
    """The schema of one annotation, as `tieaudit.plain` writes its values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is View:
        return {"type": "string"}
    if kind is Storage:
        return {"type": "object", "properties": {"n_bytes": {"type": "integer"}}, "required": ["n_bytes"]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of(one, nouns) for one in arguments]}
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": _of(arguments[0], nouns)}
        return {"type": "array", "prefixItems": [_of(one, nouns) for one in arguments], "minItems": len(arguments)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object"}
    if dataclasses.is_dataclass(kind):
        return _noun(kind, nouns)
    # a float that is no number (infinite, NaN) is written as a string: JSON has none
    scalars: dict[Any, dict[str, Any]] = {
        str: {"type": "string"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": ["number", "string"]},
        type(None): {"type": "null"},
    }
    return scalars[kind]


def _noun(kind: Any, nouns: dict[str, Any]) -> dict[str, Any]:
    if kind.__name__ not in nouns:
        nouns[kind.__name__] = {}  # taken, in case it refers to itself
        hints = typing.get_type_hints(kind)
        fields = {field.name: _of(hints[field.name], nouns) for field in dataclasses.fields(kind)}
        if kind is Proof:
            fields["facts"] = _facts(nouns)
        nouns[kind.__name__] = {
            "type": "object",
            "properties": {"kind": {"const": kind.__name__}, **fields},
            "required": ["kind", *fields],
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _facts(nouns: dict[str, Any]) -> dict[str, Any]:
    """What was measured; each only where it was. Facts of one part of several end in its name, ` (part)`."""
    per_side = {f"{name}_{side}": _of(kind, nouns) for name, kind in PER_SIDE.items() for side in ("before", "after")}
    known = {**per_side, **{name: _of(kind, nouns) for name, kind in FACTS.items()}}
    on_gpu = {name: known[name] for name in (*per_side, "runs_on", "time_differs")}
    return {"type": "object", "properties": {**known, "on_cuda": {"type": "object", "properties": on_gpu}}}
