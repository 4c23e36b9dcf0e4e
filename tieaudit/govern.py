"""Stage: path → Policy. Finds the policy file that rules a path, upwards from it, and reads it.

Every key is checked against one table, from which the documentation page is made: a misspelt key that did nothing
would be a gate that is open without anybody knowing.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tieaudit.config import rows
from tieaudit.errors import UsageError
from tieaudit.policy import Policy, Section, Suppression, matches
from tieaudit.spelling import Key, Where, count, flag, n_bytes, severity, table_of, text_of, texts, values_of
from tieaudit.whole import read_whole

OWN = "tieaudit.toml"
SHARED = "pyproject.toml"
MAX_BYTES = 4_000_000


def policy_for(path: Path, given: Path | None = None) -> Policy:
    """The policy that rules `path`: the nearest file upwards from it, or the one that is `given`.

    UsageError for a file that cannot be read, is no TOML, or says something that no policy can say. Without a file:
    the defaults, for the working directory. Cost: files are read once, until `forget`.
    """
    if given is not None:
        if not os.path.isfile(given):
            raise UsageError(f"{given}: expected a policy file, found none")
        found = _read(Path(os.path.abspath(given)))  # what is below `a/..` is not below `a`
        if found is None:
            raise UsageError(f"{given}: expected a table [tool.tieaudit], found none")
        return found
    start = Path(os.path.abspath(path))  # what is above `a/..` is not above `a`
    return _upwards(start if start.is_dir() else start.parent) or Policy(str(Path.cwd()))


def steered_by(file: Path, given: Path | None = None) -> Path | None:
    """The folder whose models may be judged otherwise when this file changes, comes or goes: one of a policy, its lock,
    its baseline, or the groups of a scheme; None for any other file. `given`: as in `policy_for`.
    """
    full = os.path.abspath(file)
    folder, name = Path(full).parent, os.path.basename(full)
    if given is None and (name == OWN or name == Policy.lock):  # also one that is gone
        return folder
    policy = policy_for(folder, given)
    steering = [policy.file, *(os.path.join(policy.root, one) for one in (policy.lock, policy.baseline) if one)]
    known = {os.path.abspath(one) for one in (*steering, *policy.consults()) if one}
    return Path(policy.root) if full in known else None


def forget() -> None:
    """Read policies anew from here on: each run sees the files as they are."""
    _here.cache_clear()
    _read.cache_clear()


def _upwards(folder: Path) -> Policy | None:
    return next((found for place in (folder, *folder.parents) if (found := _here(place)) is not None), None)


@cache
def _here(folder: Path) -> Policy | None:
    """The policy in a folder. A file of our own name that is none is refused: passed over, it would open the gate."""
    if os.path.lexists(own := folder / OWN):
        return _read(own)
    shared = folder / SHARED
    return _read(shared) if shared.is_file() else None


@cache
def _read(file: Path) -> Policy | None:
    """The policy in a file; None for a pyproject.toml that says nothing of tieaudit."""
    try:
        text = read_whole(file, MAX_BYTES).decode("utf-8-sig")  # some editors begin a file with a mark
        content: Any = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and says the line; so is UnicodeDecodeError
        raise UsageError(f"{file}: expected TOML, found an error: {error}") from None
    where = Where(file, text)
    if file.name == SHARED:
        tool = content.get("tool", {})
        content = tool.get("tieaudit") if isinstance(tool, Mapping) else None
        if content is None:
            return None
        where = where.at("tool.tieaudit")
    elif isinstance(content.get("tool"), Mapping) and "tieaudit" in content["tool"]:
        hint = f"[tool.tieaudit] is for {SHARED}: in {OWN} the keys stand at the top, [severity] and the like below"
        raise UsageError(f"{file}: tool is no key of a policy", hint=hint)
    return _policy(table_of(content, where), where)


def _policy(content: Mapping[str, Any], where: Where) -> Policy:
    values = values_of(content, where, [*KEYS, *_TABLES])
    suppressions = values.pop("suppress", ())
    per_path = values.pop("per-path", ())
    known = {name.replace("-", "_"): value for name, value in values.items()}
    own = {name: known.pop(name) for name in _OF_THE_RUN if name in known}
    return Policy(
        root=str(where.file.parent),
        file=str(where.file),
        everywhere=Section(**known),
        per_path=per_path,
        suppressions=suppressions,
        **own,
    )


def spoken(given: Mapping[str, Any]) -> Section:
    """What the command line says, by names of keys with underscores; checked as in a file."""
    content = {name.replace("_", "-"): value for name, value in given.items()}
    values = values_of(content, Where(Path("command line"), ""), KEYS)
    return Section(**{name.replace("-", "_"): value for name, value in values.items()})


def rule_words(value: Any, where: Where) -> tuple[str, ...]:
    """Codes, families and names of rules, each checked to fit one."""
    return tuple(_rule_word(word, where) for word in texts(value, where))


def _rule_word(word: str, where: Where) -> str:
    from tieaudit.audit import rules

    known = rules()
    if word == "ALL" or word in {rule.name for rule in known.values()}:
        return word
    if any(code.startswith(word.upper()) for code in known):
        return word.upper()
    import difflib

    spelt = [*known, *(rule.name for rule in known.values())]
    near = difflib.get_close_matches(word, spelt, n=1) or difflib.get_close_matches(word.upper(), spelt, n=1)
    hint = f"did you mean {near[0]}?" if near else "`tieaudit explain` lists all codes"
    raise where.refuse("ALL, a code (TIE101), a family (TIE1) or a name of rules", word, hint)


def schemes_expected(value: Any, where: Where) -> tuple[str, ...]:
    """Schemes by name, each checked to be one that ties."""
    from tieaudit.propose import schemes

    names = texts(value, where)
    try:
        schemes(names)
    except UsageError as error:
        raise where.refuse("names of schemes", list(names), error.hint or error.message) from None
    if wrong := [name for name in names if name.partition(":")[0] in _NO_TIES]:
        raise where.refuse("schemes that tie certain weights (io, three-way, albert …)", wrong[0])
    return tuple(_from_here(name, where.file) for name in names)


def _from_here(name: str, policy: Path) -> str:
    """A scheme whose argument is a file: what a policy names lies beside it, wherever the check is started."""
    scheme, _, file = name.partition(":")
    if scheme != "custom" or not file or not policy.is_absolute():
        return name
    return f"{scheme}:{os.path.relpath(policy.parent / file)}"


_NO_TIES = frozenset({"dedup", "untie", "declare"})


def _severities(value: Any, where: Where) -> dict[str, str]:
    table = table_of(value, where)
    return {_rule_word(word, where.at(word)): severity(level, where.at(word)) for word, level in table.items()}


def _thresholds(value: Any, where: Where) -> dict[str, int]:
    read = [
        Key(row.name.replace("_", "-"), "", "", n_bytes if row.unit == "bytes" else count)
        for row in rows()
    ]  # fmt: skip
    values = values_of(table_of(value, where), where, read)
    return {name.replace("-", "_"): value for name, value in values.items()}


def _sections(value: Any, where: Where) -> tuple[tuple[str, Section], ...]:
    keys = [key for key in (*KEYS, *_TABLES) if key.per_path]
    found = []
    for pattern, content in table_of(value, where).items():
        here = where.at(f'"{pattern}"')
        _pattern(pattern, here)
        values = values_of(table_of(content, here), here, keys)
        found.append((pattern, Section(**{name.replace("-", "_"): item for name, item in values.items()})))
    return tuple(found)


def _pattern(value: Any, where: Where) -> str:
    """A pattern of paths that can be read."""
    text = text_of(value, where)
    try:
        matches("", text)
    except UsageError:
        raise where.refuse("a pattern of paths as in a .gitignore", text) from None
    return text


def _suppressions(value: Any, where: Where) -> tuple[Suppression, ...]:
    if not isinstance(value, list):
        raise where.refuse("entries [[suppress]] with code, weight and reason", value)
    lines = [
        number
        for number, line in enumerate(where.text.splitlines(), start=1)
        if line.strip().startswith("[[") and line.strip().strip("[] ").endswith("suppress")
    ]
    found = []
    for index, entry in enumerate(value):
        line = lines[index] if len(lines) == len(value) else where.line
        found.append(_suppression(table_of(entry, where), where.at(f"[{index}]"), line))
    return tuple(found)


def _suppression(entry: Mapping[str, Any], where: Where, line: int) -> Suppression:
    values = values_of(entry, where, _OF_A_SUPPRESSION)
    place = f"{where.file}:{line}" if line else str(where.file)
    for name in ("code", "weight", "reason"):
        if name not in values:
            raise UsageError(f"{place}: {where.key}: expected a suppression with a {name}, found none")
    if not values["weight"].strip("*?"):
        reason = f"expected a suppression of a weight, found one of every weight ({values['weight']})"
        raise UsageError(
            f"{place}: {where.key}: {reason}", hint=f"to switch the rule off: ignore = [{values['code']!r}]"
        )
    return Suppression(values["code"], values["weight"], values["reason"], values.get("path", ""), line)


def _code(value: Any, where: Where) -> str:
    """One rule, by code or name; a family would be a blanket."""
    from tieaudit.audit import rules
    from tieaudit.registry import choose

    known = {**{code: code for code in rules()}, **{rule.name: code for code, rule in rules().items()}}
    text = text_of(value, where)
    try:
        return choose(known, text.upper() if text.upper() in known else text, "rule")
    except UsageError as error:
        raise where.refuse("the code of one rule", text, error.hint) from None


KEYS = (
    Key("select", "codes", "the rules that run: ALL, codes, families (TIE1) or names", rule_words),
    Key("extend-select", "codes", "rules to run besides", rule_words),
    Key("ignore", "codes", "rules that do not run; the more exact word wins, and of equal ones ignore", rule_words),
    Key("expect", "schemes", "ties that must be there: io, three-way, albert …", schemes_expected),
    Key("max-duplicate-bytes", "bytes", "the most that may be stored again, as a number or as \"1.5 MB\"", n_bytes),
    Key("max-parameters", "count", "the most parameters that a model may have, each tie counted once", count),
    Key("exclude", "patterns", "paths that are not looked at, as in a .gitignore", texts, per_path=False),
    Key("respect-gitignore", "true or false", "leave out what git ignores (default true)", flag, per_path=False),
    Key("fail-on", "severity", "the least severity that fails the check (default info: every finding)", severity,
        per_path=False),
    Key("strict", "true or false", "what cannot be told is exit code 2, as with --strict", flag, per_path=False),
    Key("baseline", "file", "known findings, which do not count; see --write-baseline", text_of, per_path=False),
    Key("lock", "file", "the lock file (default tieaudit.lock)", text_of, per_path=False),
)  # fmt: skip
"""The keys of `[tool.tieaudit]`, all of them."""
_TABLES = (
    Key("severity", "table", "code, family or name = error, warning or info", _severities),
    Key("thresholds", "table", "the thresholds of docs/thresholds.md, with dashes", _thresholds),
    Key("per-path", "tables", "pattern of paths, as in a .gitignore = a section; the last that matches wins", _sections,
        per_path=False),
    Key("suppress", "entries", "single findings that are known: code, weight, reason, and path for some models only",
        _suppressions, per_path=False),
)  # fmt: skip
_OF_A_SUPPRESSION = (
    Key("code", "code", "the rule", _code),
    Key("weight", "id", "id of the weight, or a pattern; of several weights all but one", text_of),
    Key("reason", "text", "why this is right as it is", text_of),
    Key("path", "pattern", "models it speaks of, as in a .gitignore", _pattern),
)
_OF_THE_RUN = ("exclude", "respect_gitignore", "fail_on", "strict", "baseline", "lock")


EXAMPLE = """\
expect = ["io"]                  # head and embedding are one tensor, in every model
max-duplicate-bytes = "1 MB"
ignore = ["TIE205"]              # masks may be stored twice
exclude = ["vendor/"]

[severity]
TIE103 = "info"

[thresholds]
min-n-bytes = 4_096

[per-path."experiments/**"]      # the last section that matches a model wins, key by key
expect = []

[[suppress]]
code = "TIE101"
weight = "lm_head.weight"
reason = "trained apart since the fine-tuning of March"
"""
"""A policy as the page shows it."""


def page() -> str:
    """The documentation page of the policy's keys, as Markdown."""
    lines = [
        "# The policy",
        "",
        "`tieaudit check` and `tieaudit lock` read `tieaudit.toml`, or the table `[tool.tieaudit]` of `pyproject.toml`",
        "from the nearest folder upwards from each model, and from nowhere else ([why](decisions/policy.md)).",
        "In one folder the former rules. Unknown keys are refused. Where `check` has an option of a key's name, the",
        "option has the last word. `respect-gitignore` comes from the policy under which a search begins, all else",
        "from that of each model; what either of them excludes is left out.",
        "",
        "```toml",
        *EXAMPLE.splitlines(),
        "```",
        "",
        "| key | holds | meaning | in a per-path section |",
        "|---|---|---|---|",
    ]
    for key in (*KEYS, *_TABLES):
        lines.append(f"| `{key.name}` | {key.takes} | {key.meaning} | {'yes' if key.per_path else ''} |")
    lines += ["", "A suppression (`[[suppress]]`, in pyproject.toml `[[tool.tieaudit.suppress]]`) has these keys:", ""]
    lines += ["| key | holds | meaning |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {key.takes} | {key.meaning} |" for key in _OF_A_SUPPRESSION]
    lines += [
        "",
        "A finding about several weights is hidden where all of them but one are named, by one entry or by several:",
        "the one is what the others are copies of. So a copy that joins later is heard of. Patterns of paths begin at",
        "the folder of the policy if they have a slash before their end, and mean a folder with all below it.",
        "",
        "Codes: [rules](rules/README.md). Sizes: [thresholds](thresholds.md). What is searched:",
        "[repositories](repositories.md). A repository set up from nothing: [in CI](ci.md).",
    ]
    return "\n".join(lines) + "\n"
