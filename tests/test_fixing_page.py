"""docs/fixing.md shows what is real: `pytest --update-goldens tests/test_fixing_page.py` writes its previews again."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny_onnx
from test_exchange import configured

from tieaudit.load import load_one
from tieaudit.mend import mending
from tieaudit.preview import preview, shown
from tieaudit.scan import scan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "fixing.md"
BLOCK = re.compile(r"(?s)(<!-- preview: (\w+) -->\n```text\n)(.*?)(```\n<!-- end -->)")


def previews(fixtures: Path, home: Path) -> dict[str, str]:
    """What is printed for each block, with paths as a user at the top of the repository sees them."""
    broken = Path(shutil.copytree(fixtures / "gpt_decoder" / "hf_untied", home / "my-model"))
    configured(broken, tie_word_embeddings=True)
    paths = {
        "lost": (fixtures / "gpt_decoder" / "hf_lost", False),
        "broken": (broken, True),
        "safe": (broken, False),
        "parts": (fixtures / "bart_seq2seq" / "parts_lost", False),
    }
    found = {}
    for name, (path, unsafe) in paths.items():
        text = shown(preview(mending(scan(load_one(path)), unsafe=unsafe)))
        text = text.replace(str(fixtures), "fixtures/built").replace(f"{home}{os.sep}", "")
        found[name] = re.sub(r'(?<="transformers_version": )"[^"]*"', '"5.23.0"', text) + "\n"
    return found


def test_the_previews_on_the_page_are_the_real_ones(
    fixtures_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    real = previews(fixtures_dir, tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    expected = BLOCK.sub(lambda match: f"{match[1]}{real[match[2]]}{match[4]}", page)
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(expected, encoding="utf-8")
    assert {match[2] for match in BLOCK.finditer(page)} == real.keys()
    assert PAGE.read_text(encoding="utf-8") == expected


def test_the_program_on_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = re.search(r"(?s)```python\n(.*?)```", PAGE.read_text(encoding="utf-8"))
    assert program is not None
    tiny_onnx.lost(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program[1], str(PAGE), "exec"), names)
    assert printed.getvalue().startswith("[]\nmodel.onnx\n- lm_head.weight_T")
    assert scan(load_one("model.onnx")).findings == ()
