"""A Hugging Face folder: config.json and its weights as one model, with the ties that its class makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats import Format

if TYPE_CHECKING:
    from tieaudit.change import Edit, Kind, Plan, SetConfig, Written
    from tieaudit.model import Model


# The wrappers import what they need when they are called: asking whose a path is must not cost what reading it costs.
def _owns(path: Path) -> bool:
    from tieaudit.formats.huggingface.folder import owns

    return owns(path)


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    from tieaudit.formats.huggingface.folder import group

    return group(paths)


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.huggingface.read import load

    return load(path, files)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    from tieaudit.formats.huggingface.realise import can_realise

    return can_realise(model, edit, target)


def _edit(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.huggingface.write import edit

    return edit(model, plan, dest)


def _can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    from tieaudit.formats.huggingface.create import can_create

    return can_create(model, edit, kind, target)


def _create(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.huggingface.create import create

    return create(model, plan, dest)


def _held_by(model: Model) -> str:
    from tieaudit.formats.huggingface.realise import held_by

    return held_by(model)


def _switch(model: Model, ids: tuple[str, ...], tied: bool, target: str) -> tuple[SetConfig, ...] | str:
    from tieaudit.formats.huggingface.realise import switch

    return switch(model, ids, tied, target)


huggingface = Format(
    name="huggingface",
    summary="Hugging Face folders: config.json with safetensors or pytorch_model.bin",
    targets=("transformers-5", "transformers-4"),
    owns=_owns,
    group=_group,
    load=_load,
    can_realise=_can_realise,
    edit=_edit,
    can_create=_can_create,
    create=_create,
    switch=_switch,
    equalises=True,
    held_by=_held_by,
    precedence=20,
)
