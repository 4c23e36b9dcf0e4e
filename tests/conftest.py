"""What several test files share: the built fixtures and the corpus of real files."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# how long an example takes says how busy the machine is
settings.register_profile("tieaudit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tieaudit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/golden/ again from what is printed now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in tests/golden/, or write it again under --update-goldens."""

    def expect(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden {path.name}: run pytest --update-goldens and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return expect


@pytest.fixture(scope="session")
def fixtures_dir(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The fixtures, built once per test run from the script as it is now."""
    home = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the workers of one run share the folder above their own
        home = home.parent
    out = home / "fixtures"
    with (home / "fixtures.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "fixtures.done").exists():
            subprocess.run([sys.executable, ROOT / "fixtures" / "build.py", out], check=True, capture_output=True)
            (home / "fixtures.done").touch()
    return out


@pytest.fixture(scope="session")
def truths(fixtures_dir: Path) -> dict[str, dict[str, Any]]:
    """The truth of every fixture, by its path below the fixtures."""
    return {
        f"{file.parent.name}/{name}": truth
        for file in sorted(fixtures_dir.glob("*/truth.json"))
        for name, truth in json.loads(file.read_text()).items()
    }


@pytest.fixture(scope="session")
def corpus() -> Path:
    """A folder of real model files, where there is one."""
    home = Path(os.environ.get("TIEAUDIT_CORPUS") or ROOT.parent / "shared" / "corpus")
    if not home.is_dir():
        pytest.skip(f"no corpus at {home}; set TIEAUDIT_CORPUS")
    return home
