"""Every scheme of the registry in every container: it runs with its proof, or a listed reason says why it cannot.

A scheme that somebody adds is in none of these tables, and fails the first test until it is.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
safetensors = pytest.importorskip("safetensors.torch")

from click.testing import CliRunner  # noqa: E402
from scheme_cases import CASES, LM, MORE, WORDS, Block, Case, Masked, Translator, floats, n_parameters  # noqa: E402
from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tieaudit import structural  # noqa: E402
from tieaudit.change import Equalise, Share  # noqa: E402
from tieaudit.cli import main  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.registry import discover  # noqa: E402
from tieaudit.rewrite import rewrite  # noqa: E402
from tieaudit.schemes import Scheme  # noqa: E402

CONTAINERS = ("onnx", "module", "checkpoint", "folder")
FIRST = {case.scheme.partition(":")[0]: case for case in (*reversed(CASES), *MORE)}
"""One case for each scheme; a folder here is one whose class nobody knows."""
ELSEWHERE = {
    ("gqa", "onnx"): "test_gqa.py", ("mqa", "onnx"): "test_gqa.py",
    ("gqa", "folder"): "test_gqa_folders.py", ("mqa", "folder"): "test_gqa_folders.py",
    ("declare", "folder"): "test_folders.py",
    ("dedup", "folder"): "test_folders.py", ("untie", "folder"): "test_folders.py",
}  # fmt: skip
"""What needs a model of its own: (scheme, container) → the file whose tests run it."""
NOT_POSSIBLE = {
    ("gqa", "module"): "the code of a live module cuts keys and values into the heads that it was built for",
    ("mqa", "module"): "the code of a live module cuts keys and values into the heads that it was built for",
    ("gqa", "checkpoint"): "a checkpoint says nowhere how many heads there are",
    ("mqa", "checkpoint"): "a checkpoint says nowhere how many heads there are",
    ("declare", "onnx"): "nothing in a model of format onnx can declare a tie",
    ("declare", "module"): "nothing in a model of format torch_module can declare a tie",
    ("declare", "checkpoint"): "nothing in a model of format torch_checkpoint can declare a tie",
}
"""What a container has no place for: (scheme, container) → what the user is told."""
OWN = {"custom": LM, "gqa": LM, "mqa": LM, "declare": LM}
"""Models for what is refused, or has no closed form in the cases."""


def runs_here() -> list[tuple[str, str]]:
    names = [*FIRST, "custom"]
    return [(n, c) for n in names for c in CONTAINERS if (n, c) not in ELSEWHERE and (n, c) not in NOT_POSSIBLE]


def test_every_scheme_has_its_place_in_every_container() -> None:
    known = {*runs_here(), *ELSEWHERE, *NOT_POSSIBLE}
    assert {name for name, _ in known} == set(discover("schemes", Scheme))
    assert known == {(name, container) for name in discover("schemes", Scheme) for container in CONTAINERS}
    home = Path(__file__).parent
    for (name, _), file in ELSEWHERE.items():
        assert f'"{name}' in (home / file).read_text(), f"{file} runs no {name}"


@dataclass(frozen=True)
class Given:
    scheme: str
    module: nn.Module
    inputs: Any
    n_saved: int


def given(name: str, folder: Path) -> Given:
    torch.manual_seed(0)
    if name in OWN:
        file = folder / "ties.toml"
        file.write_text('[[group]]\nrole = "ffn_up"\nlayers = [2, 3, 4]\n')
        argument = {"custom": f":{file}", "gqa": ":2"}.get(name, "")
        return Given(f"{name}{argument}", LM().eval(), WORDS, 2 * 12 * 8 if name == "custom" else 0)  # F · D twice
    case: Case = FIRST[name]
    module = case.make().eval()
    words = isinstance(module, (LM, Translator, Masked))
    return Given(case.scheme, module, WORDS if words else floats(), case.n_saved)


_EXPORTS: dict[tuple[object, ...], bytes] = {}
"""Exports of models that are the same in structure and seed: exporting takes half of such a test's time."""


def exported(one: Given, path: Path) -> Path:
    shapes = tuple((name, tuple(value.shape)) for name, value in one.module.state_dict().items())
    shared = tuple(sorted(name for name, _ in one.module.named_parameters()))
    values = tuple(float(value.double().sum()) for value in one.module.state_dict().values())
    key = (type(one.module), shapes, shared, values, one.scheme == "untie")
    if key not in _EXPORTS:
        _EXPORTS[key] = _exported(one, path).read_bytes()
    path.write_bytes(_EXPORTS[key])
    return path


def _exported(one: Given, path: Path) -> Path:
    # the exporter's optimiser makes matrices anonymous, so that nothing tells an encoder that its decoder never reads,
    # and it stores the transpose of a tied table once more
    keeps_names = isinstance(one.module, Translator) or one.scheme == "untie"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            one.module, (one.inputs,), None, dynamo=True, optimize=not keeps_names, verbose=False
        )
        program.save(str(path), external_data=False)
    return path


def saved(one: Given, container: str, folder: Path) -> Path:
    if container == "onnx":
        return exported(one, folder / "m.onnx")
    state = {name: value.detach() for name, value in one.module.state_dict().items()}
    if container == "checkpoint":
        torch.save(state, folder / "m.pt")
        return folder / "m.pt"
    home = folder / "in"
    home.mkdir()
    safetensors.save_file({name: value.clone() for name, value in state.items()}, home / "model.safetensors")
    (home / "config.json").write_text(json.dumps({"model_type": "made-up", "architectures": ["MadeUp"]}))
    return home


CASES_HERE = runs_here()


@pytest.mark.parametrize(("name", "container"), CASES_HERE, ids=["-".join(one) for one in CASES_HERE])
def test_a_scheme_runs_with_its_proof_and_saves_what_its_closed_form_says(
    name: str, container: str, tmp_path: Path
) -> None:
    one = given(name, tmp_path)
    lossless = name in ("dedup", "untie")
    how: dict[str, Any] = {"scheme": one.scheme, "allow_lossy": not lossless, "merge": None if lossless else "mean"}
    before = n_parameters(one.module)
    if container == "module":
        expected = one.module(one.inputs)
        change = tieaudit.tie(one.module, **how) if name != "untie" else tieaudit.untie(one.module)
        assert not change.plan.refusals
        assert n_parameters(one.module) == before - one.n_saved
        assert torch.equal(one.module(one.inputs), expected) == lossless
        return
    path = saved(one, container, tmp_path)
    if container == "onnx":
        _runs_as_planned(one, path, how, before, lossless)
        return
    plan, out = tieaudit.plan(path, **how), tmp_path / "out"
    assert not plan.refusals
    out.mkdir()
    model = load_one(path)
    written, after = rewrite(model, plan, out)
    assert structural.check(model, after, plan, written).problems == []
    if container == "checkpoint":
        assert plan.n_bytes_saved == 4 * one.n_saved
        found = torch.load(out / path.name)
        places = {value.untyped_storage().data_ptr(): value.numel() for value in found.values()}
        assert sum(places.values()) == before - one.n_saved
    else:  # no loader would restore a tie: each name holds the one value
        assert {type(edit) for edit in plan.edits} == {Equalise}
        assert plan.n_bytes_saved == 0
        assert any("no byte is saved" in said for said in plan.notes)
        assert any("into a parameter for each name" in said for said in plan.notes)  # who makes what of it
        found = safetensors.load_file(out / "model.safetensors")
    _holds_the_planned_values(one.module, plan.edits, found)


def _runs_as_planned(one: Given, path: Path, how: dict[str, Any], before: int, lossless: bool) -> None:
    out = path.with_name("out.onnx")
    done = tieaudit.apply(path, to=out, **how)
    assert not done.plan.refusals
    assert [level.outcome for level in done.proof.levels] == ["held"] * 3
    # the bias of a key adds one number to all scores of a query, which softmax takes away again
    silent = [use for use in done.proof.not_exercised if not use.endswith("not tried)")]
    assert all("k_proj.bias" in use for use in silent)
    assert (done.proof.drift is None) if lossless else (done.proof.drift or 0) > 0
    stored = [sum(math.prod(tensor.dims) for tensor in parameters(file)) for file in (path, out)]
    assert stored == [before, before - one.n_saved]
    assert done.plan.n_bytes_saved == 4 * one.n_saved


def parameters(file: Path) -> list[Any]:
    """The initializers that are no shapes or indices."""
    return [
        tensor
        for tensor in onnx.load(file).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims
    ]


def _holds_the_planned_values(module: nn.Module, edits: Any, found: dict[str, torch.Tensor]) -> None:
    """Each planned name holds the mean of its class, worked out here; every other what it held."""
    expected = {name: value.detach() for name, value in module.state_dict().items()}
    for edit in edits:
        if isinstance(edit, (Share, Equalise)):
            seen = [expected[one.id].T if one.view.transposes else expected[one.id] for one in edit.members]
            total = sum((value.double() for value in seen[1:]), seen[0].double()) / len(seen)
            for one in edit.members:
                expected[one.id] = (total.T if one.view.transposes else total).float()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("name", "container"), NOT_POSSIBLE, ids=["-".join(one) for one in NOT_POSSIBLE])
def test_what_a_container_has_no_place_for_is_refused_with_the_listed_reason(
    name: str, container: str, tmp_path: Path
) -> None:
    one = given(name, tmp_path)
    source: Any = one.module if container == "module" else saved(one, container, tmp_path)
    plan = tieaudit.plan(source, scheme=one.scheme, allow_lossy=True)
    assert plan.edits == ()
    (refusal,) = plan.refusals
    assert refusal.because.startswith(NOT_POSSIBLE[name, container])


# what a model cannot take --------------------------------------------------------------------------------------------


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(20, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(words)
        for layer in self.layers:
            x = layer(x)
        return x


def small(kind: str) -> nn.Module:
    return {"vision": Vision, "control": lambda: nn.Linear(3, 4), "encoder": Encoder, "one layer": lambda: LM(1)}[
        kind
    ]()


LAYERS, TABLE = "layer", "token embedding"
MISSING = {
    "albert": LAYERS, "cycle": LAYERS, "cycle-rev": LAYERS, "ffn": LAYERS, "immediate": LAYERS, "middle-cycle": LAYERS,
    "norms": LAYERS, "sandwich": LAYERS, "sequence": LAYERS, "encoder-decoder": TABLE, "io": TABLE, "three-way": TABLE,
    "io-bias": "no bias of an output head", "gqa": "no key or value projection", "mqa": "no key or value projection",
    "shared-kv": "no key with its value", "shared-qk": "no query with its key", "siamese": "no two towers",
    "tied-autoencoder": "no encoder with its mirror image", "tied-transformer": "no encoder and decoder",
    "declare": "nothing in a model of format", "custom": "matches nothing",
}  # fmt: skip
"""Scheme → what a model without layers and without words lacks for it. `dedup` and `untie` take any model."""
ARGUMENT = {"sequence": ":2", "cycle": ":2", "cycle-rev": ":2", "gqa": ":2", "middle-cycle": ":1"}


def reasons(module: nn.Module, name: str, folder: Path) -> list[str] | None:
    """Why nothing is done; None where something is."""
    file = folder / "ties.toml"
    file.write_text('[[group]]\nrole = "attention_key"\n')
    argument = f":{file}" if name == "custom" else ARGUMENT.get(name, "")
    plan = tieaudit.plan(module, scheme=f"{name}{argument}", allow_lossy=True)
    return None if plan.edits else [one.because for one in plan.refusals]


def test_what_a_model_of_another_kind_lacks_is_named_for_every_scheme(tmp_path: Path) -> None:
    assert {*MISSING, "dedup", "untie"} == set(discover("schemes", Scheme))
    for kind in ("vision", "control"):
        for name, what in MISSING.items():
            (said,) = reasons(small(kind), name, tmp_path) or [""]
            assert what in said, (kind, name, said)


@pytest.mark.parametrize(
    ("kind", "name", "because"),
    [
        ("one layer", "albert", "only one layer was recognised in this model, with none to share with"),
        ("one layer", "custom", "matches only layers.0.k_proj.weight: there is nothing to share"),
        ("one layer", "tied-autoencoder", "embed_tokens.weight is token_embedding: this is no chain of layers"),
        ("encoder", "io", "no output head was recognised in this model"),
        ("encoder", "encoder-decoder", "no second token embedding was recognised: an encoder's and a decoder's"),
        ("encoder", "tied-transformer", "no encoder and decoder of several layers each were recognised"),
        ("encoder", "cycle", "the 2 layers: each would be a set of its own, so that none is shared"),
        ("encoder", "sequence", "the 2 layers: each would be a set of its own, so that none is shared"),
        ("encoder", "cycle-rev", "the 2 layers: at least 2·M = 4 layers are needed"),
        ("encoder", "sandwich", "the 2 layers: nothing is left to share between 1 at each end"),
    ],
)
def test_a_model_that_is_too_small_or_half_of_one_is_told_what_is_missing(
    kind: str, name: str, because: str, tmp_path: Path
) -> None:
    (said,) = reasons(small(kind), name, tmp_path) or [""]
    assert because in said


def test_the_page_of_every_scheme_cites_its_source() -> None:
    for name, scheme in discover("schemes", Scheme).items():
        result = CliRunner().invoke(main, ["explain", name])
        assert result.exit_code == 0
        said = " ".join(result.output.split())
        assert f"Source: {' '.join(scheme.source.split())}" in said
        assert len(scheme.source) > 20
        assert len(scheme.page) > 40
