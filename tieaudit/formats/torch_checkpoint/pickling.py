"""Writing the pickle of a state dict, opcode by opcode, as `torch.save` does: protocol 2, nothing imported.

Source: torch/serialization.py `_save` (persistent ids), torch/_tensor.py `_reduce_ex_internal` (which rebuild function
with which arguments), torch/storage.py `_new_dtypes` (no typed storage), 2.13; CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_checkpoint.rebuild import STORAGE_TYPES

_TYPED: Mapping[str, str] = {
    dtype: f"{name}Storage" for name, dtype in STORAGE_TYPES.items() if not name.startswith(("Q", "Untyped"))
}
"""Element type → the typed storage of `torch` that holds it."""
UNTYPED = frozenset(
    "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
)
"""Element types that came after typed storages: the tensor itself says its type."""
_MAX_DEPTH = 50


@dataclass(frozen=True)
class Stepped:
    """A tensor of the state dict: how it steps through a storage of the archive."""

    name: str
    key: str
    """Of the storage: its member is `data/<key>`."""
    dtype: str
    n_stored: int
    """Size of the storage: elements where it is typed, else bytes."""
    offset: int
    """Elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements."""
    typed: bool
    """Whether the storage has one element type, that of all its tensors, for which PyTorch has a typed storage."""


def can_hold(dtype: str) -> bool:
    """Whether PyTorch has this element type, whole bytes each."""
    return dtype in _TYPED or dtype in UNTYPED


def is_typed(dtype: str) -> bool:
    """Whether a storage can have this element type."""
    return dtype in _TYPED


class NotPlain(Exception):
    """A value that is more than texts, numbers and containers of them."""


def pickled(tensors: Iterable[Stepped], metadata: object = None) -> bytes:
    """An `OrderedDict` of the tensors in their order; `metadata`, if not None, as its attribute `_metadata`.

    NotPlain for metadata of other than plain values; RewriteRefused for an element type that PyTorch lacks.
    """
    writer = _Writer()
    writer.new_ordered()
    writer.code(b"(")
    for tensor in tensors:
        writer.text(tensor.name)
        writer.tensor(tensor)
    writer.code(b"u")
    if metadata is not None:
        writer.code(b"}")
        writer.text("_metadata")
        writer.plain(metadata, ordered=True)
        writer.code(b"sb")
    return b"\x80\x02" + bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self._known: dict[tuple[str, str], int] = {}

    def code(self, code: bytes) -> None:
        self.out += code

    def name(self, module: str, name: str) -> None:
        """A module's attribute; looked up in the memo the second time."""
        if not self._again("global", f"{module} {name}"):
            self.out += f"c{module}\n{name}\n".encode()
            self._remember("global", f"{module} {name}")

    def text(self, text: str, *, often: bool = False) -> None:
        if often and self._again("text", text):
            return
        data = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data
        if often:
            self._remember("text", text)

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def integers(self, values: tuple[int, ...]) -> None:
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.integer(value)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) < 4 else b"t"

    def new_ordered(self) -> None:
        self.name("collections", "OrderedDict")
        self.out += b")R"

    def tensor(self, tensor: Stepped) -> None:
        if not can_hold(tensor.dtype):
            raise RewriteRefused(f"tensor {tensor.name!r}: PyTorch has no element type {tensor.dtype}")
        self.name("torch._utils", "_rebuild_tensor_v2" if tensor.typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage", often=True)
        if tensor.typed:
            self.name("torch", _TYPED[tensor.dtype])
        else:
            self.name("torch.storage", "UntypedStorage")
        self.text(tensor.key)
        self.text("cpu", often=True)
        self.integer(tensor.n_stored)
        self.out += b"tQ"
        self.integer(tensor.offset)
        self.integers(tensor.shape)
        self.integers(tensor.strides)
        self.out += b"\x89"
        self.new_ordered()
        if not tensor.typed:
            self.name("torch", tensor.dtype)
        self.out += b"tR"

    def plain(self, value: object, depth: int = 0, *, ordered: bool = False) -> None:
        if depth > _MAX_DEPTH:
            raise NotPlain
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int) and value.bit_length() < 2000:
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.text(value, often=len(value) < 30)
        elif isinstance(value, dict):
            self.new_ordered() if ordered else self.code(b"}")
            self.code(b"(")
            for key, one in value.items():
                if not isinstance(key, (str, int)):
                    raise NotPlain
                self.plain(key, depth + 1)
                self.plain(one, depth + 1)
            self.code(b"u")
        elif isinstance(value, (list, tuple)):
            self.code(b"](" if isinstance(value, list) else b"(")
            for one in value:
                self.plain(one, depth + 1)
            self.code(b"e" if isinstance(value, list) else b"t")
        else:
            raise NotPlain

    def _again(self, kind: str, text: str) -> bool:
        number = self._known.get((kind, text))
        if number is None:
            return False
        self.out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        return True

    def _remember(self, kind: str, text: str) -> None:
        number = self._known[kind, text] = len(self._known)
        self.out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)
