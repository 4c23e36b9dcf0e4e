"""The bytes of live tensors: where they are, read in blocks, whatever their type, layout and device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tieaudit.dtypes import TABLE
from tieaudit.errors import UnreadableModel
from tieaudit.regions import overlapping
from tieaudit.storage import Region

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TensorStorage:
    """A tensor of this process. Holding it keeps its memory: freed addresses are used again by other tensors.

    Region: bytes of one block of memory, from the first element to behind the last; with `strides` the tensor lies
    there in another order than row by row, or with gaps.
    """

    tensor: torch.Tensor = field(repr=False)
    region: Region
    n_bytes: int
    strides: tuple[int, ...] | None = None
    no_values: str = ""
    """Why there are no bytes to be read, e.g. on the meta device; empty where there are."""

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Bytes of the tensor as if it lay row by row. UnreadableModel where it has no values.

        Cost: what is asked for, and up to two rows more where the tensor is not contiguous; never the whole tensor.
        """
        if self.no_values:
            raise UnreadableModel(f"expected the values of a tensor, found none: {self.no_values}")
        return [self._read(begin, length) for begin, length in ranges]

    def stretch(self, begin: int, end: int) -> TensorStorage | None:
        """The bytes from `begin` to `end` as they lie in memory, both as in `region`; None where this memory ends
        earlier, or where values are not as they are stored (lazy conjugates)."""
        import torch

        tensor = self.tensor.detach()
        if self.no_values or tensor.is_conj() or tensor.is_neg():
            return None
        first = tensor.storage_offset() * tensor.element_size() + begin - self.region[1]
        memory = tensor.untyped_storage()
        if first < 0 or first + end - begin > memory.nbytes():
            return None
        plain = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, first, (end - begin,), (1,))
        return TensorStorage(plain, (self.region[0], begin, end), end - begin)

    def _read(self, begin: int, length: int) -> bytes:
        if length <= 0:
            return b""
        item = self.tensor.element_size()
        first, last = begin // item, -(-(begin + length) // item)
        data = _as_bytes(_elements(self.tensor.detach(), first, last))
        return data[begin - first * item : begin - first * item + length]

    def __reduce__(self) -> Any:
        raise TypeError("a live tensor belongs to its process; save the module to a file first")


def _elements(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Elements `first` to `last`, row by row, of a tensor of any strides."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)[first:last]
    n_rows = tensor.shape[0]
    row = tensor.numel() // n_rows
    begin, end = first // row, -(-last // row)
    if end - begin == 1:
        return _elements(tensor[begin], first - begin * row, last - begin * row)
    return tensor[begin:end].reshape(-1)[first - begin * row : last - begin * row]


def _as_bytes(flat: torch.Tensor) -> bytes:
    import torch

    flat = flat.resolve_conj().resolve_neg().contiguous()  # lazy views of complex tensors hold other bytes
    if flat.numel() == 1:
        flat = flat.as_strided((1,), (1,))  # of any stride, and contiguous all the same
    data: bytes = flat.view(torch.uint8).cpu().numpy().tobytes()
    return data


def dtype_name(dtype: torch.dtype) -> tuple[str, str]:
    """Canonical name of an element type, and what must be said about it: a type unknown here is raw bytes."""
    name = str(dtype).removeprefix("torch.")
    if name in TABLE and TABLE[name].item_bytes == dtype.itemsize:
        return name, ""
    n_bits = 8 * dtype.itemsize
    return f"uint{n_bits}", f"elements of torch type {name}, compared as {n_bits} bits each"


def reason_without_values(tensor: torch.Tensor) -> str:
    """Why the values of a tensor cannot be read here, or empty."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        return f"it is a {type(tensor).__name__}, whose values lie in the tensors inside it"
    if type(tensor).__name__ in ("FakeTensor", "FunctionalTensor"):
        return "it is a fake tensor"
    if tensor.device.type == "meta":
        return "it is on the meta device"
    if tensor.layout != torch.strided:
        return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "it is a quantized tensor"
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        return "its memory was given back (sharded or offloaded)"
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return f"memory of the device {tensor.device.type} cannot be looked at"
    return ""


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a wrapper subclass (DTensor, quantized tensors …), else the tensor itself."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]  # a DTensor names its mesh, too
    return [inner for part in parts if isinstance(part, torch.Tensor) for inner in inner_tensors(part)]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor that this process holds whole; any other tensor as it is.

    Of a part of a tensor equality says nothing about the rest, and what another wrapper makes of one tensor inside
    (a scale, a mask) only its class knows.
    """
    if type(tensor).__name__ != "DTensor":
        return tensor
    inner = inner_tensors(tensor)
    whole = len(inner) == 1 and inner[0].shape == tensor.shape and inner[0].dtype == tensor.dtype
    return inner[0] if whole and _replicated(tensor) else tensor


def _replicated(tensor: Any) -> bool:
    """Whether the local tensor is the value: a partial sum has the shape of the whole, and is not it."""
    return not any(placement.is_partial() for placement in tensor.placements)


def _wrapping(tensor: torch.Tensor) -> tuple[str, str]:
    """The class of a wrapper, and what it knows besides the tensors inside: another scale is another value."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return "", ""
    return type(tensor).__qualname__, repr(tensor.__tensor_flatten__()[1])


Identity = tuple[Any, ...]


def identity(tensor: torch.Tensor) -> Identity:
    """Equal for two tensors exactly if they are one view of one memory: (storage, offset, size, stride) and type.

    Valid as long as the tensors are held: freed addresses are used again.
    """
    import torch

    tensor = plain(tensor)
    found: list[Any] = [str(tensor.dtype), tuple(tensor.shape), _wrapping(tensor)]
    for inner in inner_tensors(tensor):
        if inner.layout != torch.strided:
            found.append(id(inner))
            continue
        place = _place(inner)
        found.append((*place, tuple(inner.shape), tuple(inner.stride())))
    return tuple(found)


def _place(tensor: torch.Tensor) -> tuple[str, int, int]:
    """(device, memory, offset in bytes): by address where there is one, else by the storage object itself."""
    storage = tensor.untyped_storage()
    offset = tensor.storage_offset() * tensor.element_size()
    device = str(tensor.device) + " conjugated" * tensor.is_conj() + " negated" * tensor.is_neg()  # other values
    if not reason_without_values(tensor):
        return device, 0, storage.data_ptr() + offset
    return f"{device} storage", storage._cdata, offset


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last one in memory."""
    if not tensor.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((reach + 1) * tensor.element_size())


def locate(tensors: Iterable[torch.Tensor]) -> list[TensorStorage]:
    """A storage for every tensor, in order. Overlapping memory, however many storages name it, is one container.

    Containers are numbered in the order of first appearance, so that equal modules have equal regions.
    """
    held = [plain(tensor) for tensor in tensors]
    reasons = [reason_without_values(tensor) for tensor in held]
    blocks = [_block(tensor, reason) for tensor, reason in zip(held, reasons, strict=True)]
    together = {index: group for group in overlapping(blocks) for index in group}
    numbers: dict[Any, tuple[str, int]] = {}
    found = []
    for index, (tensor, reason) in enumerate(zip(held, reasons, strict=True)):
        group = together.get(index, [index])
        key = (blocks[index][0], min(group))
        if key not in numbers:
            numbers[key] = (f"storage {len(numbers) + 1}", min(blocks[one][1] for one in group))
        name, begin = numbers[key]
        found.append(_storage(tensor, reason, name, blocks[index][1] - begin))
    return found


def _block(tensor: torch.Tensor, reason: str) -> tuple[str, int, int]:
    """The bytes of a tensor in memory; of one that cannot be looked at, a place of its own that only it names."""
    import torch

    if tensor.layout != torch.strided or len(inner_tensors(tensor)) != 1 or inner_tensors(tensor)[0] is not tensor:
        return f"object {identity(tensor)}", 0, max(tensor.numel() * tensor.element_size(), 1)
    device, memory, offset = _place(tensor)
    return (f"{device} {memory}" if reason else device), offset, offset + extent(tensor)


def _storage(tensor: torch.Tensor, reason: str, name: str, offset: int) -> TensorStorage:
    n_bytes = tensor.numel() * tensor.element_size()
    plain = not tensor.is_sparse and inner_tensors(tensor)[0] is tensor and str(tensor.layout) == "torch.strided"
    strides = tuple(tensor.stride()) if plain and not tensor.is_contiguous() else None
    reach = extent(tensor) if plain else n_bytes
    return TensorStorage(tensor, (name, offset, offset + reach), n_bytes, strides, reason)
