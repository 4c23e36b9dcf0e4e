"""The shape of the project, as tests: layers, light imports, open sets, names, sizes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tieaudit import errors
from tieaudit.formats import Format
from tieaudit.registry import discover

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("onnx", "onnxruntime", "onnxscript", "safetensors", "torch", "transformers")
OPEN_SETS = {
    "formats": "Format",
    "merges": "Merge",
    "relations": "Relation",
    "reports": "ReportFormat",
    "rules": "Rule",
    "schemes": "Scheme",
}
FORBIDDEN_NAMES = {
    "utils",
    "util",
    "core",
    "common",
    "helpers",
    "helper",
    "base",
    "types",
    "misc",
    "constants",
    "manager",
}
LINT_IMPORTS = (
    "import sys; from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
)


def tracked() -> list[Path]:
    """Files of the repository: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "built" not in path.parts]


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def import_contract_holds(root: Path) -> bool:
    return subprocess.run([sys.executable, "-c", LINT_IMPORTS], cwd=root, capture_output=True).returncode == 0


def test_imports_run_one_way() -> None:
    assert import_contract_holds(ROOT), "run `make check-layers` to see the chain"


def test_the_import_contract_notices_an_import_that_runs_backwards(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tieaudit", tmp_path / "tieaudit", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "tieaudit" / "errors.py").open("a") as file:
        file.write("\n\ndef _backwards() -> None:\n    from tieaudit import find  # noqa: F401\n")
    assert not import_contract_holds(tmp_path)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert modules_loaded_by("import tieaudit.cli") & set(HEAVY) == set()


def test_discovering_every_open_set_loads_nothing_heavy() -> None:
    lines = ["from tieaudit.registry import discover", "import importlib"]
    lines += [
        f"discover('{name}', importlib.import_module('tieaudit.{name}').{kind})" for name, kind in OPEN_SETS.items()
    ]
    assert modules_loaded_by("\n".join(lines)) & set(HEAVY) == set()


def test_the_light_import_test_would_notice_a_heavy_package() -> None:
    assert "onnx" in modules_loaded_by("import tieaudit.cli, onnx") & set(HEAVY)


@pytest.mark.parametrize("name", OPEN_SETS)
def test_every_module_of_an_open_set_defines_one_member(name: str) -> None:
    package = importlib.import_module(f"tieaudit.{name}")
    members = discover(name, getattr(package, OPEN_SETS[name]))
    modules = [info.name for info in pkgutil.iter_modules(package.__path__)]
    assert modules
    assert len(members) >= len(modules)  # entry points of other packages may add some


def test_a_member_that_is_asked_for_by_name_is_loaded_without_the_others() -> None:
    from tieaudit.registry import named
    from tieaudit.reports import ReportFormat

    for name, member in discover("reports", ReportFormat).items():
        assert named("reports", ReportFormat, name, "report format") is member
    with pytest.raises(errors.UsageError, match=r"no report format is called 'sarf'.*did you mean sarif"):
        named("reports", ReportFormat, "sarf", "report format")
    code = "from tieaudit.registry import named; from tieaudit.reports import ReportFormat; import sys; "
    code += "named('reports', ReportFormat, 'text', ''); print([name for name in sys.modules if 'sarif' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_module_without_a_member_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tieaudit import relations

    (tmp_path / "zz_empty.py").write_text("")
    monkeypatch.setattr(relations, "__path__", [*relations.__path__, str(tmp_path)])
    discover.cache_clear()
    try:
        with pytest.raises(errors.PluginError, match=r"zz_empty\.py: expected exactly one Relation .* found 0"):
            discover("relations", relations.Relation)
    finally:
        discover.cache_clear()
        sys.modules.pop("tieaudit.relations.zz_empty", None)


def test_what_a_format_imports_later_fits_the_field_that_it_is_given_to() -> None:
    n_compared = 0
    for form in discover("formats", Format).values():
        for field in dataclasses.fields(Format):
            where = getattr(getattr(form, field.name), "__qualname__", "")
            if re.fullmatch(r"tieaudit\.[\w.]+:\w+", where):
                module, name = where.split(":")
                assert str(field.type).removesuffix(" | None") in _spelled(
                    getattr(importlib.import_module(module), name)
                )
                n_compared += 1
    assert n_compared >= 15


def _spelled(function: Any) -> list[str]:
    """How the annotation of a callable field can spell a function; arguments with a default may be left out."""
    given = inspect.signature(function)
    arguments = [str(one.annotation) for one in given.parameters.values()]
    n_needed = sum(one.default is inspect.Parameter.empty for one in given.parameters.values())
    return [
        f"Callable[[{', '.join(arguments[:n])}], {given.return_annotation}]"
        for n in range(n_needed, len(arguments) + 1)
    ]


def test_no_source_file_outgrows_four_hundred_lines() -> None:
    sizes = {
        path: len(path.read_text().splitlines()) for path in sources("tieaudit", "fixtures", "tools", "benchmarks")
    }
    assert len(sizes) > 30
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 400} == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [
        str(path.relative_to(ROOT)) for path in tracked() if path.suffix == ".py" and path.stem in FORBIDDEN_NAMES
    ] == []


def asserts_something(test: ast.FunctionDef) -> bool:
    """Whether a test can fail: an assert, a `raises` or `warns`, or a call of something that asserts or checks."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"raises", "warns", "fail"} or called.startswith(("assert", "check", "expect")):
                return True
    return False


def defined_tests(text: str) -> list[ast.FunctionDef]:
    return [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]


def test_no_test_is_without_an_assertion() -> None:
    found = [(path, test) for path in sources("tests") for test in defined_tests(path.read_text())]
    assert len(found) > 20
    assert [f"{path.relative_to(ROOT)}: {test.name}" for path, test in found if not asserts_something(test)] == []


def test_a_test_without_an_assertion_is_noticed() -> None:
    idle, real = defined_tests("def test_idle():\n    print(1)\n\ndef test_real():\n    assert 1\n")
    assert (asserts_something(idle), asserts_something(real)) == (False, True)


def test_no_file_names_a_place_on_somebody_s_machine() -> None:
    # Written in pieces, so that this file does not find itself.
    places = "|".join(re.escape("/" + place + "/") for place in ("root", "home", "Users", "work", "tmp" + "/w"))
    place = re.compile(rf"(?<![\w.}}])(?:{places})\w")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in place.finditer(text)]
    assert found == []


def test_every_rule_scheme_and_merge_has_its_page() -> None:
    pages = "\n".join(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
    for name in ("rules", "schemes", "merges"):
        package = importlib.import_module(f"tieaudit.{name}")
        for member in discover(name, getattr(package, OPEN_SETS[name])).values():
            title = getattr(member, "code", None) or member.name.replace(":", "_")
            assert re.search(rf"(?i){re.escape(title)}", pages), f"docs/ has no page for {title}; run `make docs`"


def test_the_version_has_one_source() -> None:
    import tomllib

    import tieaudit

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tieaudit.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", tieaudit.__version__)
