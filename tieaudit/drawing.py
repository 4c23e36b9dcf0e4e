"""A picture of what could be shared: bytes saved against damage, with the front of what nothing beats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tieaudit.comparison import Choice
from tieaudit.errors import RewriteRefused


def draw(choices: Sequence[Choice], front: Sequence[Choice], path: Path) -> None:
    """Write a .png or .svg that does not exist yet. RewriteRefused if it cannot be written. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    choices = [one for one in choices if not one.refused]
    nats = any(one.rise is not None for one in front)
    if nats:  # shares of energy have no place on an axis of nats
        choices = [one for one in choices if one.rise is not None or not one.policy]
    axes.scatter([one.n_bytes_saved / 1e6 for one in choices], [one.damage for one in choices], s=14, color="#9aa5b1")
    axes.plot([one.n_bytes_saved / 1e6 for one in front], [one.damage for one in front], "o-", color="#1f6feb")
    for one in front:
        label = f"{one.scheme} {one.policy}".strip()
        axes.annotate(
            label, (one.n_bytes_saved / 1e6, one.damage), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    axes.set_xlabel("saved, MB")
    axes.set_ylabel("rise of the loss, nats a token" if nats else "share of the weights' energy that changes")
    axes.grid(alpha=0.3)
    beside = path.with_name(f".{path.stem[:60]}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(beside)
        os.link(beside, path)  # fails if somebody else took the name meanwhile
    except OSError as error:
        raise RewriteRefused(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
