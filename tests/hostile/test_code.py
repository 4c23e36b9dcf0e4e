"""Code that lies in a model's folder is never run, not even by standing in the folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_onnx

EVIL = "import pathlib; pathlib.Path({marker!r}).write_text('ran'); raise SystemExit(0)"


def run_inside(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user standing in the folder starts it."""
    script = "import sys; from tieaudit.cli import main; main(sys.argv[1:])"
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-P", "-c", script, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def plant(folder: Path, *names: str) -> Path:
    """Modules of these names that leave a mark when they are imported."""
    marker = folder / "marker"
    for name in names:
        (folder / name).write_text(EVIL.format(marker=str(marker)))
    return marker


def test_modules_beside_a_folders_weights_are_not_imported_by_the_child_that_asks_the_class(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.numpy")
    table = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    safetensors.save_file({"model.embed_tokens.weight": table, "lm_head.weight": table}, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 0,
        "tie_word_embeddings": True,
        "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = plant(tmp_path, "torch.py", "transformers.py", "json.py", "numpy.py", "modeling.py", "sitecustomize.py")
    done = run_inside(tmp_path, "scan", ".", "--format", "json")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["models"][0]
    assert not marker.exists()
    assert "not asked" not in model["metadata"]["transformers"]  # the real library answered


def test_modules_beside_an_onnx_file_are_not_imported_by_the_child_that_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    tiny_onnx.lost(tmp_path / "m.onnx")
    shutil.copy(tmp_path / "m.onnx", tmp_path / "n.onnx")
    marker = plant(tmp_path, "onnxruntime.py", "onnx.py", "numpy.py", "json.py")
    done = run_inside(tmp_path, "verify", "m.onnx", "n.onnx")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not marker.exists()
