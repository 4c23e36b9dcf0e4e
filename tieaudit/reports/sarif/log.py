"""The SARIF log: one run, its rules, results and notifications, made smaller until it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tieaudit import __version__
from tieaudit.checked import Run
from tieaudit.reports.sarif.descriptors import descriptors
from tieaudit.reports.sarif.places import BASE
from tieaudit.reports.sarif.results import grouped, notifications, result
from tieaudit.tally import from_the_top, tally

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_N_MOST_RESULTS = 5000
"""Of one run: GitHub keeps no more, and rejects a file with 25,000."""
_N_MOST_BYTES = 10_000_000
"""Of the file, compressed by gzip."""
_N_MOST_INDENTED = 200


def of_run(run: Run, settings: Mapping[str, object]) -> str:
    """The log as text. Cost: linear; where names that do not compress make it too large, a few times that."""
    run, n_most = from_the_top(run), _N_MOST_RESULTS
    text = _log(run, n_most)
    while n_most > 1 and _n_bytes_uploaded(text) > _N_MOST_BYTES:
        n_most //= 2
        text = _log(run, n_most)
    return text


def _n_bytes_uploaded(text: str) -> int:
    if len(text) < _N_MOST_BYTES:  # ASCII; compressing what is small enough anyway takes time
        return len(text)
    import zlib

    return len(zlib.compress(text.encode(), 6))


def _log(run: Run, n_most: int) -> str:
    rules = descriptors(run)
    index = {str(rule["id"]): position for position, rule in enumerate(rules)}
    groups = grouped(run, n_most)
    compared = bool(run.facts.get("baseline")) or any(model.known for model in run.models)
    seen: dict[tuple[str, str], int] = {}
    counts = tally(run)
    log = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "tieaudit", "version": __version__, "rules": rules}},
                "invocations": [
                    {
                        "executionSuccessful": not (counts.n_not_read or counts.n_crashed),
                        "toolExecutionNotifications": notifications(run, index),
                    }
                ],
                "originalUriBaseIds": {BASE: {"description": {"text": "the root of the repository"}}},
                "results": [result(group, index, compared, seen) for group in groups],
                "properties": {
                    "verdict": counts.verdict,
                    "n_findings_folded": sum(len(group.members) - 1 for group in groups),
                },
            }
        ],
    }
    indent = 1 if len(groups) <= _N_MOST_INDENTED else None
    # ASCII, and no `##` that a runner may take for a command where the log is printed
    return json.dumps(log, indent=indent, ensure_ascii=True, allow_nan=False).replace("##", "#\\u0023") + "\n"
