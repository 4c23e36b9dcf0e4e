"""Stage: Run → Run, with the findings that baselines hold set apart; or these baselines written.

Each model has the baseline of its own policy, unless one file is given for all: what is known does not depend on where
the check is started.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tieaudit.baseline import Known, apart, followed, read_baseline, write_baseline
from tieaudit.called import key_in
from tieaudit.checked import Checked, Run
from tieaudit.policy import Policy
from tieaudit.printable import counted
from tieaudit.whereabouts import shown

BASELINE = "tieaudit-baseline.json"
"""Where findings are written that no policy has a place for."""
PolicyOf = Callable[[str], Policy]
"""Path of a model, as the run shows it → the policy that rules it."""


def named_by(policy: Policy) -> Path | None:
    """The baseline that a policy names."""
    return Path(policy.root, policy.baseline) if policy.baseline else None


def set_apart(run: Run, given: Path | None, policy_of: PolicyOf) -> tuple[Run, tuple[str, ...]]:
    """The run with known findings set apart, and sentences about those that are gone.

    `given`: the baseline for all models; None: that of each one's policy. UsageError for a baseline that cannot be
    read, CorruptFile for another file.
    """
    groups: dict[Path, list[Checked]] = {given: []} if given is not None else {}
    for model in run.models:
        file = given or named_by(policy_of(model.path))
        if file is not None:
            groups.setdefault(file, []).append(model)
    base, found, notes = Path(run.root), dict[int, Checked](), list[str]()
    for file, models in groups.items():
        keyed, home = _keyed(models, base, file), Path(os.path.realpath(file.parent))
        known = followed(read_baseline(file), keyed, lambda key, home=home: os.path.lexists(home / key))  # type: ignore[misc]
        left = {id(model): apart(model, key, known) for key, model in keyed}
        notes += _gone(left, known, shown(file, base))
        found |= left
    return replace(run, models=tuple(found.get(id(model), model) for model in run.models)), tuple(notes)


def _keyed(models: Sequence[Checked], base: Path, file: Path) -> list[tuple[str, Checked]]:
    return [(key_in(base / model.path, file.parent), model) for model in models]


def _gone(left: Mapping[int, Checked], known: Known, file: str) -> list[str]:
    n_gone = sum(known.values()) - sum(len(model.known) for model in left.values())
    return [f"{counted(n_gone, 'known finding')} of {file} no longer found in this run"] if n_gone > 0 else []


def written(run: Run, given: Path | None, policy_of: PolicyOf, ruling: Policy, complete: bool) -> tuple[str, ...]:
    """Write what this run found as what is known, each model's to the baseline of its policy; sentences about it.

    `ruling`: whose baseline is written where no model was found. `complete`: the run was about all models, so that what
    the baselines hold of others is over. UsageError or CorruptFile, before any of them is written, if a file is there
    that is no baseline of ours.
    """

    def file_of(policy: Policy) -> Path:
        return given or named_by(policy) or Path(policy.root, BASELINE)

    base = Path(run.root)
    policies = {
        path: policy_of(path) for path in [*(one.path for one in run.models), *(path for path, _ in run.errors)]
    }
    files = {file_of(policy): policy for policy in policies.values()} or {file_of(ruling): ruling}
    for file in files:
        if file.exists():
            read_baseline(file)
    notes = []
    for file, policy in files.items():
        models = [model for model in run.models if file_of(policies[model.path]) == file]
        unnamed = given is None and not policy.baseline
        if unnamed and len(files) > 1 and not any(model.findings for model in models):
            continue  # a file in each folder that has a policy, to say nothing
        unread = {key_in(base / path, file.parent) for path, _ in run.errors if file_of(policies[path]) == file}
        n = _write(_keyed(models, base, file), unread, file, complete)
        hint = f'; to have it read, say baseline = "{BASELINE}" in the policy' if unnamed else ""
        notes.append(f"wrote {counted(n, 'known finding')} to {shown(file, base)}{hint}")
    return tuple(notes)


def _write(keyed: Sequence[tuple[str, Checked]], unread: set[str], file: Path, complete: bool) -> int:
    """Write one baseline; what nobody looked at keeps its entries."""
    seen = {key for key, model in keyed if model.weights_here and not model.unreadable}
    unseen = unread | ({key for key, _ in keyed} - seen)
    whole = complete and not unseen
    return write_baseline(file, keyed, None if whole else lambda key: key in unseen or not complete and key not in seen)
