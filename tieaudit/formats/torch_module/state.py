"""The state dict of a live module → Model: what `torch.save(module.state_dict())` would save, under those names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_module.read import lazy_names, read_module
from tieaudit.formats.torch_module.tensors import TensorStorage, dtype_name, identity, locate
from tieaudit.model import Model, Weight, make_id

if TYPE_CHECKING:
    import torch

HOLDS = "holds"
STATE_DICT = "a state dict"
VERSIONS = "module_versions"
"""Metadata: the state dict's own `_metadata`, as JSON."""


def read_state(module: torch.nn.Module) -> Model:
    """The module's state dict as a model, with what is known of its parameters. Nothing is copied.

    RewriteRefused, naming the entry, for one without values to be written (meta, fake, sharded, sparse, quantised) and
    for one that is no tensor.
    """
    model = read_module(module)
    where = model.path
    if lazy := lazy_names(module):
        raise RewriteRefused(
            f"{where}: {lazy[0]!r} is not made before the lazy module is called once; nothing to write"
        )
    import torch

    state: dict[str, Any] = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise RewriteRefused(
                f"{where}: {name!r}: expected a tensor in the state dict, found a {type(value).__name__}",
                hint="torch.save keeps it",
            )
    storages = locate(state.values())
    weights = tuple(
        _weight(model, where, name, tensor, storage)
        for (name, tensor), storage in zip(state.items(), storages, strict=True)
    )
    names = {weight.name for weight in weights}
    uses = tuple(use for use in model.uses if use.weight in names)
    metadata = {**model.metadata, HOLDS: STATE_DICT, **_versions(state)}
    return replace(model, weights=weights, uses=uses, metadata=metadata, notes=())


def _versions(state: Any) -> dict[str, str]:
    """The versions of modules that `torch.save` keeps with a state dict, as JSON where that can say them."""
    try:
        return {VERSIONS: json.dumps(state._metadata)} if hasattr(state, "_metadata") else {}
    except (TypeError, ValueError):
        return {}


def _weight(model: Model, where: str, name: str, tensor: torch.Tensor, storage: TensorStorage) -> Weight:
    because = storage.no_values
    kind, remark = dtype_name(tensor.dtype)
    if because or remark:
        raise RewriteRefused(f"{where}: tensor {name!r} cannot be written: {because or remark}; nothing was written")
    known = model.by_id.get(make_id(name))
    if known is not None and isinstance(known.storage, TensorStorage):
        if identity(known.storage.tensor) == identity(tensor):
            return replace(known, storage=storage)
    return Weight(make_id(name), name, tuple(tensor.shape), kind, storage, because="made by the module's state_dict")
