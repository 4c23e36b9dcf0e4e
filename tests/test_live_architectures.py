"""Every architecture of a zoo that lies beside the checkout: the library's own classes, built small by its script.

The script (TIEAUDIT_ZOO, or ../shared/zoo.py) says which architectures and how small; the truth is the live module.
`test_live_zoo.py` asks the same of nine classes that are built here, wherever the checkout lies.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.test_live_zoo import identity_groups  # noqa: E402
from tieaudit.calling import outputs, sample_inputs  # noqa: E402
from tieaudit.formats.torch_module.declared import declared  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402
from tieaudit.scan import scan  # noqa: E402

HOME = Path(os.environ.get("TIEAUDIT_ZOO") or Path(__file__).resolve().parent.parent.parent / "shared" / "zoo.py")
PINNED = transformers.__version__.startswith("5.23.")
"""Which architectures there are, and which of them the script can build, holds for one version."""

NOT_BUILT = {
    "emu3": "the causal model takes the text part of Emu3Config, the script gives it the whole",
    "esm": "EsmConfig has no vocabulary by default",
    "gemma4_text": "its per-layer embedding of 262,144 words is not shrunk: 202 million parameters",
    "kyutai_speech_to_text": "its padding id lies behind the shrunk vocabulary",
    "musicgen_melody": "the causal model takes the decoder part of its configuration, the script gives it the whole",
    "qwen4_exp": "the causal model takes the text part of its configuration, the script gives it the whole",
    "zamba": "with three layers there is no second shared block that the class could tie",
}
"""What the script's own sizes do not build, and why: there is no live module to look at."""
MENDED: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},  # the default of 64 is more than a head of the shrunk model has
    "esmc": {"num_key_value_heads": 4},  # its norms of keys are as wide as the model, so it needs as many heads as that
}
"""Sizes without which a forward pass of the shrunk model fails in the library."""


def _zoo() -> Any:
    spec = importlib.util.spec_from_file_location("architectures_zoo", HOME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
    return module


def _classes() -> dict[str, str]:
    """Architecture → class, in the order of the script."""
    if not HOME.is_file():
        return {}
    found: dict[str, str] = {}
    for kind in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ"):
        for arch, name in getattr(zoo.A, f"MODEL_FOR_{kind}_MAPPING_NAMES").items():
            if zoo.chosen(arch) and hasattr(transformers, name if isinstance(name, str) else name[0]):
                found.setdefault(arch, name if isinstance(name, str) else name[0])
    return found


zoo = _zoo() if HOME.is_file() else None
CLASSES = _classes()
pytestmark = pytest.mark.skipif(not CLASSES, reason=f"no zoo at {HOME}; set TIEAUDIT_ZOO")


@pytest.fixture(params=sorted(set(CLASSES) - set(NOT_BUILT)) or ["none"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    for key, value in MENDED.get(request.param, {}).items():
        monkeypatch.setitem(zoo.SMALL, key, value)
    arch = request.param
    warnings.simplefilter("ignore")  # the library's own, about layers without elements
    return zoo.build(getattr(transformers, CLASSES[arch]), zoo.CONFIG_MAPPING[arch], True)


def test_groups_counts_declarations_and_the_way_untied_and_back(module: nn.Module) -> None:
    model = read_module(module)
    report = scan(model)
    buffers = {weight.id for weight in model.weights if not weight.parameter}
    truth = identity_groups(module)
    assert {frozenset(tie.ids) for tie in report.subject.found.ties if not set(tie.ids) <= buffers} == truth
    assert report.summary.n_parameters == sum(p.numel() for p in module.parameters())
    assert report.summary.n_parameters_because == ""

    said = declared(module, {weight.id: weight for weight in model.weights})
    assert said.notes == ()
    assert {frozenset(one.members) for one in said.declarations if one.active} == truth

    inputs = sample_inputs(module)
    before, state = outputs(module, inputs), {name: value.clone() for name, value in module.state_dict().items()}
    assert before

    def same() -> bool:
        after, now = outputs(module, inputs), module.state_dict()
        return (
            before.keys() == after.keys()
            and all((before[name] == after[name]).all() for name in before)
            and now.keys() == state.keys()
            and all(torch.equal(now[name], state[name]) for name in state)
        )

    tieaudit.untie(module)
    assert identity_groups(module) == set()
    assert same()
    tieaudit.tie(module)
    assert identity_groups(module) == truth
    assert same()
    tieaudit.untie(module)
    assert identity_groups(module) == set()
    assert same()


@pytest.mark.skipif(not PINNED, reason="another version of transformers builds others")
@pytest.mark.parametrize("arch", NOT_BUILT)
def test_what_is_left_out_cannot_be_built(arch: str) -> None:
    assert arch in CLASSES
    with pytest.raises(Exception):  # noqa: B017, PT011 - each fails in the library, in a way of its own
        zoo.build(getattr(transformers, CLASSES[arch]), zoo.CONFIG_MAPPING[arch], True)


@pytest.mark.skipif(not PINNED, reason="another version of transformers has others")
def test_all_others_are_covered() -> None:
    assert len(CLASSES) == 61 + len(NOT_BUILT)
