"""Sample inputs for a module that nobody gave any for: by its class, else by what its first layers take.

They are offers: whoever runs or traces the module with one may be told that it does not fit, and takes the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tieaudit.class_inputs import Taken, class_inputs

if TYPE_CHECKING:
    import torch

N_MOST_SAMPLES = 16
"""Offers for one module; what none of them fits is known to its author only."""
N_MOST_ELEMENTS = 1 << 24
"""Numbers in one sample; a class may declare inputs of any size."""
_N_LAYERS = 3
_SIZES = {"batch": 2, "sequence": 7, "decoder_sequence": 5}
_SIDES = (32, 28, 64, 224, 8)
"""Heights and widths tried of a picture: usual sizes of small and large data sets."""
_LOWEST_ID = 3  # 0, 1 and 2 are often padding, start and end, which models treat in ways of their own
_DECIDED = {"use_cache": False, "return_dict": True}
"""Arguments of transformers classes without which the outputs hold caches, or have no names."""


@dataclass(frozen=True)
class Sample:
    """Arguments for one call of a module."""

    inputs: Any
    """A tuple of positional arguments or a dict of keyword arguments."""
    said: str
    """Names, element types and sizes, for the report."""


def samples(module: torch.nn.Module) -> Iterator[Sample]:
    """Offers, the most likely one first, on the device of the module. Nothing where nothing can be guessed.

    A transformers class is asked (its main input, its configuration); of any other module all arguments that have no
    default get what one of its first layers takes: Linear, Embedding, convolutions, recurrent layers, norms,
    attention; else what the first matrix parameter can be multiplied with. Cost: at most `N_MOST_ELEMENTS` numbers.
    """
    if getattr(module, "config", None) is not None and hasattr(module, "main_input_name"):
        yield from _of_class(module)
        return
    names = _required(module)
    if names is None:
        return
    if not names:
        yield Sample((), "no argument")
        return
    seen: list[tuple[str, tuple[int, ...]]] = []
    for taken in _offers(module):
        dims = tuple(size for size in taken.dims if isinstance(size, int))
        if (taken.dtype, dims) in seen:
            continue
        if len(seen) == N_MOST_SAMPLES:
            return
        seen.append((taken.dtype, dims))
        if len(names) * _n_elements(dims) <= N_MOST_ELEMENTS:
            values = tuple(_values(taken, dims, module) for _ in names)
            yield Sample(values, ", ".join(f"{name} {taken.dtype} {_shown(dims)}" for name in names))


def _of_class(module: Any) -> Iterator[Sample]:
    taken = [(one, tuple(_SIZES.get(str(size), size) for size in one.dims)) for one in class_inputs(module)]
    dims = [tuple(size for size in sizes if isinstance(size, int)) for _, sizes in taken]
    if sum(map(_n_elements, dims)) > N_MOST_ELEMENTS:
        return
    arguments = inspect.signature(module.forward).parameters
    values = {one.name: _values(one, sizes, module) for (one, _), sizes in zip(taken, dims, strict=True)}
    decided = {name: value for name, value in _DECIDED.items() if name in arguments}
    said = ", ".join(f"{one.name} {one.dtype} {_shown(sizes)}" for (one, _), sizes in zip(taken, dims, strict=True))
    yield Sample({**values, **decided}, said)


def _required(module: torch.nn.Module) -> list[str] | None:
    """Arguments of forward that have no default, one if it takes `*args` only; None where there is no such forward."""
    import torch

    if getattr(type(module), "forward", None) is torch.nn.Module.forward:  # a container
        return None
    try:
        taken = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is no Python function
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [one.name for one in taken if one.default is one.empty and one.kind in positional]
    if not found and any(one.kind == one.VAR_POSITIONAL for one in taken):
        return ["input"]
    return found


def _offers(module: torch.nn.Module) -> Iterator[Taken]:
    """What the first layers take, then what the first matrix can be multiplied with."""
    layers: list[Sequence[tuple[int, ...] | str]] = []
    for one in module.modules():
        offer = _of_layer(one)
        if offer and offer not in layers:
            layers.append(offer)
        if len(layers) == _N_LAYERS:
            break
    for dtype, *shapes in layers:
        yield from (Taken("", str(dtype), tuple(shape)) for shape in shapes)
    matrix = next((one for one in module.parameters() if one.dim() == 2), None)
    if matrix is not None:
        rows, columns = matrix.shape
        for size in (rows, columns):
            yield from (Taken("", "float32", shape) for shape in ((2, size), (2, 7, size)))


def _of_layer(layer: Any) -> Sequence[tuple[int, ...] | str]:
    """An element type and the shapes that a layer takes; nothing for a type that is not known."""
    from torch import nn

    for kinds, answer in _TABLE:
        if isinstance(layer, tuple(getattr(nn, kind) for kind in kinds)):
            return ("int64" if kinds[0].startswith("Embedding") else "float32", *answer(layer))
    return ()


def _rows(size: int) -> list[tuple[int, ...]]:
    return [(2, size), (2, 7, size)]


def _sequences(layer: Any, size: int) -> list[tuple[int, ...]]:
    return [(2, 7, size) if layer.batch_first else (7, 2, size)]


_TABLE: tuple[tuple[tuple[str, ...], Callable[[Any], list[tuple[int, ...]]]], ...] = (
    (("LazyLinear",), lambda layer: []),
    (("Embedding", "EmbeddingBag"), lambda layer: [(2, 7), (7,)]),
    (("LSTM", "GRU", "RNN"), lambda layer: _sequences(layer, layer.input_size)),
    (("LSTMCell", "GRUCell", "RNNCell"), lambda layer: [(2, layer.input_size), (2, 7, layer.input_size)]),
    (("Transformer",), lambda layer: _sequences(layer, layer.d_model)),
    (("MultiheadAttention",), lambda layer: _sequences(layer, layer.embed_dim)),
    (("Conv1d", "ConvTranspose1d"), lambda layer: [(2, layer.in_channels, 64), (2, layer.in_channels, 4000)]),
    (("Conv2d", "ConvTranspose2d"), lambda layer: [(2, layer.in_channels, side, side) for side in _SIDES]),
    (("Conv3d", "ConvTranspose3d"), lambda layer: [(2, layer.in_channels, 16, 16, 16)]),
    (("Linear", "Bilinear"), lambda layer: _rows(getattr(layer, "in_features", None) or layer.in1_features)),
    (("LayerNorm", "RMSNorm"), lambda layer: [(2, 7, *layer.normalized_shape), (2, *layer.normalized_shape)]),
    (("BatchNorm1d",), lambda layer: [(2, layer.num_features), (2, layer.num_features, 7)]),
    (("BatchNorm2d",), lambda layer: [(2, layer.num_features, side, side) for side in _SIDES]),
    (("BatchNorm3d",), lambda layer: [(2, layer.num_features, 8, 8, 8)]),
    (("GroupNorm",), lambda layer: [(2, layer.num_channels, side, side) for side in _SIDES]),
)
"""By type of layer: what its forward takes, without an optional batch. Source: the Shape sections of torch.nn."""


def _values(taken: Taken, dims: tuple[int, ...], module: torch.nn.Module) -> torch.Tensor:
    import torch

    first = next(iter(module.parameters()), None)
    device = first.device if first is not None else torch.device("cpu")
    if taken.dtype == "int64":
        if "mask" in taken.name:
            return torch.ones(dims, dtype=torch.int64, device=device)
        limit = taken.limit or _n_ids(module)
        low = _LOWEST_ID if limit > 8 else 0
        made = torch.randint(low, limit, dims, generator=torch.Generator().manual_seed(0))
    else:
        made = torch.randn(dims, generator=torch.Generator().manual_seed(0))
        kind = next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)
        made = made.to(kind)
    return made.to(device)


def _n_ids(module: torch.nn.Module) -> int:
    """What every table of a module has a row for."""
    from torch import nn

    tables = [one for one in module.modules() if isinstance(one, (nn.Embedding, nn.EmbeddingBag))]
    return min((one.num_embeddings for one in tables), default=2)


def _n_elements(dims: Sequence[int]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count


def _shown(dims: Sequence[int]) -> str:
    return "×".join(map(str, dims)) or "scalar"
