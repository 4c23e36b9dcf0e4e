"""Write what README.md shows again, from the real thing: `python tools/refresh_readme.py [--check]`.

Between `<!-- begin: … -->` and `<!-- end -->` a console block is made of `$ tieaudit …` lines and what the commands
print today, run at the top of the repository on the built fixtures. fixtures/README.md gets its table from the truth.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BUILT = ROOT / "fixtures" / "built"
BLOCK = re.compile(r"(?s)(<!-- begin: (?P<name>[a-z ]+) -->\n)(?P<body>.*?)(<!-- end -->)")
COMMAND = [sys.executable, "-m", "tieaudit"]


def printed(line: str) -> str:
    """What `line`, a command of tieaudit, prints on stdout. RuntimeError if it says that it could not look."""
    program, *arguments = shlex.split(line)
    if program != "tieaudit":
        raise ValueError(f"README.md shows the command {line!r}: only tieaudit is run from there")
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 2 or done.stderr:
        raise RuntimeError(f"$ {line}\nexit code {done.returncode}\n{done.stderr}")
    return done.stdout.rstrip()


def console(body: str) -> str:
    """A console block with its commands run again."""
    commands = [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]
    shown = "\n\n".join(f"$ {command}\n{printed(command)}" for command in commands)
    return f"```console\n{shown}\n```\n"


def table(built: Path = BUILT) -> str:
    """Every fixture with the numbers of its truth."""
    from fixtures.architecture import architectures

    rows = ["| fixture | what is stored more than once, or not stored | parameters | by name | bytes twice |"]
    rows.append("|---|---|--:|--:|--:|")
    for name, architecture in architectures().items():
        rows.append(f"| **{name}** | {architecture.summary} | | | |")
        for variant, truth in json.loads((built / name / "truth.json").read_text()).items():
            numbers = (truth[key] for key in ("n_parameters", "n_parameters_named", "n_bytes_duplicate"))
            rows.append(f"| `{variant}` | {_groups(truth['groups'])} | {' | '.join(f'{n:,}' for n in numbers)} |")
    return "\n".join(rows) + "\n"


def _groups(groups: list[dict[str, object]]) -> str:
    if not groups:
        return "–"
    first, *others = groups
    members = first["members"]
    assert isinstance(members, list)
    text = f"{first['origin']}: " + " = ".join(
        f"`{member['id'].replace('|', chr(92) + '|')}`" + ("ᵀ" if member["view"] == "transposed" else "")
        for member in members
    )
    return text + (f" and {len(others)} more" if others else "")


def refreshed(text: str) -> str:
    """The page with every block made again."""

    def again(match: re.Match[str]) -> str:
        body = table() if match["name"] == "fixtures" else console(match["body"])
        return f"{match[1]}{body}{match[4]}"

    return BLOCK.sub(again, text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    options = parser.parse_args()
    if not BUILT.is_dir():
        subprocess.run([sys.executable, ROOT / "fixtures" / "build.py"], check=True)
    stale = False
    for page in (ROOT / "README.md", ROOT / "fixtures" / "README.md"):
        before = page.read_text()
        after = refreshed(before)
        if before != after:
            stale = True
            name = str(page.relative_to(ROOT))
            if options.check:
                difference = difflib.unified_diff(before.splitlines(), after.splitlines(), name, "now", lineterm="")
                print("\n".join(difference))
            else:
                page.write_text(after)
                print(f"{name}: refreshed")
    if options.check and stale:
        print("out of date; run `make docs`", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
