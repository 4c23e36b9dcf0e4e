"""A new checkpoint from any model: names of one memory share one storage, transposed ones step through it differently.

Written as `torch.save(module.state_dict(), path)` would write it, without PyTorch; block by block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tieaudit.arrange import arranged, plain_source, strides_through
from tieaudit.change import Edit, Kind, Plan, Share, Unshare, Written
from tieaudit.dtypes import dtype
from tieaudit.errors import RewriteRefused
from tieaudit.formats import KEY_GIVEN
from tieaudit.formats.torch_checkpoint.discover import SUFFIXES, owns
from tieaudit.formats.torch_checkpoint.pickling import NotPlain, Stepped, can_hold, is_typed, pickled
from tieaudit.formats.torch_checkpoint.state import state_of
from tieaudit.formats.torch_checkpoint.zipped import ALIGNMENT, Content, write_archive
from tieaudit.formats.torch_module.state import VERSIONS
from tieaudit.model import Model, Weight, storage_of
from tieaudit.regions import aliases, overlapping
from tieaudit.storage import Storage, no_values, reading
from tieaudit.strided import row_major, stretch, strides_of
from tieaudit.view import AS_STORED


@dataclass(frozen=True)
class _Blob:
    """A storage of the new file, and how tensors step through it: (weight, offset, strides) in elements."""

    storage: Storage
    tensors: tuple[tuple[Weight, int, tuple[int, ...]], ...]


def can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    """Why a checkpoint cannot hold this edit, or None: it holds every tie of one element type."""
    if isinstance(edit, Share):
        return _cannot_share([model.by_id[member.id] for member in edit.members], edit)
    if isinstance(edit, Unshare):
        return None if any(weight.name == edit.name for weight in model.weights) else f"no tensor is called {edit.name}"
    return "a checkpoint holds tensors and neither a graph nor settings"


def _cannot_share(weights: Sequence[Weight], edit: Share) -> str | None:
    first = weights[0]
    for weight, member in zip(weights, edit.members, strict=True):
        if weight.dtype != first.dtype:
            return f"{first.id} is {first.dtype} and {weight.id} is {weight.dtype}: one storage cannot be both"
        if member.view != AS_STORED and strides_through(first.shape, member.view) is None:
            return f"{weight.id} is {first.id} {member.view}, which is no step through the same bytes"
    return None


def unwritable(weight: Weight) -> str | None:
    """Why PyTorch's checkpoints cannot hold a weight, or None."""
    return None if can_hold(weight.dtype) else f"PyTorch has no element type {weight.dtype}"


def create(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned state dict as the file that `plan.into` names, in the folder `dest`.

    RewriteRefused for an element type that PyTorch lacks. Cost: one pass over the bytes; memory: a block.
    """
    assert plan.into is not None  # who calls has chosen this container
    weights = [weight for weight in arranged(model, plan).weights if not weight.absent]
    write_state_dict(weights, dest / plan.into.file, versions_of(model))
    return Written((plan.into.file,))


def versions_of(model: Model) -> object:
    """The versions of modules that the model's state dict carries, of one file or in memory; None without."""
    if (known := model.metadata.get(VERSIONS)) is not None:
        return json.loads(known)
    files = [Path(path) for path in model.parts[0].paths if path.endswith(SUFFIXES)]
    if len(files) != 1 or not owns(files[0]):
        return None
    return state_of(files[0], key_of(model)).versions


def key_of(model: Model) -> str:
    """The key that the user chose in a checkpoint; empty where the model was found without."""
    return model.metadata.get(KEY_GIVEN, "")


def write_state_dict(weights: Iterable[Weight], path: Path, metadata: object = None) -> None:
    """Write stored weights under their names, in their order, into a new file. `metadata`: the dict's `_metadata`."""
    weights = list(weights)
    for weight in weights:
        because = unwritable(weight) or no_values(storage_of(weight))
        if because:
            raise RewriteRefused(f"{path.name}: tensor {weight.name!r} cannot be written: {because}")
    blobs = _blobs(weights)
    steps: dict[str, Stepped] = {}
    for key, blob in enumerate(blobs):
        kinds = {weight.dtype for weight, _, _ in blob.tensors}
        typed = len(kinds) == 1 and is_typed(blob.tensors[0][0].dtype)
        for weight, offset, strides in blob.tensors:
            item = dtype(weight.dtype).item_bytes or 1
            n_stored = blob.storage.n_bytes // (item if typed else 1)
            steps[weight.id] = Stepped(
                weight.name, str(key), weight.dtype, n_stored, offset, weight.shape, strides, typed
            )
    ordered = [steps[weight.id] for weight in weights]
    try:
        text = pickled(ordered, metadata)
    except NotPlain:
        text = pickled(ordered)
    members: list[tuple[str, Content]] = [
        ("data.pkl", text),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT).encode()),
        ("byteorder", b"little"),
        *((f"data/{key}", plain_source(blob.storage)) for key, blob in enumerate(blobs)),
        ("version", b"3\n"),
    ]
    with reading():
        write_archive(path, f"{_top(path)}/", members)


def _top(path: Path) -> str:
    """The folder inside the archive: the file's stem, as PyTorch has it, without what a zip name may not have."""
    return re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII).strip(".") or "archive"


def _blobs(weights: Sequence[Weight]) -> list[_Blob]:
    """The storages of the new file, in the order of their first names."""
    regions = [storage_of(weight).region for weight in weights]
    together = overlapping(regions)
    grouped = {index for group in together for index in group}
    found = [(index, _alone(weight)) for index, weight in enumerate(weights) if index not in grouped]
    for group in together:
        order = sorted(group)
        found += [(order[0], blob) for blob in _shared([weights[index] for index in order])]
    return [blob for _, blob in sorted(found, key=lambda one: one[0])]


def _alone(weight: Weight) -> _Blob:
    return _Blob(storage_of(weight), ((weight, 0, row_major(weight.shape)),))


def _shared(weights: Sequence[Weight]) -> list[_Blob]:
    """Tensors of overlapping bytes: the bytes as they lie where they can be had, else a storage for each tie."""
    whole = _stretch(weights)
    if whole is not None:
        begin = min(storage_of(weight).region[1] for weight in weights)
        return [_Blob(whole, tuple(_step(weight, begin) for weight in weights))]
    found = []
    for names in aliases(weights):
        first, kept = names[0][0], []
        for weight, view in names:
            strides = row_major(first.shape) if weight is first else strides_through(first.shape, view)
            if strides is None:
                found.append(_alone(weight))
            else:
                kept.append((weight, 0, strides))
        found.append(_Blob(storage_of(first), tuple(kept)))
    return found


def _step(weight: Weight, begin: int) -> tuple[Weight, int, tuple[int, ...]]:
    storage = storage_of(weight)
    item = dtype(weight.dtype).item_bytes or 1
    return weight, (storage.region[1] - begin) // item, strides_of(storage, weight.shape)


def _stretch(weights: Sequence[Weight]) -> Storage | None:
    """The bytes from the first to the last that overlapping tensors visit; None where they cannot be read as they lie,
    or where one of them would begin inside an element."""
    regions = [storage_of(weight).region for weight in weights]
    begin, end = min(region[1] for region in regions), max(region[2] for region in regions)
    for weight, region in zip(weights, regions, strict=True):
        item = dtype(weight.dtype).item_bytes or 1
        if (region[1] - begin) % item or (end - begin) % item:
            return None
    found = [stretch(storage_of(weight), begin, end) for weight in weights]
    kinds: Mapping[object, object] = {(weight.dtype, _swapped(weight)): None for weight in weights}
    if len(kinds) > 1 and any(_swapped(weight) for weight in weights):
        return None
    return next((one for one in found if one is not None), None)


def _swapped(weight: Weight) -> int:
    return int(getattr(weight.storage, "n_swapped", 0))
