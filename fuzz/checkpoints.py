"""The reader of PyTorch checkpoints against PyTorch itself: names, shapes and bytes of what both read."""

from __future__ import annotations

import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fuzz.guard import Violation, folder, guarded
from tieaudit.errors import TieAuditError
from tieaudit.model import Model

_N_MOST_READ = 1 << 20
_LOOKED_UP: list[str] = []


def _see(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class" and _WATCHING:
        _LOOKED_UP.append(".".join(map(str, arguments)))


_WATCHING: list[bool] = []


@contextmanager
def _no_class_looked_up() -> Iterator[None]:
    """While this lasts nothing that a pickle names may be looked up, let alone called."""
    if not _HOOKED:
        sys.addaudithook(_see)  # hooks cannot be removed, so there is one
        _HOOKED.append(True)
    _LOOKED_UP.clear()
    _WATCHING.append(True)
    try:
        yield
    finally:
        _WATCHING.clear()
    if _LOOKED_UP:
        raise Violation(f"looked up {_LOOKED_UP[0]}")


_HOOKED: list[bool] = []


def check(data: bytes, said_in_one_line: Callable[[TieAuditError], str]) -> None:
    """Read or refused in one line, nothing of it executed; what is read has its bytes, and those that PyTorch reads."""
    from tieaudit.formats.torch_checkpoint.discover import owns
    from tieaudit.formats.torch_checkpoint.read import load

    with folder() as home:
        path = home / "m.pt"
        path.write_bytes(data)
        models: list[Model] = []
        with guarded(home), _no_class_looked_up():
            owns(path)
            for key in ("", "."):
                try:
                    models.append(load(path, (path,), key))
                except TieAuditError as error:
                    said_in_one_line(error)
            for model in models:
                _check_bytes(model)
        if models:
            _same_as_torch(models[-1], data)


def _check_bytes(model: Model) -> None:
    for weight in model.weights:
        if weight.storage is None or weight.n_bytes > _N_MOST_READ:
            continue
        try:
            (found,) = weight.storage.read_ranges([(0, weight.n_bytes)])
        except TieAuditError:
            continue
        if len(found) != weight.n_bytes:
            raise Violation(f"{weight.name}: {len(found)} bytes read of {weight.n_bytes}")


def _same_as_torch(model: Model, data: bytes) -> None:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # it refuses more than we do: placeholders, for one
        return
    ours = {weight.name: weight for weight in model.weights}
    for name, tensor in _named(loaded, "", set()):
        weight = ours.get(name)
        if weight is None or weight.storage is None or tensor.layout != torch.strided or tensor.is_quantized:
            continue
        if tuple(tensor.shape) != weight.shape:
            raise Violation(f"{name}: shape {weight.shape}, torch has {list(tensor.shape)}")
        if tensor.numel() * tensor.element_size() != weight.n_bytes or weight.n_bytes > _N_MOST_READ:
            continue
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
        wanted = bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
        try:
            (found,) = weight.storage.read_ranges([(0, weight.n_bytes)])
        except TieAuditError:
            continue
        if found != wanted:
            raise Violation(f"{name}: other bytes than torch's")


def _named(value: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Tensors of dicts with text keys by their dotted names. A pickle may hold itself."""
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict) and id(value) not in seen and len(prefix) < 200:
        seen.add(id(value))
        for key, inner in value.items():
            if isinstance(key, str) and key and "." not in key:
                yield from _named(inner, f"{prefix}.{key}" if prefix else key, seen)


def seeds() -> Iterator[bytes]:
    """Files that PyTorch writes: one for each layout and construct; none where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tied = {"embed": table, "head": table, "turned": table.T, "part": table[:2], "own": table.clone()}
    kinds = {str(kind): torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)}
    module = torch.nn.Linear(2, 2)
    trained = {
        "state_dict": module.state_dict(),
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
    }
    for value in (
        tied,
        kinds,
        trained,
        module,
        [table, (table,)],
        {"p": torch.nn.Parameter(table)},
        {"shape": table.shape},
    ):
        for new in (True, False):
            out = io.BytesIO()
            torch.save(value, out, _use_new_zipfile_serialization=new)
            yield out.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = io.BytesIO()
        torch.jit.save(torch.jit.script(module), out)
    yield out.getvalue()
