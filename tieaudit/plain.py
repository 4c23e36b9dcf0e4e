"""Nouns as plain JSON values, for receipts and for every command's `--format json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass

from tieaudit.storage import Storage
from tieaudit.view import View


def plain(value: object) -> object:
    """A noun as JSON: dataclasses become objects with their kind, a storage only says how many bytes it holds.

    Infinities and NaN, which JSON cannot hold, become strings.
    """
    if isinstance(value, View):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Storage):
            return {"kind": type(value).__name__, "n_bytes": value.n_bytes}
        fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
