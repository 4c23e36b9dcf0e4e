"""Operations that leave the module behind: exported programs, ONNX, and what ONNX Runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.compare import comparable, digest
from tieaudit.formats.torch_module.read import read_module
from tieaudit.formats.torch_module.uses import arguments
from tieaudit.survival.ties import NotRun, Operation, Outcome, TiedNames, Trial, judged, judged_module
from tieaudit.view import AS_STORED, TRANSPOSED

if TYPE_CHECKING:
    import torch

    from tieaudit.model import Model, Weight

_NO_INPUTS = "sample inputs are needed: give inputs=…, or let the factory return (module, inputs)"


def _exported(module: torch.nn.Module, trial: Trial) -> Any:
    import torch

    if trial.inputs is None:
        raise NotRun(_NO_INPUTS)
    args, kwargs = arguments(trial.inputs)
    return torch.export.export(module.eval(), args, kwargs)


def _export(trial: Trial) -> tuple[Outcome, str]:
    return judged(trial.ties, _exported(trial.twin(), trial).state_dict, objects=False)


def _export_module(trial: Trial) -> tuple[Outcome, str]:
    import torch

    torch.export.save(_exported(trial.twin(), trial), trial.folder / "program.pt2")
    return judged_module(trial, torch.export.load(trial.folder / "program.pt2").module())


def _onnx_file(trial: Trial) -> tuple[Model, Path]:
    """The exported file, and the model whose values it holds: random ones, so that only ties are equal."""
    import torch

    if trial.inputs is None:
        raise NotRun(_NO_INPUTS)
    module = trial.twin(distinct=True).eval()
    args, kwargs = arguments(trial.inputs)
    path = trial.folder / "model.onnx"
    torch.onnx.export(module, args, path, kwargs=kwargs, dynamo=True, verbose=False)
    return read_module(module), path


def _onnx(trial: Trial) -> tuple[Outcome, str]:
    from tieaudit.load import load_one

    source, path = _onnx_file(trial)
    stored = load_one(path)
    return _counted(trial.ties, {tie.names[0]: _copies(source.by_id[tie.names[0]], stored) for tie in _floats(trial)})


def _floats(trial: Trial) -> tuple[TiedNames, ...]:
    """Ties that values can show: floating-point matrices; vectors of an export are often folded into others."""
    from tieaudit.formats.torch_module.read import held

    shown = {one.name for one in held(trial.module) if one.tensor.is_floating_point() and one.tensor.dim() == 2}
    found = tuple(tie for tie in trial.ties if tie.names[0] in shown)
    if not found:
        raise NotRun("no tied matrix whose copies could be counted")
    return found


def _copies(weight: Weight, model: Model) -> int:
    """How many stored tensors of a model hold these values, as they are or transposed."""
    wanted = {digest(weight)}
    regions = set()
    for other in model.weights:
        same_kind = other.dtype == weight.dtype and sorted(other.shape) == sorted(weight.shape)
        if other.storage is None or not same_kind:
            continue
        views = [AS_STORED, *([TRANSPOSED] if comparable(other.dtype, TRANSPOSED) else [])]
        if any(digest(other, view) in wanted for view in views):
            regions.add(other.storage.region)
    return len(regions)


def _counted(ties: tuple[TiedNames, ...], copies: dict[str, int]) -> tuple[Outcome, str]:
    several = {name: count for name, count in copies.items() if count > 1}
    absent = [name for name, count in copies.items() if count == 0]
    if several:
        name, count = next(iter(several.items()))
        return "lost", f"{name} is stored {count} times ({len(several)} of {len(copies)} tied matrices)"
    if absent:
        return "error", f"no tensor of the result holds the values of {absent[0]}: they were folded into others"
    return "kept", f"{len(copies)} tied matrices are stored once"


def _optimised(trial: Trial) -> tuple[Outcome, str]:
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        raise NotRun("the package onnxruntime is not installed")
    from tieaudit.registry import discover
    from tieaudit.runners import Runner
    from tieaudit.sandbox import Sandbox
    from tieaudit.storage import blocks

    source, path = _onnx_file(trial)
    watch = {}
    for number, tie in enumerate(_floats(trial)):
        weight = source.by_id[tie.names[0]]
        held_in = trial.folder / f"tied-{number}"
        if weight.storage is not None:
            held_in.write_bytes(b"".join(blocks(weight.storage)))
        watch[weight.id] = [str(held_in), 0, weight.n_bytes, weight.dtype, list(weight.shape)]
    place = trial.folder / "optimised"
    place.mkdir()
    with Sandbox(discover("runners", Runner)["onnxruntime"]) as child:
        found, _ = child.ask("optimise", {"path": str(path), "to": str(place), "watch": watch})
    return _counted(trial.ties, {id: same + wider for id, (same, wider) in found["copies"].items()})


OPERATIONS = (
    Operation("torch.export, its state dict", _export, "tie the module before it is exported"),
    Operation(
        "torch.export, save, load, .module()",
        _export_module,
        "before training: tieaudit.tie(module) makes one memory one Parameter; for inference nothing is lost",
    ),
    Operation("torch.onnx.export(dynamo=True)", _onnx, "tieaudit apply MODEL.onnx --scheme dedup --to TIED.onnx"),
    Operation(
        "… and ONNX Runtime's optimisation",
        _optimised,
        "tieaudit apply MODEL.onnx --scheme dedup --to TIED.onnx: it spells the tie so that no runtime folds it apart",
    ),
)
