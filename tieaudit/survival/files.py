"""Operations that go through a file. What is read back was written here a moment before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tieaudit.survival.ties import NotRun, Operation, Outcome, Trial, judged, judged_module

if TYPE_CHECKING:
    import torch


def _saved(trial: Trial) -> Mapping[str, torch.Tensor]:
    return dict(trial.module.state_dict())


def _only_saved(trial: Trial, tensors: Mapping[str, torch.Tensor]) -> tuple[Outcome, str]:
    """Ties of names that a state dict holds; buffers that are not saved have none to lose."""
    saved = _saved(trial)
    ties = tuple(tie for tie in trial.ties if set(tie.names) <= set(saved))
    if not ties:
        raise NotRun("no tied name is saved")
    return judged(ties, tensors, objects=False)


def _torch_save(trial: Trial) -> tuple[Outcome, str]:
    import torch

    torch.save(trial.module.state_dict(), trial.folder / "state.pt")
    return _only_saved(trial, torch.load(trial.folder / "state.pt", weights_only=True))


def _torch_save_copies(trial: Trial) -> tuple[Outcome, str]:
    import torch

    torch.save({name: value.clone() for name, value in trial.module.state_dict().items()}, trial.folder / "state.pt")
    return _only_saved(trial, torch.load(trial.folder / "state.pt", weights_only=True))


def _torch_save_module(trial: Trial) -> tuple[Outcome, str]:
    import torch

    torch.save(trial.module, trial.folder / "module.pt")
    # our own file, written in the line above: its pickle names the user's own class
    return judged_module(trial, torch.load(trial.folder / "module.pt", weights_only=False))


def _safetensors_file(trial: Trial) -> tuple[Outcome, str]:
    from safetensors.torch import load_file, save_file

    save_file(dict(_saved(trial)), trial.folder / "model.safetensors")
    return _only_saved(trial, load_file(trial.folder / "model.safetensors"))


def _safetensors_copies(trial: Trial) -> tuple[Outcome, str]:
    from safetensors.torch import load_file, save_file

    save_file({name: value.clone().contiguous() for name, value in _saved(trial).items()}, trial.folder / "m.st")
    return _only_saved(trial, load_file(trial.folder / "m.st"))


def _safetensors_model(trial: Trial) -> tuple[Outcome, str]:
    from safetensors.torch import load_model, save_model

    path = str(trial.folder / "model.safetensors")
    save_model(trial.module, path)
    twin = trial.twin()
    load_model(twin, path)
    return judged_module(trial, twin)


def _pretrained(trial: Trial) -> tuple[Outcome, str]:
    module = trial.module
    if not hasattr(module, "save_pretrained") or not hasattr(type(module), "from_pretrained"):
        raise NotRun("not a class of transformers")
    module.save_pretrained(trial.folder / "saved")
    return judged_module(trial, type(module).from_pretrained(trial.folder / "saved", local_files_only=True))


_NOT_CLONED = "save module.state_dict() itself: cloned entries are separate tensors"
_SAVE_MODEL = (
    "safetensors.torch.save_model and load_model: the file keeps one name and a note, the module ties the rest"
)
_NO_FILE = "the values must be in memory and of plain tensors: materialize or unwrap the module before it is saved"

OPERATIONS = (
    Operation("torch.save(state_dict), torch.load", _torch_save, _NOT_CLONED, _NO_FILE),
    Operation("torch.save(cloned state_dict), torch.load", _torch_save_copies, _NOT_CLONED, _NO_FILE),
    Operation(
        "torch.save(module), torch.load",
        _torch_save_module,
        "save the state dict and load it into a module that ties them itself",
        "save the state dict instead: a module can be pickled only if its class can",
    ),
    Operation(
        "safetensors save_file(state_dict)",
        _safetensors_file,
        _SAVE_MODEL,
        _SAVE_MODEL,
    ),
    Operation(
        "safetensors save_file(cloned state_dict)",
        _safetensors_copies,
        "safetensors.torch.save_model, or tieaudit apply --scheme dedup on a folder whose class restores the tie",
        _NO_FILE,
    ),
    Operation(
        "safetensors save_model, load_model",
        _safetensors_model,
        "load into a module that ties them itself",
        "save_file one name of each tie, and load_state_dict(strict=False) into a module that ties them itself",
    ),
    Operation(
        "save_pretrained, from_pretrained",
        _pretrained,
        "declare the tie: _tied_weights_keys of the class, and tie_word_embeddings = true in its config",
        "declare the tie: _tied_weights_keys of the class, and tie_word_embeddings = true in its config",
    ),
)
