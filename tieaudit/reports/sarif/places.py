"""Where a SARIF result is: a file as a URI below the root, a line where there is one, the tensors as logical places."""

from __future__ import annotations

from collections.abc import Sequence

from tieaudit.printable import printable, shorten

BASE = "%SRCROOT%"
"""What relative URIs are relative to; GitHub takes the root of the repository."""
_LONGEST_PATH = 4096
"""Characters; no system opens a longer one."""
_N_MOST_NAMES = 10


def location(path: str, line: int, ids: Sequence[str] = ()) -> dict[str, object]:
    """A `location`. Without a line there is no region: line 1 of a file of weights is no place."""
    artifact: dict[str, object] = {"uri": uri(path)}
    if not path.startswith("/"):
        artifact["uriBaseId"] = BASE
    physical: dict[str, object] = {"artifactLocation": artifact}
    if line:
        physical["region"] = {"startLine": line}
    found: dict[str, object] = {"physicalLocation": physical}
    if ids:
        names = dict.fromkeys(printable(id) for id in ids[:_N_MOST_NAMES])  # shortened ones may agree; items may not
        found["logicalLocations"] = [{"fullyQualifiedName": name, "kind": "tensor"} for name in names]
    return found


def uri(path: str) -> str:
    """A path as a URI reference: relative, or `file:`; every byte that is not plain is percent-encoded (RFC 3986)."""
    from urllib.parse import quote

    path = shorten(path, _LONGEST_PATH) or "."
    try:
        raw = path.encode("utf-8", "surrogateescape")  # the bytes of a name that is not UTF-8, as the system has them
    except UnicodeEncodeError:
        raw = path.encode("utf-8", "surrogatepass")
    return ("file://" if path.startswith("/") else "") + quote(raw, safe="/")
