"""Inputs that a model accepts: the user's, those stored beside the model, or made up from its signature.

Making them up is a matter of conventions (names and shapes that exporters use), so a made-up feed is an offer: whoever
runs it may be told that it does not fit, and `corrected` learns from what the runtime said.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from tieaudit.dtypes import dtype
from tieaudit.errors import CorruptFile, UsageError
from tieaudit.runners import Array, Port, Signature

_MAX_FEEDS = 8
N_MOST_ELEMENTS = 1 << 27
"""Values that are made up for one run: a file may declare inputs of any size."""
_N_MOST_BYTES = 1 << 32
"""Unpacked size of a file of given inputs: a small archive may unpack to any size."""


@dataclass(frozen=True)
class Feed:
    """Values for all inputs of one model, and where they come from."""

    arrays: Mapping[str, Array]
    source: str


@dataclass(frozen=True)
class Sizes:
    """One choice for the free dimensions."""

    batch: int = 2
    sequence: int = 7
    past: int = 0
    encoder: int = 5
    side: int = 32
    other: int = 3
    seed: int = 0

    def __str__(self) -> str:
        past = f", past {self.past}" if self.past else ""
        return f"made up: batch {self.batch}, sequence {self.sequence}{past}, seed {self.seed}"


CHOICES = (
    Sizes(),
    Sizes(1, 5, 3, 4, seed=1),
    Sizes(3, 9, 2, 6, side=64, seed=2),
    Sizes(2, 1, 4, 5, seed=3),
    Sizes(1, 1, 1, 1, other=1, seed=4),
    Sizes(1, 8, 0, 8, side=224, other=8, seed=5),
    Sizes(1, 16, 16, 16, side=64, other=16, seed=6),
)
"""Tried in order; a model that refuses one often takes another."""


def read_inputs(path: Path) -> Mapping[str, Array]:
    """The user's inputs, by input name. UsageError if the file is not an .npz archive of plain arrays."""
    try:
        if not path.is_file():  # a pipe would wait for a writer, a device may never end
            found = "something that is not a regular file" if path.exists() else "no such file"
            raise UsageError(f"{path}: expected an .npz archive, found {found}")
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path}: expected an .npz archive, found another kind of file; use numpy.savez")
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(member.file_size for member in archive.infolist())
        if n_bytes > _N_MOST_BYTES:
            raise UsageError(f"{path}: expected arrays of at most {_N_MOST_BYTES:,} bytes, found {n_bytes:,}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UsageError:
        raise
    except Exception as error:  # zlib, zipfile and numpy's header reader raise errors of many kinds on damaged files
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{path}: expected an .npz archive of arrays without objects: {said}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufcUV" or array.dtype.names:
            raise UsageError(f"{path}: expected an array of numbers or texts under {name!r}, found something else")
    return arrays


def stored_beside(path: Path, signature: Signature) -> list[Feed]:
    """The `test_data_set_*` folders beside an ONNX file, in the layout of the ONNX model zoo (input_0.pb …).

    Skips data sets that do not give every input. Source: onnx/onnx/backend/test/runner.
    """
    feeds = []
    for folder in sorted(path.parent.glob("test_data_set_*"))[:_MAX_FEEDS]:
        arrays: dict[str, Array] = {}
        for index, port in enumerate(signature.inputs):
            file = folder / f"input_{index}.pb"
            if file.is_file():
                arrays[port.name] = _tensor(file)
        if len(arrays) == len(signature.inputs):
            feeds.append(Feed(arrays, folder.name))
    return feeds


def _tensor(file: Path) -> Array:
    import onnx

    if file.stat().st_size > _N_MOST_BYTES:
        raise CorruptFile(f"{file}: expected a tensor of at most {_N_MOST_BYTES:,} bytes, found a larger file")
    try:
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # it may name any file of this machine
            raise ValueError("its data is in another file")
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except Exception as error:  # protobuf's and onnx's own errors have no common class
        raise CorruptFile(f"{file}: expected a serialized TensorProto: {error}") from error


def made_up(signature: Signature) -> Iterator[tuple[Sizes, Feed]]:
    """Feeds of several shapes and seeds, most likely one first. Nothing if an input is no tensor or declared huge."""
    if any(not port.dtype for port in signature.inputs):
        return
    for sizes in CHOICES:
        if sum(prod(shape) for shape in _shapes(signature, sizes).values()) <= N_MOST_ELEMENTS:
            yield sizes, feed_of(signature, sizes)


def feed_of(signature: Signature, sizes: Sizes) -> Feed:
    """One made-up feed. Equal symbols have equal sizes; ids stay below the port's limit."""
    rng = np.random.default_rng(sizes.seed)
    shapes = _shapes(signature, sizes)
    arrays = {port.name: _values(port, shapes[port.name], sizes, rng) for port in signature.inputs}
    return Feed(arrays, str(sizes))


def corrected(signature: Signature, feed: Feed, complaint: str) -> Signature | None:
    """A signature that avoids what the runtime complained about, or None if the complaint teaches nothing.

    Understands ONNX Runtime's *indices element out of data bounds* and *Got invalid dimensions for input*.
    """
    bounds = re.search(r"idx=(-?\d+) must be within the inclusive range \[(-?\d+),\s*(\d+)\]", complaint)
    if bounds:
        index, limit = int(bounds[1]), int(bounds[3]) + 1
        guilty = {n for n, a in feed.arrays.items() if a.dtype.kind in "iu" and a.size and (a == index).any()}
        ports = tuple(
            replace(p, limit=min(limit, p.limit or limit)) if p.name in guilty else p for p in signature.inputs
        )
        return replace(signature, inputs=ports) if ports != signature.inputs else None
    wrong = re.search(r"Got invalid dimensions for input: (\S+) for the following indices(.*)", complaint)
    if wrong:
        fixes = {int(i): int(n) for i, n in re.findall(r"index: (\d+) Got: \d+ Expected: (\d+)", wrong[2])}
        ports = tuple(
            replace(p, dims=tuple(fixes.get(i, d) for i, d in enumerate(p.dims))) if p.name == wrong[1] else p
            for p in signature.inputs
        )
        return replace(signature, inputs=ports) if ports != signature.inputs else None
    return None


def _shapes(signature: Signature, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    ports = signature.inputs
    symbols: dict[str, int] = {}
    for port in ports:  # what a symbol's own name says goes before what its place says
        for dim in port.dims:
            if isinstance(dim, str) and dim not in symbols:
                meaning = _meaning_of_symbol(dim)
                if meaning is not None:
                    symbols[dim] = _size(meaning, sizes)
    for port in ports:
        for axis, dim in enumerate(port.dims):
            if isinstance(dim, str) and dim not in symbols and not re.search(r"[+*/-]", dim):
                symbols[dim] = _size(_meaning_of_place(port, axis), sizes)
    for symbol, (least, most) in signature.ranges.items():
        if symbol in symbols:
            symbols[symbol] = min(max(symbols[symbol], least or 0), most if most is not None else symbols[symbol])
    return {port.name: tuple(_dim(port, axis, symbols, sizes) for axis in range(len(port.dims))) for port in ports}


def _dim(port: Port, axis: int, symbols: Mapping[str, int], sizes: Sizes) -> int:
    dim = port.dims[axis]
    if isinstance(dim, int) and dim > 0:
        return dim
    if isinstance(dim, str):
        known = symbols.get(dim)
        known = _sum_of(dim, symbols) if known is None else known
        if known is not None:
            return known
    if dim == 0 and isinstance(dim, int) and "past" in port.name:
        return 0
    return _size(_meaning_of_place(port, axis), sizes)


def _sum_of(text: str, symbols: Mapping[str, int]) -> int | None:
    """The value of `a + b`, `8*s1 + 1`: sums of products of known symbols and numbers, as exporters write them."""
    total = 0
    for piece in text.split("+"):
        product = 1
        for factor in piece.strip().strip("()").split("*"):
            factor = factor.strip()
            known = int(factor) if factor.isascii() and factor.isdigit() and len(factor) < 19 else symbols.get(factor)
            if known is None:
                return None
            product *= known
        total += product
    return total


def _size(meaning: str, sizes: Sizes) -> int:
    if meaning == "total":
        return sizes.past + sizes.sequence
    return int(getattr(sizes, meaning))


def _meaning_of_symbol(symbol: str) -> str | None:
    text = symbol.lower()
    if "+" in text and "past" in text and "seq" in text or re.search(r"total|kv_(len|seq)", text):
        return "total"
    if "+" in text:
        return None
    for pattern, meaning in (
        (r"batch|^bs$|^n$", "batch"),
        (r"past|cache", "past"),
        (r"encoder|source|src|enc_", "encoder"),
        (r"seq|len|^s$|^t$|time|token", "sequence"),
        (r"height|width|^h$|^w$", "side"),
    ):
        if re.search(pattern, text):
            return meaning
    return None


def _meaning_of_place(port: Port, axis: int) -> str:
    name, rank = port.name.lower(), len(port.dims)
    if re.search(r"past|cache(?!_position)|present", name):
        leading = 1 if rank == 5 else 0  # keys and values stacked: [2, batch, heads, past, size]
        if axis == leading:
            return "batch"
        return "encoder" if "encoder" in name else "past"
    if axis == 0:
        return "sequence" if rank == 1 and "position" in name else "batch"
    if port.dtype.startswith(("float", "bfloat")) and rank == 4 and "mask" not in name:
        return "side" if axis >= 2 else "other"
    if "encoder" in name and "decoder" not in name:
        return "encoder"
    if "mask" in name and (rank == 2 or axis == rank - 1):
        return "total"
    return "sequence" if axis == 1 or dtype(port.dtype).family == "int" else "other"


_GENERATION: dict[str, float] = {
    "min_length": 1, "num_beams": 2, "num_return_sequences": 1, "length_penalty": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "presence_penalty": 0.0, "seed": 0,
    "logits_processor": 0, "cross_qk_layer_head": 0, "extra_decoding_ids": 0, "early_stopping": 0,
}  # fmt: skip
"""Inputs of generation graphs (BeamSearch, GreedySearch, Sampling). Source: ONNX Runtime's ContribOperators.md."""


def _values(port: Port, shape: tuple[int, ...], sizes: Sizes, rng: np.random.Generator) -> Array:
    kind = dtype(port.dtype)
    if kind.family == "string":
        return np.full(shape, "a")
    if kind.family == "bool":
        return np.full(shape, "use_cache" not in port.name)
    if kind.family == "int":
        return _integers(port, shape, sizes, rng).astype(kind.numpy())
    if port.name in _GENERATION:
        return np.full(shape, _GENERATION[port.name]).astype(kind.numpy())
    if "mask" in port.name.lower():  # a float mask is added to scores when it has the scores' rank, else multiplied
        return np.full(shape, 0.0 if len(shape) == 4 else 1.0).astype(kind.numpy())
    return rng.standard_normal(shape).astype(kind.numpy())


def _integers(port: Port, shape: tuple[int, ...], sizes: Sizes, rng: np.random.Generator) -> Array:
    name, length = port.name.lower(), sizes.sequence
    if port.name in _GENERATION:
        return np.full(shape, _GENERATION[port.name])
    if port.name == "max_length":
        return np.full(shape, length + 6)
    if "global_attention" in name or "presence_mask" in name:
        return np.zeros(shape, np.int64)
    if "mask" in name:
        return np.ones(shape, np.int64)
    if "position" in name and shape:
        places = np.broadcast_to(np.arange(shape[-1]) + sizes.past, shape)
        return places if port.limit is None else places % port.limit
    if re.search(r"token_type|segment", name):
        return np.zeros(shape, np.int64)
    if re.search(r"seqlens|past_seq", name):  # GroupQueryAttention: index of the last valid key
        return np.full(shape, sizes.past + length - 1)
    if "total_seq" in name:
        return np.full(shape, sizes.past + length)
    if re.search(r"(^|_)(len|length|lengths)$", name):
        return np.full(shape, length)
    limit = port.limit or (100 if re.search(r"ids?$|token|^input", name) else 2)
    # 0, 1 and 2 are often padding, start and end, which models treat in ways of their own
    lowest = 3 if limit > 8 else 0
    return rng.integers(lowest, limit, size=shape)
