"""Operations that leave the module behind: exported programs, ONNX, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.compare import comparable, digest
from tieaudit.formats.torch_module.read import held, read_module
from tieaudit.formats.torch_module.uses import arguments
from tieaudit.live import untie
from tieaudit.model import make_id
from tieaudit.printable import counted, size
from tieaudit.survival.ties import NotRun, Operation, Outcome, TiedNames, Trial, judged, judged_module, randomise
from tieaudit.view import AS_STORED, TRANSPOSED

if TYPE_CHECKING:
    import torch

    from tieaudit.model import Model, Weight
    from tieaudit.storage import Region

_N_LEAST_BYTES = 4096
"""Shared bytes below which the size of a file says nothing: two graphs differ by so much."""
_MOST = 0.9
"""Part of the shared bytes that a file without copies must be smaller by."""


def _exported(module: torch.nn.Module, trial: Trial) -> Any:
    import torch

    args, kwargs = arguments(trial.sample())
    return torch.export.export(module.eval(), args, kwargs)


def _export(trial: Trial) -> tuple[Outcome, str]:
    return judged(trial.ties, _exported(trial.twin(), trial).state_dict, objects=False)


def _export_module(trial: Trial) -> tuple[Outcome, str]:
    import torch

    torch.export.save(_exported(trial.twin(), trial), trial.folder / "program.pt2")
    return judged_module(trial, torch.export.load(trial.folder / "program.pt2").module())


def _onnx_file(trial: Trial, *, untied: bool = False) -> tuple[Model, Path]:
    """The exported file, and the model whose values it holds: random ones, so that only ties are equal."""
    import torch

    sample = trial.sample()
    module = trial.twin(distinct=not untied).eval()
    if untied:
        untie(module)
        randomise(module)
    args, kwargs = arguments(sample)
    path = trial.folder / ("untied" if untied else "tied") / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(module, args, path, kwargs=kwargs, dynamo=True, verbose=False)
    return read_module(module), path


def _onnx(trial: Trial) -> tuple[Outcome, str]:
    from tieaudit.load import load_one

    source, path = _onnx_file(trial)
    stored = load_one(path)
    copies = {tie: _copies(source, tie, stored) for tie in _shown(trial)}
    return _counted(trial, copies, path.parent, lambda: _onnx_file(trial, untied=True)[1].parent)


def _shown(trial: Trial) -> tuple[TiedNames, ...]:
    """Ties that values can show: of real floating-point tensors of more than one element."""
    tensors = {one.name: one.tensor for one in held(trial.module)}
    found = tuple(
        tie for tie in trial.ties if tensors[tie.names[0]].is_floating_point() and tensors[tie.names[0]].numel() > 1
    )
    if not found:
        raise NotRun("no tie of real floating-point tensors, whose copies could be counted")
    return found


def _copies(source: Model, tie: TiedNames, model: Model) -> int:
    """How many stored tensors of a model hold the values of a tie, as they are or transposed.

    A part of a tensor that is stored is a copy: a file has no tensor that begins inside another.
    """
    names = tie.names if tie.partial else tie.names[:1]
    return len({region for name in names for region in _regions(source.by_id[make_id(name)], model)})


def _regions(weight: Weight, model: Model) -> set[Region]:
    wanted = digest(weight)
    regions = set()
    for other in model.weights:
        same_kind = other.dtype == weight.dtype and sorted(other.shape) == sorted(weight.shape)
        if other.storage is None or not same_kind:
            continue
        views = [AS_STORED, *([TRANSPOSED] if len(other.shape) == 2 and comparable(other.dtype, TRANSPOSED) else [])]
        if any(digest(other, view) == wanted for view in views):
            regions.add(other.storage.region)
    return regions


def _counted(
    trial: Trial, copies: Mapping[TiedNames, int], folder: Path, without: Callable[[], Path]
) -> tuple[Outcome, str]:
    """The verdict of counted copies; where values were rearranged, that of the size of the files.

    `folder`: holds the files; `without`: makes those of the untied module, and says where they are.
    """
    several = {tie: count for tie, count in copies.items() if count > 1}
    once = [tie for tie, count in copies.items() if count == 1]
    if several:
        tie, count = next(iter(several.items()))
        return "lost", f"{tie.names[0]} is stored {count} times ({len(several)} of {counted(len(copies), 'tie')} lost)"
    if all(count for count in copies.values()):
        return "kept", f"{len(copies)} of {counted(len(copies), 'tie')}: stored once"
    tensors = {one.name: one.tensor for one in held(trial.module)}
    unseen = [tie for tie, count in copies.items() if not count]
    small = all(tensors[tie.names[0]].dim() < 2 for tie in unseen)
    if once and small:
        return (
            "kept",
            f"{len(once)} of {counted(len(copies), 'tie')}: stored once; the rest was folded into other tensors",
        )
    expected = sum((len(tie.names) - 1) * tensors[tie.names[0]].nbytes for tie in copies if not tie.partial)
    if expected < _N_LEAST_BYTES or any(tie.partial for tie in unseen):
        raise NotRun(f"the values of {unseen[0].names[0]} were folded into other tensors, too small to be told by size")
    saved = _size(without()) - _size(folder)
    if saved > _MOST * expected:
        return "kept", f"rearranged, and {size(saved)} smaller than the export of the untied module"
    lost = (
        f"rearranged; {size(expected)} are shared, and {size(max(saved, 0))} less than of the untied module are stored"
    )
    return "lost", lost


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _optimised(trial: Trial) -> tuple[Outcome, str]:
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        raise NotRun("the package onnxruntime is not installed")
    from tieaudit.registry import discover
    from tieaudit.runners import Runner
    from tieaudit.sandbox import Sandbox
    from tieaudit.storage import blocks

    source, path = _onnx_file(trial)
    watch, ties = {}, _shown(trial)
    for number, name in enumerate(_watched(ties)):
        weight = source.by_id[make_id(name)]
        held_in = trial.folder / f"tied-{number}"
        if weight.storage is not None:
            held_in.write_bytes(b"".join(blocks(weight.storage)))
        watch[name] = [str(held_in), 0, weight.n_bytes, weight.dtype, list(weight.shape)]
    with Sandbox(discover("runners", Runner)["onnxruntime"]) as child:

        def optimised(path: Path) -> tuple[Path, dict[str, Any]]:
            place = path.parent / "optimised"
            place.mkdir()
            found, _ = child.ask("optimise", {"path": str(path), "to": str(place), "watch": watch})
            return place, {name: same + wider for name, (same, wider) in found["copies"].items()}

        place, seen = optimised(path)
        copies = {tie: sum(seen[name] for name in _watched((tie,))) for tie in ties}
        return _counted(trial, copies, place, lambda: optimised(_onnx_file(trial, untied=True)[1])[0])


def _watched(ties: Iterable[TiedNames]) -> list[str]:
    return [name for tie in ties for name in (tie.names if tie.partial else tie.names[:1])]


_NO_EXPORT = "mend what the exporter names: it must be able to trace the module with these inputs"
_DEDUP = "tieaudit apply MODEL.onnx --scheme dedup --to TIED.onnx"

OPERATIONS = (
    Operation("torch.export, its state dict", _export, "tie the module before it is exported", _NO_EXPORT),
    Operation(
        "torch.export, save, load, .module()",
        _export_module,
        "before training: tieaudit.tie(module) makes one memory one Parameter; for inference nothing is lost",
        _NO_EXPORT,
    ),
    Operation("torch.onnx.export(dynamo=True)", _onnx, _DEDUP, _NO_EXPORT),
    Operation(
        "… and ONNX Runtime's optimisation",
        _optimised,
        f"{_DEDUP}: it spells the tie so that no runtime folds it apart",
        "mend the export first; or export in an element type that ONNX Runtime has kernels for",
    ),
)
