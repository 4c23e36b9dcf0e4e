"""docs/lock.md: every block is what its commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lock.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def transcript(block: str, home: Path) -> str:
    """The commands of a block, each followed by what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        done = subprocess.run(
            ["bash", "-c", command], cwd=home, env={**os.environ, "PATH": path, "NO_COLOR": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines.append(f"$ {command}\n{done.stdout}")
    return "".join(lines)


def test_every_block_of_the_page_is_what_is_printed(
    fixtures_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("transformers")
    home, source = tmp_path / "repository", fixtures_dir / "gpt_decoder"
    shutil.copytree(source / "hf_tied", home / "chat")
    shutil.copy(source / "tied.onnx", home / "chat.onnx")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source / "hf_lost" / "model.safetensors", tmp_path / "elsewhere")
    (home / "tieaudit.toml").write_text("")
    subprocess.run(["git", "init", "--quiet"], cwd=home, check=True)
    text, blocks = PAGE.read_text(), BLOCK.findall(PAGE.read_text())
    assert len(blocks) == 5
    for index, block in enumerate(blocks):
        if index == 2:  # what was locked is committed by then
            subprocess.run(["git", "add", "tieaudit.lock"], cwd=home, check=True)
        text = text.replace(f"```console\n{block}```", f"```console\n{transcript(block, home)}```")
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(text)
    assert text == PAGE.read_text()
