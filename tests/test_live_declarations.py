"""What the class of a live transformers model declares, against what the module holds: broken, lost and hidden ties.

The truth is the library's: which names it makes one `Parameter`, under the flag as it is and as it could be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.test_live_zoo import KINDS, built, identity_groups  # noqa: E402
from tieaudit.formats.torch_module import read  # noqa: E402
from tieaudit.formats.torch_module.declared import declared  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declarations need no graph: none of these is traced, which is what takes the time."""
    monkeypatch.setattr(read, "SECONDS", 0.0)


def codes(module: nn.Module) -> dict[str, set[str]]:
    """Findings by code, with all names they concern."""
    found: dict[str, set[str]] = {}
    for finding in tieaudit.scan(module).findings:
        found.setdefault(finding.code, set()).update(finding.ids)
    return found


def own(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def changed(weight: torch.Tensor) -> nn.Parameter:
    """One bit of one element differs."""
    other = weight.detach().clone()
    other.view(torch.int32)[3, 1] ^= 1
    return nn.Parameter(other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_declares_what_it_ties(kind: str) -> None:
    module = built(kind)
    report = tieaudit.scan(module)
    model = report.subject.model
    assert {frozenset(one.members) for one in model.declarations if one.active} == identity_groups(module)
    assert model.metadata["transformers"] == transformers.__version__
    assert report.findings == ()
    assert all(one.restores for one in model.declarations if one.active)


def test_a_declared_tie_of_which_one_bit_differs_is_broken() -> None:
    module = built("LlamaForCausalLM")
    module.lm_head.weight = changed(module.lm_head.weight)
    report = tieaudit.scan(module)
    (finding,) = report.findings
    assert (finding.code, finding.ids) == ("TIE101", (EMBED, HEAD))
    assert finding.fix is not None
    assert 'tieaudit.tie(module, scheme="io", allow_lossy=True, merge="keep:embedding")' in finding.fix.command
    (claim,) = report.subject.model.declarations
    assert claim.claimed_by == f"LlamaForCausalLM (transformers {transformers.__version__})"
    assert claim.condition == "config.tie_word_embeddings"
    # the remedy that it names does mend it
    tieaudit.tie(module, scheme="io", allow_lossy=True, merge="keep:embedding")
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert codes(module) == {}


def test_a_declared_tie_of_equal_copies_is_stored_twice_and_counted_as_two() -> None:
    module = built("LlamaForCausalLM")
    module.lm_head.weight = own(module.lm_head.weight)
    report = tieaudit.scan(module)
    assert [(finding.code, finding.ids) for finding in report.findings] == [("TIE102", (EMBED, HEAD))]
    # two Parameter objects: an optimizer trains them apart, and parameters() counts both
    assert report.summary.n_parameters == sum(p.numel() for p in module.parameters())
    once = report.summary.n_parameters - 97 * 16
    assert report.summary.n_parameters_because == (
        f"equal or aliased names in separate Parameter objects count apart; as one, {once:,}"
    )


def test_equal_tensors_under_a_flag_that_is_off_are_untied_but_equal() -> None:
    module = built("LlamaForCausalLM")
    module.config.tie_word_embeddings = False
    module.lm_head.weight = own(module.lm_head.weight)
    assert codes(module) == {"TIE104": {EMBED, HEAD}}
    module.lm_head.weight = changed(module.lm_head.weight)
    assert codes(module) == {}  # neither tied nor declared


def test_equal_layers_that_no_class_declares_are_a_hidden_tie() -> None:
    module = built("LlamaForCausalLM")
    one, other = (module.model.layers[index].mlp.up_proj for index in (0, 1))
    other.weight = own(one.weight)
    names = {f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1)}
    report = tieaudit.scan(module)
    (finding,) = [finding for finding in report.findings if finding.code == "TIE103"]
    assert set(finding.ids) == names
    assert finding.fix is not None
    assert "only if the class declares it" in finding.fix.command


def test_a_tie_that_holds_whatever_the_flag_says_is_declared_without_one() -> None:
    module = built("T5ForConditionalGeneration")
    module.encoder.embed_tokens.weight = changed(module.shared.weight)
    (claim,) = [one for one in tieaudit.scan(module).subject.model.declarations if len(one.members) > 2]
    assert "TIE101" in codes(module)
    assert set(claim.members) >= {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def test_a_class_inside_another_module_declares_under_its_path() -> None:
    whole = nn.ModuleDict({"left": built("GPT2LMHeadModel"), "right": built("LlamaForCausalLM")})
    whole["right"].lm_head.weight = changed(whole["right"].lm_head.weight)
    model = tieaudit.scan(whole).subject.model
    assert [one.members for one in model.declarations] == [
        ("left.transformer.wte.weight", "left.lm_head.weight"),
        (f"right.{EMBED}", f"right.{HEAD}"),
    ]
    assert codes(whole)["TIE101"] == {f"right.{EMBED}", f"right.{HEAD}"}


def test_a_member_that_an_adapter_replaced_is_left_out() -> None:
    module = built("LlamaForCausalLM")
    module.lm_head = nn.Sequential(module.lm_head)  # what was lm_head.weight is lm_head.0.weight now
    report = tieaudit.scan(module)
    assert report.subject.model.declarations == ()
    assert report.cannot_tell == ()
    assert {tie.ids for tie in report.subject.found.ties if len(tie.ids) > 1} >= {(EMBED, "lm_head.0.weight")}


def test_a_class_of_one_s_own_with_ties_of_its_own_is_asked() -> None:
    """Code that the user has loaded: no file of the library knows it, the live class does."""

    class Mine(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.second_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
            done = super().tie_weights(*args, **kwargs)
            if hasattr(self, "second_head"):  # the parent's constructor ties, too
                self.second_head.weight = self.model.embed_tokens.weight
            return done

    module = Mine(transformers.LlamaConfig(**KINDS["LlamaForCausalLM"][1]))
    module.tie_weights()
    assert identity_groups(module) == {frozenset({EMBED, HEAD, "second_head.weight"})}
    (claim,) = tieaudit.scan(module).subject.model.declarations
    assert set(claim.members) == {EMBED, HEAD, "second_head.weight"}


def test_a_class_that_cannot_be_built_again_is_cannot_tell() -> None:
    class Picky(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any, key: str = "") -> None:
            if not key:
                raise PermissionError("no key")
            super().__init__(config)

    module = Picky(transformers.LlamaConfig(**KINDS["LlamaForCausalLM"][1]), key="mine")
    one, other = (module.model.layers[index].mlp.up_proj for index in (0, 1))
    other.weight = own(one.weight)
    report = tieaudit.scan(module)
    assert report.subject.model.metadata["transformers"] == "not asked: convention"
    assert "PermissionError: no key" in " ".join(item.because for item in report.cannot_tell)
    assert "whether the class ties them is not known" in " ".join(item.because for item in report.cannot_tell)
    assert "TIE103" not in {finding.code for finding in report.findings}


def test_asking_changes_neither_the_module_nor_the_random_state() -> None:
    module = built("BartForConditionalGeneration")
    flag, state = module.config.tie_word_embeddings, torch.get_rng_state()
    grad = torch.is_grad_enabled()
    weights = {weight.id: weight for weight in read_module(module).weights}
    assert declared(module, weights).declarations
    assert torch.equal(torch.get_rng_state(), state)
    assert (module.config.tie_word_embeddings, torch.is_grad_enabled()) == (flag, grad)
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


def test_a_model_without_memory_is_asked_too_and_its_values_cannot_be_told() -> None:
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**KINDS["LlamaForCausalLM"][1]))
    module.tie_weights()
    assert codes(module) == {}
    module.lm_head.weight = nn.Parameter(torch.empty(97, 16, device="meta"))
    report = tieaudit.scan(module)
    assert report.findings == ()
    assert any("as declared" in item.because for item in report.cannot_tell)


def test_a_plain_module_declares_nothing_and_transformers_is_not_imported(tmp_path: Path) -> None:
    script = (
        "import sys, torch, tieaudit\n"
        "report = tieaudit.scan(torch.nn.Linear(2, 2))\n"
        "print(report.subject.model.declarations, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "() False", done.stderr


def test_declarations_cross_the_process_that_ran_the_factory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, transformers\n"
        "def make():\n"
        "    config = transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)\n"
        "    model = transformers.GPT2LMHeadModel(config)\n"
        "    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 16))\n"
        "    return model\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tieaudit", "scan", "mine:make", "--format", "json"], cwd=tmp_path, capture_output=True,
        text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)["models"]
    assert [finding["code"] for finding in document["findings"]] == ["TIE101"]
