"""What the functions mean that PyTorch's pickles call: a tensor as a step through a named storage. Nothing is read.

Source: torch/_utils.py (`_rebuild_…`), torch/serialization.py (`persistent_load`), torch/_tensor.py
(`_reduce_ex_internal`), torch/jit/_pickle.py; version 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tieaudit.errors import CorruptFile
from tieaudit.formats.torch_checkpoint.pickles import Global, Made, Ordered
from tieaudit.formats.torch_checkpoint.stream import Blob

_STORAGES = (
    "Double:float64 Float:float32 Half:float16 BFloat16:bfloat16 Long:int64 Int:int32 Short:int16 Char:int8 Byte:uint8 "
    "Bool:bool ComplexDouble:complex128 ComplexFloat:complex64 QInt8:int8 QUInt8:uint8 QInt32:int32 QUInt4x2:uint8 "
    "QUInt2x4:uint8 Untyped:uint8"
)
STORAGE_TYPES: Mapping[str, str] = dict(entry.split(":") for entry in _STORAGES.split())
"""`torch.<name>Storage` → element type; codes of quantised ones as the integers that they are."""
_OTHER_NAMES = {
    "double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32", "short": "int16",
    "cdouble": "complex128", "cfloat": "complex64", "qint8": "int8", "quint8": "uint8", "qint32": "int32",
    "float4_e2m1fn_x2": "uint8",
}  # fmt: skip
_ONLY_BYTES = frozenset({"qint8", "quint8", "qint32", "float4_e2m1fn_x2"})
_PARAMETERS = ("torch.nn.parameter.Parameter", "torch.nn.parameter.UninitializedParameter")
_BUFFERS = ("torch.nn.parameter.Buffer", "torch.nn.Buffer")
_MAX_AXES = 64


@dataclass(frozen=True, eq=False, slots=True)
class Bytes:
    """A storage that a pickle names: where it is, is the container's business."""

    key: str
    dtype: str
    n_elements: int
    begin: int = 0
    """Elements into the storage, where this is a view of it (before PyTorch 0.4)."""


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor as its pickle describes it."""

    stored: Bytes | None
    """None: on the meta device, no values."""
    dtype: str
    offset: int
    """Elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    parameter: bool | None = None
    """True: saved as a Parameter; False: as a Buffer; None: a plain tensor."""
    because: str = ""
    spelt: str = ""
    """Its element type as PyTorch calls it, where `dtype` only says how its bytes are compared."""
    odd: str = ""
    """Why its bytes are not its values, e.g. a lazy conjugation; empty for nearly all."""


@dataclass(frozen=True, eq=False, slots=True)
class Parts:
    """One tensor that is stored as several: sparse, quantised."""

    tensors: Mapping[str, object]
    kind: str


@dataclass(frozen=True, eq=False, slots=True)
class Embedded:
    """A numpy array whose bytes lie in the pickle itself."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | Blob
    fortran: bool


class Rebuilder:
    """Gives `Machine` its answers. `where` is for messages."""

    def __init__(self, where: str) -> None:
        self.where = where

    def persistent(self, saved: object) -> object:
        """A persistent id: `("storage", type, key, location, numel[, view])`, or before 1.6 `("module", class, …)`."""
        if isinstance(saved, tuple) and len(saved) >= 2 and saved[0] == "module":
            return saved[1]
        if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] != "storage":
            raise CorruptFile(f"{self.where}: expected the id of a storage, found another value")
        _, kind, key, _, count = saved[:5]
        dtype = storage_dtype(kind)
        if dtype is None:
            name = kind.name if isinstance(kind, Global) else type(kind).__name__
            raise CorruptFile(f"{self.where}: expected a type of storage, found {name[:80]}")
        if not isinstance(key, (str, int)) or not _is_size(count):
            raise CorruptFile(f"{self.where}: expected a storage's key and its number of elements, found others")
        begin = 0
        if len(saved) == 6 and isinstance(saved[5], tuple):
            if len(saved[5]) != 3 or not _is_size(saved[5][1]) or not _is_size(saved[5][2]):
                raise CorruptFile(
                    f"{self.where}: storage {key!r}: expected a view (key, offset, size), found another value"
                )
            begin, view_count = saved[5][1:]
            if begin + view_count > count:
                raise CorruptFile(f"{self.where}: storage {key!r}: expected a view inside it, found one beyond its end")
            return Bytes(str(key), dtype, count, begin)
        return Bytes(str(key), dtype, count)

    def call(self, function: Global, args: tuple[Any, ...]) -> object:
        known = _KNOWN.get(function.name)
        if known is None:
            return NotImplemented
        try:
            return known(self, *args)
        except (TypeError, IndexError, ValueError, KeyError, AttributeError):
            raise CorruptFile(f"{self.where}: {function.name}: expected its usual arguments, found others") from None

    def tensor_v2(self, stored: object, offset: object, size: object, stride: object, *more: Any) -> object:
        metadata = more[2] if len(more) > 2 else None
        return self._tensor(stored, offset, size, stride, None, metadata)

    def tensor_v3(
        self, stored: object, offset: object, size: object, stride: object, grad: object, hooks: object, dtype: object,
        metadata: object = None,
    ) -> object:  # fmt: skip
        spelt = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
        return self._tensor(
            stored, offset, size, stride, dtype_name(dtype), metadata, spelt if spelt in _ONLY_BYTES else ""
        )

    def _tensor(
        self, stored: object, offset: object, size: object, stride: object, dtype: str | None, metadata: object,
        spelt: str = "",
    ) -> Tensor:  # fmt: skip
        if not isinstance(stored, Bytes):
            raise TypeError
        shape, strides = _sizes(size), _sizes(stride)
        where = f"{self.where}: a tensor of storage {stored.key!r}"
        if shape is None or strides is None or len(shape) != len(strides) or len(shape) > _MAX_AXES:
            raise CorruptFile(
                f"{where}: expected sizes and strides that are not negative, one of each, found {size} {stride}"[:400]
            )
        if not _is_size(offset):
            raise CorruptFile(f"{where}: expected an offset of at least 0, found {offset}"[:400])
        odd = ""
        if isinstance(metadata, dict) and any(metadata.get(bit) for bit in ("conj", "neg")):
            odd = "its values are stored as their conjugates or negatives"
        assert isinstance(offset, int)
        return Tensor(stored, dtype or stored.dtype, offset, shape, strides, spelt=spelt, odd=odd)

    def parameter(self, data: object, grad: object = None, *more: object) -> object:
        if isinstance(data, Parts):
            return Parts({name: self.parameter(one) for name, one in data.tensors.items()}, data.kind)
        if not isinstance(data, Tensor):
            return NotImplemented
        return replace(data, parameter=True, because="saved as a Parameter")

    def buffer(self, data: object, *more: object) -> object:
        if not isinstance(data, Tensor):
            return NotImplemented
        return replace(data, parameter=False, because="saved as a Buffer")

    def meta(self, dtype: object, size: object, *more: object) -> object:
        shape, name = _sizes(size), dtype_name(dtype)
        if shape is None or name is None:
            raise ValueError
        return Tensor(None, name, 0, shape, (), because="on the meta device: no values were saved")

    def quantised(
        self, stored: object, offset: object, size: object, stride: object, params: Any, *more: Any
    ) -> object:
        codes = self._tensor(stored, offset, size, stride, None, None)
        scheme, *numbers = params
        found: dict[str, object] = {"codes": replace(codes, because="codes of a quantised tensor", parameter=None)}
        for name, value in zip(("scales", "zero_points"), numbers, strict=False):
            if isinstance(value, (Tensor, Parts)):
                found[name] = value
        return Parts(found, f"quantised {getattr(scheme, 'name', '')}")

    def sparse(self, layout: object, data: Any) -> object:
        names = ("indices", "values") if len(data) < 4 or isinstance(data[3], bool) else ("rows", "columns", "values")
        return Parts(dict(zip(names, data, strict=False)), "sparse")

    def from_cpu(self, data: object, dtype: object, *more: object) -> object:
        name = dtype_name(dtype)
        if isinstance(data, Tensor) and name != data.dtype:
            return replace(data, odd=f"it is converted from {data.dtype} to {name} when it is loaded")
        if isinstance(data, Embedded) and name != data.dtype:
            raise CorruptFile(f"{self.where}: a tensor that is to be converted from {data.dtype} to {name} is not read")
        return data

    def from_type(self, function: object, kind: object, args: Any, state: object, *more: object) -> object:
        """A subclass, or a tensor with attributes: what it is made from, unless its own state holds the tensors."""
        made = self.call(function, args) if isinstance(function, Global) else NotImplemented
        if isinstance(made, (Tensor, Parts)):
            name = kind.name if isinstance(kind, Global) else ""
            is_buffer = name in _BUFFERS or (isinstance(state, dict) and state.get("_is_buffer") is True)
            return self.parameter(made) if name in _PARAMETERS else self.buffer(made) if is_buffer else made
        placeholder = Made(kind, args)
        placeholder.state = state
        return placeholder

    def built(self, made: object, state: object) -> object:
        """`BUILD`: the values of a numpy array, or of a tensor as it was pickled before 0.3."""
        if not isinstance(made, Made) or not isinstance(state, tuple):
            return NotImplemented
        if made.name.endswith("multiarray._reconstruct") and len(state) == 5:
            return _numpy(state)
        if made.name.startswith("torch.") and made.name.endswith("Tensor") and len(state) == 4:
            return self._tensor(*state, None, None) if isinstance(state[0], Bytes) else NotImplemented
        return NotImplemented


def _numpy(state: tuple[Any, ...]) -> object:
    """`ndarray.__setstate__`: (version, shape, dtype, is Fortran order, bytes)."""
    _, size, kind, fortran, data = state
    if isinstance(data, Made) and data.name == "_codecs.encode" and isinstance(data.args, tuple) and data.args:
        data = data.args[0].encode("latin-1") if isinstance(data.args[0], str) else data.args[0]
    shape = _sizes(size)
    if not isinstance(kind, Made) or not isinstance(kind.args, tuple) or shape is None or isinstance(data, list):
        return NotImplemented
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    name = _NUMPY.get(str(kind.args[0]))
    if name is None or order == ">" or not isinstance(data, (bytes, Blob)):
        return NotImplemented
    return Embedded(name, shape, data, bool(fortran))


_NUMPY = {
    "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool", "c8": "complex64", "c16": "complex128",
}  # fmt: skip


def storage_dtype(kind: object) -> str | None:
    """Element type of a storage class such as `torch.FloatStorage` or `torch.cuda.HalfStorage`."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    return STORAGE_TYPES.get(name.removesuffix("Storage")) if name.endswith("Storage") else None


def dtype_name(kind: object) -> str | None:
    """Element type of `torch.float32` and its like, under the name of `dtypes.TABLE` where that has it."""
    if not isinstance(kind, Global) or not kind.name.startswith("torch."):
        return None
    name = kind.name.removeprefix("torch.")
    return _OTHER_NAMES.get(name, name)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, (tuple, list)) or not all(map(_is_size, value)):
        return None
    return tuple(value)


def _ordered(self: Rebuilder, pairs: Any = (), *more: object) -> object:
    """An OrderedDict, Counter or defaultdict: a dictionary. Python 2 gave the items as a list of pairs."""
    if isinstance(pairs, dict):
        return Ordered(pairs)
    named = [pair for pair in pairs if isinstance(pair[0], (str, int))] if isinstance(pairs, list) else []
    return Ordered((pair[0], pair[1]) for pair in named)


def _first(self: Rebuilder, value: object, *more: object) -> object:
    return value


def _size(self: Rebuilder, sizes: Any = (), *more: object) -> object:
    return tuple(sizes)


_KNOWN: Mapping[str, Callable[..., object]] = {
    "build": Rebuilder.built,
    "torch._utils._rebuild_tensor": Rebuilder.tensor_v2,
    "torch._utils._rebuild_tensor_v2": Rebuilder.tensor_v2,
    "torch._utils._rebuild_tensor_v3": Rebuilder.tensor_v3,
    "torch._utils._rebuild_parameter": Rebuilder.parameter,
    "torch._utils._rebuild_parameter_with_state": Rebuilder.parameter,
    "torch._utils._rebuild_qtensor": Rebuilder.quantised,
    "torch._utils._rebuild_sparse_tensor": Rebuilder.sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": Rebuilder.meta,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": Rebuilder.from_cpu,
    "torch._utils._rebuild_device_tensor_from_numpy": Rebuilder.from_cpu,
    "torch._utils._rebuild_xla_tensor": Rebuilder.from_cpu,
    "torch._tensor._rebuild_from_type_v2": Rebuilder.from_type,
    **{name: Rebuilder.parameter for name in _PARAMETERS},
    **{name: Rebuilder.buffer for name in _BUFFERS},
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "collections.defaultdict": _ordered,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
