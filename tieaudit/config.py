"""Settings and thresholds: one table, from which the documentation page is made.

A threshold silences findings. It never removes a tie from the list or a byte from the totals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _setting(default: int, unit: str, meaning: str, silences: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"unit": unit, "meaning": meaning, "silences": silences})


@dataclass(frozen=True)
class Settings:
    """Every number that somebody may want to change, with its default, unit and meaning."""

    min_n_bytes: int = _setting(
        1024,
        "bytes",
        "a tie, a stored copy or a fold that concerns fewer bytes is no finding",
        ("TIE102", "TIE103", "TIE104", "TIE201", "TIE202", "TIE203", "TIE204", "TIE206", "TIE207", "TIE301"),
    )
    min_n_bytes_constants: int = _setting(
        65_536,
        "bytes",
        "copies of buffers, masks and constants that together take fewer bytes are no finding",
        ("TIE205",),
    )
    n_most_ties: int = _setting(8, "ties", "the text report lists this many of each origin and counts the rest")
    n_most_members: int = _setting(8, "weights", "the text report lists this many members of one tie")
    n_most_findings: int = _setting(12, "findings", "the text report lists this many findings, and cannot-tells")

    def threshold(self, code: str) -> int:
        """Bytes under which findings of the rule `code` are silenced; 0 for a rule without a threshold."""
        return max((int(getattr(self, row.name)) for row in rows() if code in row.silences), default=0)


DEFAULTS = Settings()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    default: int
    unit: str
    meaning: str
    silences: tuple[str, ...]
    """Codes of the rules whose findings it silences."""


def rows() -> tuple[Row, ...]:
    """The table, in the order of `Settings`."""
    return tuple(
        Row(
            entry.name,
            getattr(Settings, entry.name),
            entry.metadata["unit"],
            entry.metadata["meaning"],
            entry.metadata["silences"],
        )
        for entry in fields(Settings)
    )


def page() -> str:
    """The documentation page of the table, as Markdown."""
    lines = [
        "# Thresholds and settings",
        "",
        "A threshold silences findings and counts them; ties, totals and JSON groups are never affected.",
        "",
        "| name | default | unit | meaning | silences |",
        "|---|--:|---|---|---|",
    ]
    for row in rows():
        lines.append(f"| `{row.name}` | {row.default:,} | {row.unit} | {row.meaning} | {', '.join(row.silences)} |")
    return "\n".join(lines) + "\n"
