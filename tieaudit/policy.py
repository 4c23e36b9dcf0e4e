"""The policy of a model repository: what its owners select, expect, limit and let pass.

One file rules a folder and all below it, `tieaudit.toml` or `[tool.tieaudit]` in `pyproject.toml`; `govern.py` reads
it.
Per-path sections add to what the file says for all, and the last one that matches has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING

from tieaudit.config import DEFAULTS, Settings
from tieaudit.ignored import patterns
from tieaudit.verdict import NO_DEMANDS, Demands, Severity

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


@dataclass(frozen=True)
class Suppression:
    """One finding that the owners know and accept: which rule, on which weight, and why."""

    code: str
    weight: str
    """Id of a weight, or a pattern of ids (`*` and `?`); never one that matches every id."""
    reason: str
    path: str = ""
    """Pattern of the models it speaks of, relative to the policy; empty for all."""
    line: int = 0
    """Where it is written."""

    @property
    def key(self) -> str:
        """What tells it from others, in one line."""
        return " ".join(part for part in (self.code, self.weight, self.path) if part)

    def named(self, code: str, ids: Iterable[str]) -> list[str]:
        """Those of the weights of a finding that it speaks of; none of another rule."""
        pattern = self.weight.replace("[", "[[]")  # names have brackets; only `*` and `?` stand for others
        return [id for id in ids if code == self.code and (id == self.weight or fnmatchcase(id, pattern))]


def files_in(schemes: Iterable[str]) -> tuple[str, ...]:
    """What schemes are given behind a colon, each once."""
    return tuple(dict.fromkeys(given for _, _, given in (name.partition(":") for name in schemes) if given))


@dataclass(frozen=True)
class Terms:
    """What a policy says about one model: its sections put together."""

    select: tuple[str, ...] = ("ALL",)
    ignore: tuple[str, ...] = ()
    severity: Mapping[str, Severity] = field(default_factory=dict)
    """Code, family or name of rules → what their findings count as."""
    settings: Settings = DEFAULTS
    demands: Demands = NO_DEMANDS
    suppressions: tuple[Suppression, ...] = ()

    @property
    def consults(self) -> tuple[str, ...]:
        """Files, there or not, that the expected schemes are given: `custom:ties.toml`."""
        return files_in(self.demands.expect)

    def selects(self, code: str, name: str) -> bool:
        """Whether a rule runs: the most exact word decides, and of two equally exact ones `ignore`."""
        return _exactness(self.select, code, name) > _exactness(self.ignore, code, name)

    def severity_of(self, code: str, name: str, default: Severity) -> Severity:
        """What findings of this rule count as; the most exact word decides."""
        fitting = [word for word in self.severity if _exactness((word,), code, name) >= 0]
        best = max(fitting, key=lambda word: _exactness((word,), code, name), default=None)
        return default if best is None else self.severity[best]


def _exactness(words: Iterable[str], code: str, name: str) -> int:
    """How much of a code the most exact of the fitting words spells; 0 for ALL, -1 if none fits."""
    return max((_spelt(word, code, name) for word in words), default=-1)


def _spelt(word: str, code: str, name: str) -> int:
    if word == "ALL":
        return 0
    if word == name:
        return len(code)
    return len(word) if code.startswith(word) else -1


@dataclass(frozen=True)
class Section:
    """What one part of a policy file says; None and empty: nothing."""

    select: tuple[str, ...] | None = None
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    severity: Mapping[str, Severity] = field(default_factory=dict)
    thresholds: Mapping[str, int] = field(default_factory=dict)
    expect: tuple[str, ...] | None = None
    max_duplicate_bytes: int | None = None
    max_parameters: int | None = None

    def over(self, terms: Terms) -> Terms:
        """These terms, with what this section says."""
        demands = Demands(
            terms.demands.expect if self.expect is None else self.expect,
            terms.demands.max_duplicate_bytes if self.max_duplicate_bytes is None else self.max_duplicate_bytes,
            terms.demands.max_parameters if self.max_parameters is None else self.max_parameters,
        )
        return replace(
            terms,
            select=(*(terms.select if self.select is None else self.select), *self.extend_select),
            ignore=(*(terms.ignore if self.select is None else ()), *self.ignore),
            severity={**terms.severity, **self.severity},
            settings=replace(terms.settings, **self.thresholds),
            demands=demands,
        )


@dataclass(frozen=True)
class Policy:
    """One policy file. Without one, everything has its default."""

    root: str
    """The folder that it rules; patterns are relative to it."""
    file: str = ""
    """The file itself; empty where there is none."""
    everywhere: Section = Section()
    per_path: tuple[tuple[str, Section], ...] = ()
    """(pattern, section) in the order of the file."""
    suppressions: tuple[Suppression, ...] = ()
    exclude: tuple[str, ...] = ()
    """Patterns of paths that are no business of the gate, as in a .gitignore."""
    respect_gitignore: bool = True
    fail_on: Severity = "info"
    """The least severity that makes the exit code 1."""
    strict: bool = False
    baseline: str = ""
    """File of known findings, relative to the root; empty for none."""
    lock: str = "tieaudit.lock"
    """Lock file, relative to the root; without effect where there is none."""

    def terms(self, path: str, asked: Section | None = None) -> Terms:
        """What holds for the model at `path`, POSIX and relative to the root; `asked`: what the command line adds."""
        sections = [section for pattern, section in self.per_path if matches(path, pattern)]
        terms = Terms()
        for section in (self.everywhere, *sections, *((asked,) if asked is not None else ())):
            terms = section.over(terms)
        return replace(terms, suppressions=tuple(one for one in self.suppressions if self.concerns(one, path)))

    def consults(self, asked: Section | None = None) -> tuple[str, ...]:
        """Files, there or not, that some expected scheme is given, for whichever models."""
        sections = (
            self.everywhere,
            *(section for _, section in self.per_path),
            *((asked,) if asked is not None else ()),
        )
        return files_in(name for section in sections for name in section.expect or ())

    @staticmethod
    def concerns(suppression: Suppression, path: str) -> bool:
        """Whether a suppression speaks of the model at `path`."""
        return not suppression.path or matches(path, suppression.path)


def matches(path: str, pattern: str) -> bool:
    """Whether a model's path, or a folder above it, fits a pattern, as in a .gitignore of the policy's folder.

    A pattern with a slash before its end begins at the root; `./` says nothing. `folder/**` is the folder, too: it may
    be a model itself. A path that is spelt out fits whatever its characters mean in a pattern. UsageError for a
    pattern that cannot be read.
    """
    while pattern.startswith("./"):
        pattern = pattern[2:]
    if path == pattern or path.startswith(f"{pattern}/") and "/" in pattern:
        return True
    return any(_spec(pattern).match_file(name) for name in (path, f"{path}/"))


@lru_cache(maxsize=512)
def _spec(pattern: str) -> GitIgnoreSpec:
    """A pattern of the policy: one that begins as a comment or a negation does means what is called so."""
    lines = [f"\\{pattern}" if pattern.startswith(("!", "#")) else pattern]
    folder = pattern.removesuffix("/**").lstrip("/")
    return patterns([*lines, f"/{folder}"] if folder and pattern.endswith("/**") else lines)
