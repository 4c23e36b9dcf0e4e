"""Findings that are known: a file of them, so that only new ones count. Keyed by content, not by order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieaudit.checked import Checked, Judged
from tieaudit.errors import CorruptFile, UsageError
from tieaudit.replacing import replace_text
from tieaudit.whole import read_whole

SCHEMA = "tieaudit/baseline/1"
MAX_BYTES = 256_000_000
_ANEW = "if it is one that was spoilt, remove it and write one with --write-baseline"
Known = Mapping[tuple[str, str], int]
"""(path of the model, fingerprint) → how often."""


def read_baseline(path: Path) -> Known:
    """The findings of a baseline file. UsageError if it cannot be read, CorruptFile if it is another file."""
    return Counter((entry["path"], entry["fingerprint"]) for entry in _entries(path))


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(read_whole(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        hint = "write one with --write-baseline"
        raise UsageError(f"{path}: the baseline cannot be read: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: expected a baseline of tieaudit, found no JSON: {error}", hint=_ANEW) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, str) and schema != SCHEMA and schema.startswith(SCHEMA.rpartition("/")[0] + "/"):
        hint = "another version of tieaudit wrote it: use that one (pip install -U tieaudit for the newest)"
        raise CorruptFile(f"{path}: expected a baseline of version {SCHEMA}, found {schema[:80]}", hint=hint)
    entries = document.get("findings") if schema == SCHEMA else None
    if not isinstance(entries, list):
        raise CorruptFile(f"{path}: expected a baseline of tieaudit ({SCHEMA}), found another JSON file", hint=_ANEW)
    for index, entry in enumerate(entries):
        key = (entry.get("path"), entry.get("fingerprint")) if isinstance(entry, dict) else (None, None)
        if not all(isinstance(part, str) for part in key):
            raise CorruptFile(f"{path}: findings[{index}]: expected a path and a fingerprint, found {entry!r:.80}")
    return entries


def followed(known: Known, models: Sequence[tuple[str, Checked]], there: Callable[[str], bool]) -> Known:
    """What is known, with the findings of models that were moved under their new paths; `there`: whether a path is.

    A finding of a model that is not there any more stands for the same finding, once, in a model of which the baseline
    holds nothing: moving a folder makes nothing new, and a second copy of it does.
    """
    held = {key for key, _ in known}
    gone = {key for key in held.difference(key for key, _ in models) if not there(key)}
    left = Counter[str]()
    for (key, print_), n in known.items():
        left[print_] += n if key in gone else 0
    found = Counter({entry: n for entry, n in known.items() if entry[0] not in gone})
    for key, model in models:
        for one in model.findings if key not in held else ():
            if left[one.fingerprint] > 0:
                left[one.fingerprint] -= 1
                found[key, one.fingerprint] += 1
    for (key, print_), n in known.items():  # what found no new place stays where it was, to be counted as gone
        if key in gone and left[print_] > 0:
            found[key, print_] += min(n, left[print_])
            left[print_] -= min(n, left[print_])
    return found


def apart(model: Checked, key: str, known: Known) -> Checked:
    """The findings of a model that the baseline holds, set apart; `key`: how the baseline calls the model."""
    left = Counter({print_: known.get((key, print_), 0) for print_ in {one.fingerprint for one in model.findings}})
    new: list[Judged] = []
    old: list[Judged] = []
    for one in model.findings:
        if left[one.fingerprint] > 0:
            left[one.fingerprint] -= 1
            old.append(one)
        else:
            new.append(one)
    return replace(model, findings=tuple(new), known=tuple(old))


def write_baseline(path: Path, models: Iterable[tuple[str, Checked]], keep: Callable[[str], bool] | None = None) -> int:
    """Write all findings of these models, (key, model), as the baseline; how many there are. Atomic.

    `keep`: which models, by key, keep what the baseline holds of them, because nobody looked. Sorted and one finding a
    line, so that a review shows what came and went. UsageError or CorruptFile, with the file as it is, if there is one
    already that is no baseline.
    """
    before = _entries(path) if path.exists() else []  # also where nothing is kept: another file stays as it is
    kept = [json.dumps(entry) for entry in before if keep is not None and keep(entry["path"])]
    rows = [
        json.dumps(
            {
                "path": key,
                "code": one.finding.code,
                "ids": list(one.finding.ids),
                "fingerprint": one.fingerprint,
                "message": one.finding.message,
            }
        )
        for key, model in models
        for one in (*model.findings, *model.known)
    ]
    known = frozenset(kept)
    rows = sorted([*(row for row in rows if row not in known), *kept])
    lines = ",\n  ".join(rows)
    inside = f"\n  {lines}\n " if rows else ""
    replace_text(path, f'{{"schema": "{SCHEMA}",\n "findings": [{inside}]}}\n')
    return len(rows)
