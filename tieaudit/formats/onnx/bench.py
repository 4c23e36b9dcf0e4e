"""All files of a model on the workbench, and where each of its weights is while edits follow one another."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.formats.onnx.records import Records
from tieaudit.formats.onnx.workbench import Body, Op, Piece
from tieaudit.model import Model, Part, Weight, make_id

if TYPE_CHECKING:
    from onnx import TensorProto

SHARED_FILE = "shared_weights.data"


class Spot(NamedTuple):
    """Where a weight is now."""

    piece: Piece
    body: Body
    name: str
    turned: bool = False
    """Whether it is stored as the transpose of what it was in the original."""

    @property
    def id(self) -> str:
        return make_id(self.name, self.piece.part, self.body.name)

    @property
    def constant(self) -> Op | None:
        """The Constant node that holds it, None for an initializer."""
        return None if self.name in self.body.tensors else self.body.makers.get(self.name)

    def tensor(self) -> TensorProto | None:
        """The message that holds its bytes; None if there is none (a sparse tensor, a vanished name)."""
        op = self.constant
        if op is None:
            return self.body.tensors.get(self.name)
        return next((item.t for item in op.proto.attribute if item.name == "value"), None)


class Bench:
    """The files of one model, taken apart."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.pieces = {part.name: Piece(part) for part in parts}
        self.records = Records()
        self.separated: set[str] = set()
        """Ids of weights that no longer share their range of a data file."""
        self._moved: dict[str, Spot] = {}
        self._shared_files: set[str] = set()

    def spot(self, weight: Weight) -> Spot | None:
        """Where the weight is now; None if it is in no graph that can be edited (a function's body)."""
        if weight.id in self._moved:
            return self._moved[weight.id]
        piece = self.pieces.get(weight.part)
        body = piece.bodies.get(weight.scope) if piece is not None else None
        if piece is None or body is None:
            return None
        found = Spot(piece, body, weight.name)
        return found if found.tensor() is not None else None

    def move(self, weight: Weight, to: Spot) -> None:
        """From now on this spot serves the weight, and all that its old spot served."""
        old = self.spot(weight)
        for id, spot in list(self._moved.items()):
            if old is not None and spot[:3] == old[:3]:
                self._moved[id] = to._replace(turned=spot.turned ^ (old.turned ^ to.turned))
        self._moved[weight.id] = to

    def renamed(self) -> dict[str, str]:
        """Original id → id that serves it now, where they differ."""
        return {id: spot.id for id, spot in self._moved.items() if spot.id != id}

    def shared_file(self, pieces: list[Piece]) -> str:
        """A name for the data file of bytes that several parts share, relative to their common folder."""
        name, count = SHARED_FILE, 1
        while name not in self._shared_files and (pieces[0].path.parent / name).exists():
            name, count = SHARED_FILE.replace(".", f"_{count}.", 1), count + 1
        self._shared_files.add(name)
        return name


def for_looking(model: Model) -> Bench:
    """The model taken apart for questions only: kept until the next model is asked about."""
    files = tuple((part.name, part.paths, Path(part.paths[0]).stat().st_mtime_ns) for part in model.parts)
    return _cached(files)


@lru_cache(maxsize=1)
def _cached(files: tuple[tuple[str, tuple[str, ...], int], ...]) -> Bench:
    return Bench(tuple(Part(name, paths) for name, paths, _ in files))
