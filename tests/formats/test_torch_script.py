"""TorchScript archives: which tensors are learned, as the archive's own classes say; torch.jit.load is the judge."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tieaudit.find import find  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.model import Model  # noqa: E402
from tieaudit.summary import summary  # noqa: E402


class Everything(nn.Module):
    """Parameters, saved and unsaved buffers, a plain tensor, two classes of one name, a tie, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(11, 4)
        self.c = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.r = nn.LSTM(4, 4, 2)
        self.h = nn.Linear(4, 11)
        self.h.weight = self.e.weight
        self.register_buffer("t", torch.ones(3))
        self.plain = torch.zeros(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.r(self.c(self.e(x)).unsqueeze(0))
        return self.h(y) + self.t.sum() + self.plain.sum() + torch.tensor([0.5])


def scripted(how: str, path: Path) -> Path:
    torch.manual_seed(0)
    module = Everything().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.tensor([1, 2]))
        torch.jit.save(made, path)
    return path


def learned(model: Model) -> set[str]:
    return {weight.name for weight in model.weights if weight.parameter}


@pytest.mark.parametrize("how", ["script", "trace"])
def test_parameters_and_buffers_are_those_of_torch(how: str, tmp_path: Path) -> None:
    path = scripted(how, tmp_path / "model.pt")
    model = load_one(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(path)
    # torch names a tied parameter once, here the file's second name of it is a parameter as well
    assert learned(model) - {"h.weight", "e.weight"} == {n for n, _ in module.named_parameters()} - {
        "e.weight",
        "h.weight",
    }
    assert {"e.weight", "h.weight"} <= learned(model)
    unlearned = {weight.name for weight in model.weights if weight.parameter is False}
    assert unlearned >= {name for name, _ in module.named_buffers()} and "t" in unlearned
    assert not {weight.name for weight in model.weights if weight.parameter is None}
    assert {w.because for w in model.weights if w.name == "t"} == {"a buffer of its TorchScript class"}
    assert summary(model, find(model)).n_parameters == sum(p.numel() for p in module.parameters())


def test_code_that_does_not_tell_leaves_the_convention(tmp_path: Path) -> None:
    path, bare = scripted("script", tmp_path / "model.pt"), tmp_path / "bare.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bare, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"import os; os.abort()" if name.endswith(".py") else old.read(name))
    model = load_one(bare)
    assert {w.because for w in model.weights if w.name == "t"} != {"a buffer of its TorchScript class"}
    assert len(model.weights) == len(load_one(path).weights)


@pytest.mark.usefixtures("corpus")
def test_every_script_of_the_corpus_counts_as_torch_counts(corpus: Path) -> None:
    found = 0
    for path in sorted(corpus.rglob("*")):
        if path.suffix not in (".pt", ".jit", ".ptl") or not path.is_file() or not zipfile.is_zipfile(path):
            continue
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("/constants.pkl") for name in names):
            continue
        model = load_one(path)
        if any(weight.name.startswith("CONSTANTS") and weight.parameter is not False for weight in model.weights):
            continue  # frozen: what was learned became constants, and torch counts none of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(path, map_location="cpu")
        assert summary(model, find(model)).n_parameters == sum(p.numel() for p in module.parameters()), path
        found += 1
    assert found >= 5
