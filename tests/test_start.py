"""What a command loads: a tool in everybody's CI answers before its libraries could be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"numpy", "onnx", "networkx", "torch", "transformers", "onnxruntime", "ml_dtypes", "safetensors"}


def loaded_by(*arguments: str) -> tuple[set[str], int]:
    """Top-level packages in a fresh interpreter after a command, and its exit code."""
    code = (
        "import sys\nfrom tieaudit.cli import main\n"
        "try:\n    main(sys.argv[1:], prog_name='tieaudit')\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    code_, *names = done.stderr.splitlines()[-1].split()
    return set(names), int(code_)


@pytest.fixture
def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer.{n}.weight": rng.standard_normal((256, 256)).astype(np.float32) for n in range(8)}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["scan", "--help"], ["apply", "--help"]])
def test_help_and_version_load_no_library_for_models(arguments: list[str]) -> None:
    packages, code = loaded_by(*arguments)
    assert code == 0
    assert packages & HEAVY == set()
    assert "click" in packages  # the listing sees what is loaded


def test_a_scan_of_two_megabytes_of_safetensors_loads_none_either(
    tmp_path: Path, matrices: dict[str, np.ndarray]
) -> None:
    save_file(matrices, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 2e6
    packages, code = loaded_by("scan", str(tmp_path / "model.safetensors"))
    assert code == 0
    assert packages & HEAVY == set()


def test_a_scan_of_a_pytorch_checkpoint_loads_none_either(tmp_path: Path, matrices: dict[str, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value) for name, value in matrices.items()}
    tied = next(iter(state.values()))
    for name, how in (("zip", True), ("legacy", False)):
        path = tmp_path / f"{name}.pt"
        torch.save({"state_dict": {**state, "tied": tied}}, path, _use_new_zipfile_serialization=how)
        packages, code = loaded_by("scan", str(path))
        assert code == 0
        assert packages & HEAVY == set()


def test_a_transposed_copy_in_safetensors_loads_numpy_and_no_more(
    tmp_path: Path, matrices: dict[str, np.ndarray]
) -> None:
    first = next(iter(matrices.values()))
    save_file({**matrices, "copy": np.ascontiguousarray(first.T)}, tmp_path / "model.safetensors")
    packages, code = loaded_by("scan", str(tmp_path / "model.safetensors"))
    assert code == 0
    assert packages & HEAVY == {"numpy"}


def test_a_scan_of_an_onnx_file_loads_its_messages_without_the_package(
    tmp_path: Path, matrices: dict[str, np.ndarray]
) -> None:
    nodes = [helper.make_node("MatMul", [f"x{n}", name], [f"x{n + 1}"]) for n, name in enumerate(matrices)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 256]) for name in ("x0", f"x{len(nodes)}")]
    held = [numpy_helper.from_array(value, name) for name, value in matrices.items()]
    save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], held)), tmp_path / "model.onnx")
    packages, code = loaded_by("scan", str(tmp_path / "model.onnx"))
    assert code == 0
    assert packages & HEAVY == set()
    assert "google" in packages


def test_the_messages_are_the_classes_of_the_package_itself() -> None:
    code = (
        "from tieaudit.formats.onnx.messages import model_proto\nimport sys\nalone = model_proto()\n"
        "assert 'onnx' not in sys.modules\nimport onnx\nassert alone is onnx.ModelProto\nprint('same')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def test_a_plug_in_of_another_package_is_still_found(tmp_path: Path) -> None:
    """Its metadata is looked for without the library that parses metadata; so one installed package must be enough."""
    home = tmp_path / "their_rule-1.0.dist-info"
    home.mkdir()
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rule\nVersion: 1.0\n")
    (home / "entry_points.txt").write_text("[tieaudit.relations]\ntheirs = their_rule:relation\n")
    (tmp_path / "their_rule.py").write_text(
        "from tieaudit.relations import Relation\n"
        "relation = Relation('theirs', '', '', 9, lambda shape: shape, lambda a, b: None)\n"
    )
    code = (
        f"import sys\nsys.path.append({str(tmp_path)!r})\nfrom tieaudit.registry import discover\n"
        "from tieaudit.relations import Relation\nprint(*discover('relations', Relation))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "theirs" in done.stdout.split(), done.stderr
