"""Tying and untying live modules in place: what becomes one object, what training makes of it, and the way back."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import Autoencoder, TiedLM, Twice, Universal  # noqa: E402
from tieaudit.errors import RewriteRefused, UsageError  # noqa: E402
from tieaudit.formats.torch_module.tensors import identity  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """A matrix that lies transposed is multiplied by another kernel, which sums in another order."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_untie_gives_every_name_its_own_memory_and_the_same_outputs() -> None:
    module = TiedLM().eval()
    before, kept = module(WORDS), state(module)
    change = tieaudit.untie(module)
    assert module.head.weight is not module.embed.weight
    assert module.head.weight.data_ptr() != module.embed.weight.data_ptr()
    assert torch.equal(module(WORDS), before)
    assert same_state(state(module), kept)
    assert n_parameters(module) == 1026 + 400
    assert change.plan.n_bytes_saved == -400 * 4
    change.undo()
    assert module.head.weight is module.embed.weight
    change.undo()  # twice is harmless


def test_tie_makes_equal_copies_one_parameter_object() -> None:
    module = TiedLM()
    kept = state(module)
    tieaudit.untie(module)
    change = tieaudit.tie(module)
    assert module.head.weight is module.embed.weight
    assert same_state(state(module), kept)
    assert change.plan.lossless
    assert change.plan.n_bytes_saved == 400 * 4


def test_a_transposed_copy_reads_the_kept_parameter_through_a_view() -> None:
    module = Autoencoder().eval()
    x, kept = torch.randn(4, 6), state(module)
    before = module(x)
    change = tieaudit.tie(module)
    assert close(module(x), before)
    assert n_parameters(module) == 18 + 3 + 6
    assert module.decode.weight.data_ptr() == module.encode.weight.data_ptr()
    with torch.no_grad():
        module.encode.weight += 1
    assert torch.equal(module.decode.weight, module.encode.weight.T)
    with torch.no_grad():
        module.encode.weight.copy_(kept["encode.weight"])
    tieaudit.untie(module)
    assert type(module.decode) is nn.Linear
    assert same_state(state(module), kept)
    assert close(module(x), before)
    tieaudit.tie(module)
    assert type(module.decode) is not nn.Linear
    change.undo()
    assert type(module.decode) is nn.Linear
    assert same_state(state(module), kept)


def test_undoing_everything_in_reverse_gives_back_the_very_objects() -> None:
    module = Autoencoder()
    objects = {name: id(p) for name, p in module.named_parameters()}
    values = state(module)
    x = torch.randn(2, 6)
    before = module(x)
    changes = [tieaudit.tie(module), tieaudit.untie(module)]
    for change in reversed(changes):
        change.undo()
        assert close(module(x), before)
    assert {name: id(p) for name, p in module.named_parameters()} == objects
    assert same_state(state(module), values)


def test_a_module_at_two_paths_becomes_two_modules_and_one_again() -> None:
    module = Twice().eval()
    x, kept = torch.randn(3, 5), state(module)
    before, objects = module(x), module.second
    change = tieaudit.untie(module)
    assert module.second is not module.first
    assert module.second[0].weight.data_ptr() != module.first[0].weight.data_ptr()
    assert module.second[1].running_mean.data_ptr() != module.first[1].running_mean.data_ptr()
    assert torch.equal(module(x), before)
    assert same_state(state(module), kept)
    change.undo()
    assert module.second is module.first is objects


def test_recurrent_weights_that_were_tied_still_run() -> None:
    module = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    module[1].load_state_dict(module[0].state_dict())
    x = torch.randn(5, 2, 4)
    before = module[1](x)[0]
    change = tieaudit.tie(module)
    assert module[1].weight_hh_l0 is module[0].weight_hh_l0
    with torch.no_grad():
        module[0].weight_hh_l0 += 1
    assert torch.equal(module[1](x)[0], module[0](x)[0])
    assert not torch.equal(module[1](x)[0], before)
    change.undo()
    assert module[1].weight_hh_l0 is not module[0].weight_hh_l0


def test_separate_objects_over_one_memory_become_one_object() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    module[1].weight = nn.Parameter(module[0].weight.data)
    assert module[1].weight is not module[0].weight
    parity = tieaudit.gradients(module, torch.tensor([[1, 2]]))
    assert parity.updated_twice == (("0.weight", "1.weight"),)
    assert not parity.held
    tieaudit.tie(module)
    assert module[1].weight is module[0].weight
    assert tieaudit.gradients(module, torch.tensor([[1, 2]])).held


def test_different_tensors_are_not_tied_unless_asked_and_undo_restores_the_values() -> None:
    module = TiedLM(tied=False)
    kept = state(module)
    with pytest.raises(RewriteRefused, match="are different tensors"):
        tieaudit.tie(module, scheme="io")
    assert same_state(state(module), kept)
    change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge="keep:head")
    assert module.embed.weight is module.head.weight
    assert torch.equal(module.embed.weight, kept["head.weight"])
    assert not change.plan.lossless
    change.undo()
    assert same_state(state(module), kept)
    change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge="mean")
    assert torch.allclose(module.head.weight, (kept["head.weight"] + kept["embed.weight"]) / 2)
    change.undo()
    assert same_state(state(module), kept)


def test_a_frozen_and_a_trained_copy_cannot_be_one() -> None:
    module = TiedLM()
    tieaudit.untie(module)
    module.head.weight.requires_grad_(False)
    with pytest.raises(RewriteRefused, match=r"head\.weight is frozen"):
        tieaudit.tie(module)
    assert module.head.weight is not module.embed.weight


def test_a_parameter_and_an_equal_buffer_are_not_tied() -> None:
    module = nn.Linear(40, 40, bias=False)
    module.register_buffer("old", module.weight.detach().clone())
    with pytest.raises(RewriteRefused, match="some are buffers"):
        tieaudit.tie(module)


def test_nothing_to_tie_is_an_empty_plan() -> None:
    change = tieaudit.tie(TiedLM())
    assert change.plan.edits == ()


def test_a_parameter_that_is_called_several_times_stays_one() -> None:
    module = Universal()
    assert tieaudit.untie(module).plan.edits == ()


def test_a_configuration_that_says_otherwise_is_mentioned() -> None:
    module = TiedLM()
    module.config = types.SimpleNamespace(tie_word_embeddings=True)
    notes = tieaudit.untie(module).plan.notes
    assert any("tie_word_embeddings is True and was left alone" in note for note in notes)


@pytest.mark.parametrize("wrong", ["model.safetensors", {}, None])
def test_only_modules_are_tied_in_place(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"expected an nn\.Module"):
        tieaudit.tie(wrong)
    with pytest.raises(UsageError, match=r"expected an nn\.Module"):
        tieaudit.untie(wrong)


def test_the_gradient_of_a_tied_parameter_is_the_sum_over_its_slots() -> None:
    """By hand beside the library's answer: an embedding row gathers, the head's gradient is an outer product."""
    module = TiedLM()
    parity = tieaudit.gradients(module, WORDS)
    (tied,) = parity.tied
    assert tied.slots == tied.reached == ("embed.weight", "head.weight")
    assert tied.difference <= 1e-10
    assert dict(parity.kept) == {"SGD": True, "AdamW": True}
    assert parity.held
    double = copy.deepcopy(module).double()
    double(WORDS).square().sum().backward()
    apart = copy.deepcopy(module).double()
    tieaudit.untie(apart)
    apart(WORDS).square().sum().backward()
    assert apart.embed.weight.grad is not None
    assert apart.head.weight.grad is not None
    # the tempting wrong answer is the head's own part: it is not even close
    assert torch.allclose(double.embed.weight.grad, apart.embed.weight.grad + apart.head.weight.grad, rtol=1e-12)
    assert not torch.allclose(double.embed.weight.grad, apart.head.weight.grad, rtol=1e-3)


def test_the_gradient_of_a_transposed_tie_adds_the_transposed_slot() -> None:
    module = Autoencoder()
    tieaudit.tie(module)
    parity = tieaudit.gradients(module, torch.randn(5, 6))
    (tied,) = parity.tied
    assert set(tied.reached) == {"encode.weight", "decode.parametrizations.weight.original"}
    assert tied.held and parity.held


def test_a_slot_that_is_cut_off_from_the_gradient_is_noticed() -> None:
    class Detached(TiedLM):
        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.embed(words), self.head.weight.detach(), self.head.bias)

    (tied,) = tieaudit.gradients(Detached(), WORDS).tied
    assert tied.reached == ("embed.weight",)


def test_a_wrong_gradient_fails_the_parity() -> None:
    class Doubled(TiedLM):
        """A hook on the tied parameter: what the optimizer sees is twice what the slots say."""

        def __deepcopy__(self, memo: Any) -> TiedLM:
            made = TiedLM()
            made.load_state_dict(self.state_dict())
            made.embed.weight.register_hook(lambda grad: grad * 2)
            return made

    parity = tieaudit.gradients(Doubled(), WORDS)
    assert parity.tied[0].difference > 0.1
    assert not parity.held


def test_a_step_of_training_that_breaks_the_tie_is_noticed() -> None:
    class Rebinding(TiedLM):
        def forward(self, words: torch.Tensor) -> torch.Tensor:
            found = super().forward(words)
            if torch.is_grad_enabled():
                self.head.weight = nn.Parameter(self.head.weight.detach().clone())
            return found

    parity = tieaudit.gradients(Rebinding(), WORDS)
    assert dict(parity.kept) == {"SGD": False, "AdamW": False}


def test_gradients_leave_the_module_alone() -> None:
    module = TiedLM()
    kept, modes = state(module), [one.training for one in module.modules()]
    tieaudit.gradients(module, WORDS)
    assert same_state(state(module), kept)
    assert module.embed.weight.grad is None
    assert module.embed.weight.dtype == torch.float32
    assert [one.training for one in module.modules()] == modes


def test_an_output_without_a_gradient_is_a_clear_error() -> None:
    class Chooses(TiedLM):
        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return super().forward(words).argmax(-1)

    with pytest.raises(UsageError, match="expected an output with a gradient"):
        tieaudit.gradients(Chooses(), WORDS)


def test_equal_modules_verify_and_different_ones_do_not() -> None:
    module = TiedLM()
    other = copy.deepcopy(module)
    proof = tieaudit.verify(module, other, inputs=WORDS)
    assert [level.outcome for level in proof.levels] == ["held", "not run", "held"]
    with torch.no_grad():
        other.head.bias[7] += 0.5
    proof = tieaudit.verify(module, other, inputs=WORDS)
    assert [level.outcome for level in proof.levels] == ["not run", "not run", "failed"]
    assert proof.levels[2].max_difference == pytest.approx(0.5, rel=1e-3)
    assert tieaudit.verify(module, other, inputs=WORDS, max_drift=1.0).failed == ()


def test_outputs_of_every_nesting_are_compared() -> None:
    import dataclasses

    @dataclasses.dataclass
    class Answer:
        scores: torch.Tensor
        more: dict[str, Any]

    class Nested(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return Answer(y, {"pair": (y + 1, [y.bfloat16()]), "none": None})

    from tieaudit.calling import outputs

    found = outputs(Nested(2, 2), torch.ones(1, 2))
    assert list(found) == ["scores", "more.pair[0]", "more.pair[1][0]"]
    assert np.allclose(found["more.pair[0]"], found["scores"] + 1)


def test_a_path_and_a_module_are_not_compared() -> None:
    with pytest.raises(UsageError, match="a path and a module"):
        tieaudit.verify("model.onnx", TiedLM())
    with pytest.raises(UsageError, match="found a device"):
        tieaudit.verify(TiedLM(), TiedLM(), device="cuda")


def test_two_modules_are_compared_on_made_up_inputs_where_none_are_given() -> None:
    module = TiedLM()
    proof = tieaudit.verify(module, copy.deepcopy(module))
    assert proof.failed == ()
    assert tieaudit.verify(module, TiedLM()).failed != ()


def test_inputs_of_a_live_module_are_found_by_trial_or_asked_for() -> None:
    from torch_modules import Unguessable

    module = TiedLM().train()
    assert not tieaudit.verify(module, module).failed
    assert module.training
    with pytest.raises(
        UsageError, match=r"expected inputs=…, found none: no inputs could be made up for forward\(batch"
    ):
        tieaudit.verify(Unguessable(), Unguessable())


def test_a_path_is_scanned_planned_applied_and_verified_as_on_the_command_line(tmp_path: Path) -> None:
    from tests import tiny_onnx

    source = tiny_onnx.lost(tmp_path / "lost.onnx")
    assert tieaudit.scan(source).summary.n_bytes_duplicate > 0
    assert tieaudit.plan(str(source)).edits
    done = tieaudit.apply(source, to=tmp_path / "tied.onnx")
    assert done.delivered.path == tmp_path / "tied.onnx"
    assert tieaudit.scan(tmp_path / "tied.onnx").summary.n_bytes_duplicate == 0
    assert tieaudit.verify(source, tmp_path / "tied.onnx").failed == ()
    with pytest.raises(RewriteRefused, match="nothing was written"):
        tieaudit.apply(tmp_path / "tied.onnx", to=tmp_path / "again.onnx")
    with pytest.raises(UsageError, match="a name that ends in"):  # which container it is to be, nothing else says
        tieaudit.apply(Autoencoder(), to=tmp_path / "never")


def test_the_functions_stay_functions_when_the_stages_are_imported() -> None:
    import importlib

    for name in ("scan", "plan", "apply", "verify"):
        stage = importlib.import_module(f"tieaudit.{name}")
        assert isinstance(stage, types.ModuleType)
        assert isinstance(getattr(tieaudit, name), types.FunctionType)


def test_the_front_door_is_small_documented_and_light() -> None:
    assert len(tieaudit.__all__) <= 12
    for name in tieaudit.__all__:
        public = getattr(tieaudit, name)
        assert len(public.__doc__ or "") > 40, name
        if isinstance(public, types.FunctionType):
            assert set(public.__annotations__) >= {*public.__code__.co_varnames[: public.__code__.co_argcount]}, name
    code = "import sys, tieaudit; print(sorted({'torch', 'onnx', 'numpy', 'transformers', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(tieaudit)
    assert result.attempted >= 20
    assert result.failed == 0


def test_identity_tells_two_memories_apart() -> None:
    one = torch.zeros(3)
    assert identity(one) == identity(one.view(3))
    assert identity(one) != identity(torch.zeros(3))


def test_untying_a_copy_leaves_the_transposed_tie_of_the_original_alone() -> None:
    """torch's own removal of a parametrization takes the weight away from every deep copy, too."""
    module = Autoencoder()
    tieaudit.tie(module)
    other = copy.deepcopy(module)
    x = torch.randn(2, 6)
    before = module(x)
    tieaudit.untie(other)
    assert close(module(x), before)
    assert close(other(x), before)


def test_another_parametrization_of_the_same_module_stays() -> None:
    module = Autoencoder()
    tieaudit.tie(module)
    nn.utils.parametrizations.weight_norm(module.decode, "bias")
    x = torch.randn(2, 6)
    before = module(x)
    tieaudit.untie(module)
    assert list(module.decode.parametrizations) == ["bias"]
    assert "weight" in module.decode._parameters
    assert close(module(x), before)
