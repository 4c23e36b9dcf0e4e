"""One table of element types for the whole tool, under numpy / ml_dtypes names.

A name not in the table is refused by the loaders (CorruptFile), never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tieaudit.errors import CorruptFile

if TYPE_CHECKING:
    import numpy as np

Family = Literal["float", "int", "bool", "complex", "string"]


@dataclass(frozen=True)
class DType:
    """An element type: its canonical name, width and family."""

    name: str
    n_bits: int
    """Width of one element in bits; 0 for strings, whose size is their content."""
    family: Family

    def n_bytes(self, n_elements: int) -> int:
        """Bytes of `n_elements` packed elements, the last byte padded."""
        return (n_elements * self.n_bits + 7) // 8

    @property
    def item_bytes(self) -> int | None:
        """Whole bytes of one element, or None for packed sub-byte types and strings."""
        return self.n_bits // 8 if self.n_bits and self.n_bits % 8 == 0 else None

    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype that holds one element (unpacked for sub-byte types)."""
        import numpy as np

        try:
            return np.dtype(self.name)
        except TypeError:
            import ml_dtypes

            extended: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, self.name))
            return extended


_ROWS: tuple[tuple[Family, str], ...] = (
    (
        "float",
        "float64:64 float32:32 float16:16 bfloat16:16 float8_e4m3fn:8 float8_e4m3fnuz:8 float8_e5m2:8 "
        "float8_e5m2fnuz:8 float8_e8m0fnu:8 float4_e2m1fn:4 float6_e2m3fn:6 float6_e3m2fn:6",
    ),
    ("int", "int64:64 int32:32 int16:16 int8:8 uint64:64 uint32:32 uint16:16 uint8:8 int4:4 uint4:4 int2:2 uint2:2"),
    ("bool", "bool:8"),
    ("complex", "complex64:64 complex128:128"),
    ("string", "string:0"),
)
TABLE: dict[str, DType] = {
    name: DType(name, int(bits), family)
    for family, row in _ROWS
    for name, bits in (entry.split(":") for entry in row.split())
}


def dtype(name: str) -> DType:
    """The table's entry for a canonical name; CorruptFile if there is none."""
    try:
        return TABLE[name]
    except KeyError:
        raise CorruptFile(f"expected an element type that tieaudit knows, found {name!r}") from None
