"""Every PyTorch file of a corpus of real models, against what PyTorch itself loads from it, safely."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.find import find
from tieaudit.load import load_one

torch = pytest.importorskip("torch")
truth = pytest.importorskip("torch_files")

ENDINGS = (".pt", ".pth", ".ckpt", ".jit", ".model")


def files(corpus: Path) -> list[Path]:
    """Files of PyTorch's two layouts, by their first bytes."""
    found = [path for path in sorted(corpus.rglob("*")) if path.is_file() and path.name.endswith(ENDINGS)]
    return [path for path in found if path.read_bytes()[:2] in (b"PK", b"\x80\x02")]


def members(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as file:
        return file.namelist()


def loaded(path: Path) -> dict[str, Any] | None:
    """Names and tensors as PyTorch has them; None where its safe loader refuses the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if any(name.endswith("/constants.pkl") for name in members(path)):
                return dict(torch.jit.load(path, map_location="cpu").state_dict(keep_vars=True))
            return dict(truth.named(torch.load(path, weights_only=True, map_location="cpu")))
        except Exception:
            return None


@pytest.fixture(scope="module")
def known(corpus: Path) -> dict[str, dict[str, Any] | None]:
    found = {str(path.relative_to(corpus)): loaded(path) for path in files(corpus)}
    if not found:
        pytest.skip("no PyTorch files in this corpus")
    return found


def test_every_file_is_answered(corpus: Path, known: dict[str, Any]) -> None:
    paths = [str(corpus / name) for name in known]
    result = CliRunner().invoke(main, ["scan", *paths, "--format", "json"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["errors"] == []
    assert {model["path"] for model in answer["models"]} == set(paths)
    assert not any(model["crashed"] for model in answer["models"])


def test_names_types_and_bytes_are_those_that_pytorch_loads(corpus: Path, known: dict[str, Any]) -> None:
    for name, expected in known.items():
        if expected is None:
            continue
        model = load_one(corpus / name, key=".")
        weights = {weight.name: weight for weight in model.weights}
        assert set(expected) <= set(weights), name
        # a scripted module has tensors that are neither parameters nor buffers: attributes, and constants of its code
        assert set(expected) == set(weights) or model.metadata["layout"] == "torchscript", name
        for id, tensor in expected.items():
            weight = weights[id]
            assert (weight.shape, f"torch.{weight.dtype}") == (tuple(tensor.shape), str(tensor.dtype)), (name, id)
            assert weight.storage is not None
            assert weight.storage.read_ranges([(0, weight.n_bytes)]) == [truth.row_major_bytes(tensor)], (name, id)


def test_aliases_and_slices_are_those_of_the_storages_that_pytorch_makes(corpus: Path, known: dict[str, Any]) -> None:
    for name, expected in known.items():
        if expected is None:
            continue
        found = find(load_one(corpus / name, key="."))
        aliased = {frozenset(tie.ids) & expected.keys() for tie in found.ties if tie.origin == "aliased"}
        assert {ids for ids in aliased if len(ids) > 1} == truth.one_value(expected), name
        met = {frozenset((a, b)) for one in found.overlaps for a in one.ids for b in one.ids if a < b}
        assert truth.sharing(expected) <= met, name
        assert bool(met) == bool(truth.sharing(expected)), name


def test_what_the_safe_loader_refuses_is_read_all_the_same(corpus: Path, known: dict[str, Any]) -> None:
    refused = {Path(name).name: name for name, expected in known.items() if expected is None}
    if not {"si16.model", "state_dict.pth"} <= refused.keys():
        pytest.skip("other files than those of the survey")
    module = load_one(corpus / refused["si16.model"])
    assert {w.name.partition(".")[0] for w in module.weights} >= {"representation"}
    assert any(w.parameter and w.because == "saved as a Parameter" for w in module.weights)
    state = load_one(corpus / refused["state_dict.pth"])
    assert "_reconstruct" in state.metadata["placeholders"]
    assert len(state.weights) > 20
