"""Training parity beyond the plain tie: slices, buffers, widths, modes, losses of the library's own, devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_modules import Autoencoder, CutOff, Steeper, TiedLM, Words  # noqa: E402

import tieaudit  # noqa: E402
from tieaudit.arithmetic import exact  # noqa: E402
from tieaudit.backward import LIMIT, across, in_float64, own_loss  # noqa: E402
from tieaudit.errors import UsageError  # noqa: E402

WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def compared(one: nn.Module, other: nn.Module, inputs: Any) -> Any:
    def given() -> Any:
        return (inputs.double() if inputs.is_floating_point() else inputs,), {}

    with exact():
        return across(in_float64(one), in_float64(other), given, given, set())


def twins(kind: type[nn.Module]) -> tuple[Any, Any]:
    tied = kind()
    apart: Any = kind(tied=False)
    apart.load_state_dict(tied.state_dict())
    return tied, apart


def test_a_tied_module_learns_what_its_untied_twin_learns_whichever_comes_first() -> None:
    for one, other in (twins(Words), twins(Words)[::-1]):
        found = compared(one, other, WORDS)
        assert found.held and found.limit == LIMIT and found.left == ()
        (row,) = found.summed
        assert row.slots == row.reached == ("embed.weight", "head.weight") and row.n_separate == 2


def test_the_sum_is_the_one_that_is_added_by_hand() -> None:
    tied, apart = twins(Words)
    double = copy.deepcopy(apart).double()
    own_loss(double(WORDS)).backward()
    twice = copy.deepcopy(tied).double()
    own_loss(twice(WORDS)).backward()
    assert torch.allclose(twice.embed.weight.grad, double.embed.weight.grad + double.head.weight.grad, rtol=1e-12)


def test_equal_outputs_with_another_gradient_differ() -> None:
    _, apart = twins(Words)
    steeper = Steeper(tied=False)
    steeper.load_state_dict(apart.state_dict())
    found = compared(apart, steeper, WORDS)
    assert {row.name: row.difference > LIMIT for row in found.summed} == {"embed.weight": False, "head.weight": True}


def test_a_transposed_tie_is_summed_transposed_and_both_names_are_plain() -> None:
    apart = Autoencoder()
    tied = copy.deepcopy(apart)
    tieaudit.tie(tied)
    for one, other in ((apart, tied), (tied, apart)):
        found = compared(one, other, torch.randn(5, 6))
        row = next(row for row in found.summed if row.n_separate == 2)
        assert found.held and found.left == ()
        assert set(row.slots) - {"decode.parametrizations.weight.original"} <= {"encode.weight", "decode.weight"}


def test_a_name_that_one_of_them_has_not_is_left_and_told() -> None:
    more = Words()
    more.extra = nn.Linear(2, 2, bias=False)
    assert compared(Words(), more, WORDS).left == ("extra.weight",)


def test_a_detached_slot_holds_proves_nothing_and_is_named() -> None:
    parity = tieaudit.gradients(CutOff(), WORDS)
    (tied,) = parity.tied
    assert parity.held and not parity.proved
    assert tied.reached == ("embed.weight",) and tied.cut_off == ("head.weight",)
    assert "which proves nothing; nothing is learnt through head.weight" in str(parity)
    whole = tieaudit.gradients(Words(), WORDS)
    assert whole.proved
    assert "is the sum over 2 slots" in str(whole)


def test_a_module_that_rounds_to_float32_inside_is_measured_by_that_and_a_wrong_gradient_still_fails() -> None:
    class Narrow(Autoencoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(nn.functional.linear(x.float(), self.encode.weight.float()))
            return nn.functional.linear(hidden, self.decode.weight.float())

    apart = Narrow()
    tied = copy.deepcopy(apart)
    tieaudit.tie(tied)
    found = compared(apart, tied, torch.randn(50, 6))
    assert found.held and 1e-7 < found.limit < 1e-4

    class Wrong(Narrow):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.decode.weight + 0.01 * (self.decode.weight - self.decode.weight.detach())
            hidden = torch.tanh(nn.functional.linear(x.float(), self.encode.weight.float()))
            return nn.functional.linear(hidden, weight.float())

    wrong = Wrong()
    wrong.load_state_dict(apart.state_dict())
    assert not compared(apart, wrong, torch.randn(50, 6)).held  # one per cent


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference() -> None:
    """The bias of a key adds one number to all scores of a query, which softmax takes away again."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ x

    class Other(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = (self.query(x).unsqueeze(-2) * self.key(x).unsqueeze(-3)).sum(-1)
            return (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ x

    one, other = Attention(), Other()
    other.load_state_dict(one.state_dict())
    found = compared(one, other, torch.randn(3, 5, 6))
    assert found.held, found


@pytest.mark.parametrize("turned", [False, True])
def test_parameters_that_share_memory_in_part_or_transposed_are_updated_twice(turned: bool) -> None:
    module = nn.Module()
    whole = torch.randn(4, 4)
    module.whole = nn.Parameter(whole)
    module.part = nn.Parameter(whole.T if turned else whole[1:3])
    module.forward = lambda x: x @ module.whole + (x @ module.part if turned else x[:2] @ module.part)  # type: ignore[method-assign]
    from tieaudit.training import _updated_twice

    assert _updated_twice(module) == (("whole", "part"),)


def test_columns_of_one_matrix_that_never_meet_are_updated_once() -> None:
    from tieaudit.training import _updated_twice

    module, both = nn.Module(), torch.randn(4, 6)
    module.left, module.right = nn.Parameter(both[:, :3]), nn.Parameter(both[:, 3:])
    assert _updated_twice(module) == ()
    module.more = nn.Parameter(both[:, 2:4])
    assert _updated_twice(module) == (("left", "right", "more"),)


def test_a_tied_buffer_that_training_replaces_is_noticed() -> None:
    class Counts(Words):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("also", self.seen)

        def forward(self, words: torch.Tensor) -> dict[str, Any]:
            if self.training:
                self.seen = self.seen + 1
            return super().forward(words)

    assert dict(tieaudit.gradients(Counts(), WORDS).kept) == {"SGD": False, "AdamW": False}


def test_a_batch_of_one_that_batchnorm_refuses_in_training_mode_is_tried_in_the_other() -> None:
    class Normed(Words):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(40)

        def forward(self, words: torch.Tensor) -> dict[str, Any]:
            return {"scores": self.norm(super().forward(words)["scores"][:, 0])}

    assert tieaudit.gradients(Normed(), WORDS[:1]).proved


def test_dropout_and_recurrent_layers_leave_nothing_to_chance() -> None:
    module = TiedLM(n_layers=2)
    module.rnn.dropout = 0.5
    module.train()
    assert tieaudit.gradients(module, WORDS).proved
    assert module.training and module.rnn.dropout == 0.5


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_a_transformers_model_learns_by_its_own_loss(arch: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids = {"vocab_size": 50, "pad_token_id": 0, "tie_word_embeddings": True}
    if arch == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, **ids)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **ids
        )
        model = transformers.T5ForConditionalGeneration(config)
    given = {"input_ids": WORDS, "labels": WORDS}
    seen: list[float] = []

    def loss(output: Any) -> torch.Tensor:
        seen.append(float(output.loss.detach()))
        return output.loss

    own, named = tieaudit.gradients(model, given), tieaudit.gradients(model, given, loss=loss)
    assert seen
    for parity in (own, named):
        assert parity.proved, str(parity)
        assert dict(parity.kept) == {"SGD": True, "AdamW": True}
    assert [one.slots for one in own.tied] == [one.slots for one in named.tied]


def test_the_outputs_own_loss_is_taken_where_it_has_one() -> None:
    x = torch.ones(2, requires_grad=True)
    assert own_loss({"loss": x.sum(), "logits": x * 100}) == 2
    assert own_loss({"loss": torch.ones(()), "logits": x}) != 1  # without a gradient it is no loss
    with pytest.raises(UsageError, match="expected an output with a gradient"):
        own_loss({"ids": torch.ones(2)})


def test_a_module_that_cannot_be_copied_is_a_clear_error() -> None:
    module = Words()
    module.cache = module.embed.weight * 2  # no leaf
    with pytest.raises(UsageError, match="no copy of it in float64 can be made"):
        tieaudit.gradients(module, WORDS)


def test_a_module_without_ties_says_so() -> None:
    parity = tieaudit.gradients(Words(tied=False), WORDS)
    assert parity.held and not parity.proved
    assert str(parity).startswith("no parameter of this module has several names")


def test_a_name_that_no_operation_reads_is_told_from_one_through_which_nothing_is_learnt() -> None:
    class TwoNames(nn.Module):
        """As BERT's head: the bias has a second name, which the forward pass never uses."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(3, 4)
            self.bias = self.decoder.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x)

    parity = tieaudit.gradients(TwoNames(), torch.randn(2, 3))
    (tied,) = parity.tied
    assert tied.unread == ("bias",) and tied.cut_off == ()
    assert parity.proved
    assert "of which no operation reads bias" in str(parity)
