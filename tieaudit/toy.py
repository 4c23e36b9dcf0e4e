"""Small in-memory models for the examples of rules and schemes, and for tests.

It refuses nothing that a real loader could produce: absent weights, shared regions, unreadable bytes, pointers, several
parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tieaudit.errors import CorruptFile
from tieaudit.find import find
from tieaudit.model import NOT_HERE, Declaration, Model, Part, Use, Weight, make_id
from tieaudit.roles import roles
from tieaudit.sealed import Locked
from tieaudit.storage import FileStorage, MemoryStorage, NotHere, Region, Storage
from tieaudit.verdict import NO_DEMANDS, Demands, Subject
from tieaudit.view import AS_STORED, TRANSPOSED

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Broken:
    """A tensor whose bytes cannot be read: a truncated file."""

    shape: tuple[int, ...] = (4, 3)
    dtype: str = "float32"


@dataclass(frozen=True)
class At:
    """A tensor at a byte range of an external file that is never read: `values` are what is there."""

    values: Array
    offset: int
    file: str = "weights.bin"


@dataclass(frozen=True)
class Away:
    """A tensor whose file is elsewhere: a git-LFS pointer is in its place."""

    shape: tuple[int, ...] = (4, 3)
    dtype: str = "float32"


Value = Array | Broken | Away | At | None


@dataclass(frozen=True)
class _Unreadable:
    n_bytes: int
    container: str

    @property
    def region(self) -> Region:
        return (self.container, 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        raise CorruptFile(f"{self.container}: expected {self.n_bytes} bytes, found 0: the file is truncated")


@dataclass(frozen=True)
class _Placed(FileStorage):
    """Bytes that say they are in a file."""

    data: bytes = b""

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self.data[begin : begin + length] for begin, length in ranges]


def ramp(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    """A tensor without two equal rows or columns, the same every time."""
    values: Array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return values


def claim(
    *members: str, active: bool = True, restores: bool = True, condition: str = "config.json:tie_word_embeddings"
) -> Declaration:
    """What a Hugging Face class says: these weights are one if the flag is on."""
    return Declaration(
        members=members,
        claimed_by="LlamaForCausalLM (transformers 5.23.0)",
        active=active,
        restores=restores and active,
        honoured_by=("transformers 5", "transformers 4") if active else (),
        condition=condition,
        because=f"{condition} is {str(active).lower()}" if condition else "whatever the configuration says",
    )


UNKNOWN_CLASS = {"transformers": "not asked: convention"}
"""Metadata of a folder whose class nobody knows."""


def toy(
    weights: Mapping[str, Value],
    declared: Sequence[tuple[str, ...] | Declaration] = (),
    uses: Sequence[tuple[str, str] | Use] = (),
    format: str = "huggingface",
    parts: Mapping[str, str] | None = None,
    *,
    path: str = "",
    buffers: Iterable[str] = (),
    unknown: Iterable[str] = (),
    roles_by_class: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    overridable: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    notes: tuple[str, ...] = (),
    demands: Demands = NO_DEMANDS,
    locked: Locked | None = None,
) -> Subject:
    """A model in memory, with its ties found and its roles told.

    Args:
        weights: name → values, `None` for a declared but absent weight; `Broken`, `Away` or `At` for the special cases.
        declared: classes of names that the model's class ties, or `claim(...)` for more detail.
        uses: `(name, "Op")`, `(name, "Transpose Op")` through a Transpose node, or whole `Use` objects.
        parts: name → part, for a model in several files.
        buffers: names that are no parameters; unknown: names of which that cannot be told.
        shapes: of absent weights, where the first declared partner's shape is not the right one.
        flags: dotted key → what a configuration states for the setting that ties.
        roles_by_class: name → role kind that the class knows.
        demands: what a policy asks of it.
        locked: what the lock file says of the model.

    Shapes: those of the arrays. Cost: everything is small and stays in memory.
    """
    where = {name: (parts or {}).get(name, "") for name in weights}
    ids = {name: make_id(name, where[name]) for name in weights}
    claims = [claim(*entry) if isinstance(entry, tuple) else entry for entry in declared]
    claims = [replace(entry, members=tuple(ids.get(name, name) for name in entry.members)) for entry in claims]
    special = {**dict.fromkeys(buffers, False), **dict.fromkeys(unknown)}
    made = []
    for name, value in weights.items():
        shape, dtype, storage = _stored(name, value, weights, claims, shapes or {})
        made.append(
            Weight(
                ids[name],
                name,
                shape,
                dtype,
                storage,
                part=where[name],
                parameter=special.get(name, True),
                because="an example",
                held_as="initializer" if format == "onnx" else "tensor",
                overridable=name in set(overridable),
            )
        )
    suffix = "onnx" if format == "onnx" else "safetensors"
    model = Model(
        path=path or {"huggingface": "model", "safetensors": "model.safetensors"}.get(format, "model.onnx"),
        format=format,
        parts=tuple(Part(part, (f"{part or 'model'}.{suffix}",)) for part in dict.fromkeys(where.values())),
        weights=tuple(made),
        uses=tuple(_use(entry, ids, where, index) for index, entry in enumerate(uses)),
        declarations=tuple(claims),
        hints={ids[name]: kind for name, kind in (roles_by_class or {}).items()},
        flags=flags or {},
        metadata={**_whereabouts(weights), **(metadata or {})},
        notes=notes,
        has_graph=format == "onnx",
    )
    return Subject(model, find(model), roles(model), demands, locked)


def _whereabouts(weights: Mapping[str, Value]) -> dict[str, str]:
    away = [name for name, value in weights.items() if isinstance(value, Away)]
    return {"weights": f"{NOT_HERE}{away[0]}.safetensors (a git-LFS pointer)"} if away else {}


def _stored(
    name: str,
    value: Value,
    weights: Mapping[str, Value],
    claims: Sequence[Declaration],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[tuple[int, ...], str, Storage | None]:
    if value is None:
        partners = (weights.get(other) for entry in claims if name in entry.members for other in entry.members)
        shape = next((other.shape for other in partners if isinstance(other, np.ndarray)), (4, 3))
        return shapes.get(name, shape), "float32", None
    if isinstance(value, Broken):
        return value.shape, value.dtype, _Unreadable(4 * int(np.prod(value.shape)), f"{name}.safetensors")
    if isinstance(value, Away):
        return value.shape, value.dtype, NotHere(f"{name}.safetensors#{name}", "a git-LFS pointer")
    if isinstance(value, At):
        data = np.ascontiguousarray(value.values).tobytes()
        storage = _Placed(value.file, value.offset, len(data), data)
        return value.values.shape, value.values.dtype.name, storage
    return value.shape, value.dtype.name, MemoryStorage(np.ascontiguousarray(value).tobytes(), f"toy:{name}")


def _use(entry: tuple[str, str] | Use, ids: Mapping[str, str], where: Mapping[str, str], index: int) -> Use:
    if isinstance(entry, Use):
        return entry
    name, op = entry
    *through, op = op.split()
    return Use(
        weight=ids[name],
        op=op,
        node=f"{op.lower()}_{index}",
        slot=0 if op == "Gather" else 1,
        view=TRANSPOSED if through else AS_STORED,
        part=where[name],
        reads_ids=op == "Gather",
        feeds_output=op != "Gather",
        chain=tuple(f"{step.lower()}_{index}" for step in through),
        transposes="Transpose" in through,
    )
