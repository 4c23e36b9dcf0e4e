"""The child process that builds a module with the user's own factory and answers questions about it.

`package.module` is imported with the folder we stand in searched first; torch and tieaudit are imported before, so
that a file of that name there does not take their place. See `factory.py` for the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tieaudit.errors import TieAuditError, UnreadableModel
from tieaudit.view import Transpose

if TYPE_CHECKING:
    from tieaudit.model import Model, Use


def main() -> None:
    """Answer questions until standard input ends. Whatever the factory prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    model: Model | None = None
    for line in sys.stdin:
        question, data = json.loads(line), b""
        try:
            if "describe" in question:
                from tieaudit.formats.torch_module.read import read_module

                module, inputs = built(question["describe"])
                if question.get("inputs"):
                    inputs = _stored(question["inputs"], module)
                traced = not question.get("untraced")
                model = read_module(module, inputs, path=question["describe"], whole=True, traced=traced)
                answer: dict[str, Any] = _described(model)
            else:
                data = _read(model, question)
                answer = {}
        except TieAuditError as error:
            answer = {"error": error.message.removeprefix(f"{question.get('describe')}: "), "hint": error.hint}
        answers.write(json.dumps({**answer, "n_bytes": len(data)}).encode() + b"\n" + data)
        answers.flush()


def built(name: str) -> tuple[Any, Any]:
    """The module that `package.module:factory` makes, and its sample inputs or None. Runs the user's code.

    The seeds of torch, numpy and random are 0 before it is imported and called, so that every process builds the same
    weights. UnreadableModel for whatever that code raises, `sys.exit` included.
    """
    import torch

    _seed()
    kind = torch.get_default_dtype()
    where, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(where)
        for one in attribute.split("."):
            found = getattr(found, one)
        _seed()
        if callable(found) and not isinstance(found, torch.nn.Module):
            found = found()
    except (Exception, SystemExit) as error:  # it is not our code
        said = " ".join(str(error).split())[:300]
        raise UnreadableModel(f"{name}: the factory failed: {type(error).__name__}: {said}") from error
    finally:
        torch.set_default_dtype(kind)  # the next factory in this process may expect the usual one
    inputs = None
    if isinstance(found, tuple) and len(found) == 2:
        found, inputs = found
    if not isinstance(found, torch.nn.Module):
        raise UnreadableModel(
            f"{name}: expected an nn.Module, or a pair of one and its sample inputs, found a {type(found).__name__}"
        )
    return found, inputs


def _stored(path: str, module: Any) -> Any:
    """Arrays of an .npz as arguments: by position where numpy named them itself, else by name."""
    import numpy as np
    import torch

    first = next(iter(module.parameters()), None)
    device = first.device if first is not None else torch.device("cpu")
    with np.load(path, allow_pickle=False) as file:
        tensors = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
    numbered = [f"arr_{index}" for index in range(len(tensors))]
    return tuple(tensors[name] for name in numbered) if set(tensors) == set(numbered) else tensors


def _seed() -> None:
    import random

    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _read(model: Model | None, question: Mapping[str, Any]) -> bytes:
    storage = model.weights[question["read"]].storage if model is not None else None
    if storage is None:
        raise UnreadableModel("nothing was built yet")
    return b"".join(storage.read_ranges([(begin, length) for begin, length in question["ranges"]]))


def _described(model: Model) -> dict[str, Any]:
    return {
        "weights": [
            {
                "id": weight.id,
                "name": weight.name,
                "shape": list(weight.shape),
                "dtype": weight.dtype,
                "parameter": weight.parameter,
                "because": weight.because,
                "region": list(weight.storage.region) if weight.storage is not None else [],
                "n_bytes": weight.n_bytes,
                "strides": getattr(weight.storage, "strides", None),
                "no_values": getattr(weight.storage, "no_values", ""),
            }
            for weight in model.weights
        ],
        "uses": [_use(use) for use in model.uses],
        "declarations": [asdict(claim) for claim in model.declarations],
        "hints": dict(model.hints),
        "metadata": dict(model.metadata),
        "notes": list(model.notes),
    }


def _use(use: Use) -> dict[str, Any]:
    perms = [list(step.perm) for step in use.view.steps if isinstance(step, Transpose)]
    return {
        "weight": use.weight, "op": use.op, "node": use.node, "slot": use.slot, "chain": list(use.chain),
        "perms": perms, "call": list(use.call),
    }  # fmt: skip
