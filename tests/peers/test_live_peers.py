"""Cases of peers about modules in memory: sharding, counting, copying, and what tieaudit does with them.

CMP: mosaicml/composer, TI: TylerYep/torchinfo, DS: deepspeedai/DeepSpeed, TX: google/torchax, NT: huggingface/nanotron,
FX: google/flax (its cases said with PyTorch modules), NNEF: sonos/torch-to-nnef, TT: pytorch/torchtune. See
docs/peer-cases.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import IDS, LM, groups, of, outcomes, report, saved, tied  # noqa: E402
from tieaudit.errors import RewriteRefused  # noqa: E402

# --- Composer: which modules must be sharded together ----------------------------------------------------------------


def tied_modules(module: nn.Module) -> set[frozenset[str]]:
    """Children that share something with another child: what a wrapper of whole children needs to know."""
    owners = [frozenset(name.partition(".")[0] for name in group) for group in groups(module)]
    return {one for one in owners if len(one) > 1}


def three(size: int = 4) -> list[nn.Linear]:
    return [nn.Linear(size, size) for _ in range(3)]


def inside_one() -> nn.Module:
    one, two, _ = three()
    return of(module1=nn.Sequential(one, tied(one, two)), module2=nn.Linear(4, 4))


def first_and_third() -> nn.Module:
    one, two, last = three()
    return of(module1=one, module2=two, module3=tied(one, last))


def mixed() -> nn.Module:
    module = first_and_third()
    module.module4, module.empty = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Dropout()
    return module


def only_the_bias() -> nn.Module:
    one, two, _ = three()
    return of(module1=one, module2=tied(one, two, "bias"))


def nested() -> nn.Module:
    one, two, _ = three()
    return of(module1=nn.Sequential(one), module2=nn.Sequential(nn.ReLU(), nn.Sequential(tied(one, two))))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda: of(module1=nn.Linear(4, 4), module2=nn.Linear(4, 4)), [], id="CMP-1 none tied"),
        pytest.param(inside_one, [], id="CMP-2 tied inside one module only"),
        pytest.param(first_and_third, [{"module1", "module3"}], id="CMP-3 first and third"),
        pytest.param(nn.Module, [], id="CMP-4 no modules"),
        pytest.param(lambda: of(a=nn.ReLU(), b=nn.Dropout()), [], id="CMP-5 modules without parameters"),
        pytest.param(mixed, [{"module1", "module3"}], id="CMP-6 and CMP-7 a mix of them"),
        pytest.param(only_the_bias, [{"module1", "module2"}], id="CMP-8 only the bias is tied"),
        pytest.param(nested, [{"module1", "module2"}], id="CMP-9 nested submodules"),
    ],
)
def test_CMP_1_CMP_2_CMP_3_CMP_4_CMP_5_CMP_6_CMP_7_CMP_8_CMP_9_modules_that_share_are_named(
    make: Callable[[], nn.Module], expected: list[set[str]]
) -> None:
    assert tied_modules(make()) == {frozenset(names) for names in expected}


def torn(module: nn.Module, *chosen: nn.Module) -> list[tuple[str, ...]]:
    """Ties with one end inside the chosen modules (under whatever path) and one outside: Composer must raise."""
    inside = {
        f"{path}.{name}"
        for path, one in module.named_modules(remove_duplicate=False)
        if any(one is other for other in chosen)
        for name, _ in one.named_parameters(remove_duplicate=False)
    }
    return [group for group in groups(module) if set(group) & inside and set(group) - inside]


def test_CMP_10_CMP_11_CMP_12_one_side_of_a_tie_cannot_be_sharded_without_the_other() -> None:
    module = first_and_third()
    tie = [("module1.weight", "module3.weight")]
    assert torn(module, module.module1) == torn(module, module.module3) == tie
    assert torn(module, module.module1, module.module2) == tie
    assert torn(module, module.module1, module.module3) == torn(module, module.module2) == torn(module) == []


def test_CMP_13_CMP_14_one_side_of_a_nested_tie_cannot_be_sharded_without_the_other() -> None:
    module = nested()
    assert torn(module, module.module1[0]) == [("module1.0.weight", "module2.1.0.weight")]
    assert torn(module, module.module1, module.module2) == []
    assert torn(inside_one(), inside_one().module1) == []


def test_CMP_15_CMP_16_a_child_of_two_parents_goes_with_both_or_alone() -> None:
    """B is a child of the root and of A: {A} raises, {A, B} and {B} do not."""
    child = nn.Linear(4, 4)
    module = of(A=of(own=nn.Linear(4, 4), B=child), B=child)
    assert torn(module, module.A) == [("A.B.weight", "B.weight"), ("A.B.bias", "B.bias")]
    assert torn(module, module.A, child) == torn(module, child) == torn(module, module.A.own) == []


# --- torchinfo: what is counted --------------------------------------------------------------------------------------


def test_TI_1_a_convolution_that_is_called_six_times_is_counted_once_and_its_calls_are_told() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(6):
                x = self.conv(x)
            return x

    found = report(Recursive(), torch.zeros(1, 64, 4, 4))
    assert found.summary.n_parameters == 64 * 64 * 9 + 64 == 36_928  # not six times that
    assert {name: len(uses) for name, uses in found.subject.model.uses_of.items()} == {"conv.weight": 6, "conv.bias": 6}


def test_TI_2_a_module_without_parameters_in_three_blocks_is_no_tie() -> None:
    relu = nn.ReLU()
    module = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu) for _ in range(3)])
    assert groups(module) == []
    assert report(module).summary.n_parameters == 120


def test_TI_3_a_head_that_is_the_embedding_counts_once() -> None:
    summary = report(LM(1000, 64)).summary
    assert (summary.n_parameters, summary.n_parameters_named) == (64_000, 128_000)


def test_FACT_1_10_models_that_counters_count_twice_are_counted_once() -> None:
    """torchinfo 1.8.0 says 69,696 of the first, torchsummary 512 of the second."""
    assert report(LM(512, 64, hidden=True)).summary.n_parameters == 512 * 64 + 64 * 64 + 64 == 36_928
    one, two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    assert report(nn.Sequential(one, tied(one, two))).summary.n_parameters == 256


# --- DeepSpeed, torchax, nanotron, flax, torch-to-nnef ---------------------------------------------------------------


def test_DS_1_a_weight_of_another_size_than_its_layer_says_is_in_the_checkpoint_once(tmp_path: Path) -> None:
    module = of(layer0=nn.Linear(100, 100), layer1=nn.Linear(200, 200), layer2=nn.Linear(300, 300))
    tied(module.layer2, module.layer1)
    path = saved(tmp_path / "m.pt", module)
    assert groups(module) == groups(path) == [("layer1.weight", "layer2.weight")]
    assert report(path).summary.n_parameters == 100**2 + 300**2 + 100 + 200 + 300
    # what zero_to_fp32 restores: a strict load, with the tie kept
    module.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert groups(module) == [("layer1.weight", "layer2.weight")]


def test_DS_2_a_collector_of_names_can_leave_the_aliases_out() -> None:
    module = of(embed_tokens=nn.Embedding(20, 8), mid=nn.Linear(8, 8, bias=False))
    module.lm_head = tied(module.embed_tokens, nn.Linear(8, 20, bias=False))
    model = report(module).subject.model
    aliases = {name for group in groups(module) for name in group[1:]}
    assert aliases == {"lm_head.weight"}
    assert [one.name for one in model.weights if one.name not in aliases] == ["embed_tokens.weight", "mid.weight"]


def test_TX_1_outputs_are_equal_when_every_name_has_a_tensor_of_its_own() -> None:
    module = LM(hidden=True)
    assert groups(module) == [("emb.weight", "head.weight")]
    apart = copy.deepcopy(module)
    tieaudit.untie(apart)
    assert groups(apart) == []
    assert tieaudit.verify(module, apart, inputs=IDS).failed == ()


def test_NT_1_two_layers_of_one_size_become_one_in_weight_and_bias() -> None:
    module = of(a=nn.Linear(10, 10), b=nn.Linear(10, 10))
    module.b.load_state_dict(module.a.state_dict())  # nanotron overwrites one of them; here only equal ones are tied
    tieaudit.tie(module)
    assert module.a.weight is module.b.weight
    assert module.a.bias is module.b.bias


def test_FX_1_one_variable_in_a_list_twice_is_one_tensor_and_stays_one() -> None:
    value = nn.Parameter(torch.randn(3))
    module = nn.ParameterList([value, value])
    assert groups(module) == [("0", "1")]
    assert report(module).summary.n_parameters == 3
    assert outcomes(module, "copy.deepcopy(module)", "torch.save(state_dict), torch.load") == ["kept", "kept"]


def test_FX_2_two_layers_with_one_kernel_have_three_tensors() -> None:
    one, two, _ = three()
    module = nn.Sequential(one, tied(one, two))
    assert groups(module) == [("0.weight", "1.weight")]
    assert len(list(module.parameters())) == 3
    assert report(module).summary.n_parameters == 16 + 4 + 4


def test_FX_3_an_embedding_that_is_used_transposed_is_one_tensor_and_runs() -> None:
    module = of(embed=nn.Embedding(10, 2), linear=nn.Linear(10, 2, bias=False))
    with torch.no_grad():
        module.linear.weight.copy_(module.embed.weight.T)
    x = torch.randn(3, 10)
    before = module.linear(x)
    tieaudit.tie(module)
    assert len(list(module.parameters())) == 1
    assert report(module).summary.n_parameters == 20
    assert torch.allclose(module.linear(x), before, atol=1e-6)


class Asked(nn.Module):
    """A language model that says which of its parts is what."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(40, 16), head

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_NNEF_1_NNEF_2_a_change_through_one_name_reaches_every_name_of_the_tie() -> None:
    module = LM()
    with torch.no_grad():
        module.get_parameter("emb.weight").fill_(2.0)
    assert float(module.head.weight.detach().min()) == 2.0
    assert groups(module) == [("emb.weight", "head.weight")]


def test_NNEF_3_after_untying_the_other_side_keeps_the_old_numbers() -> None:
    module = LM()
    old = module.emb.weight.detach().clone()
    tieaudit.untie(module)
    with torch.no_grad():
        module.emb.weight.fill_(2.0)
    assert torch.equal(module.head.weight, old)


def buffer_head() -> nn.Module:
    head = nn.Linear(16, 40, bias=False)
    weight = head.weight.detach().clone()
    del head.weight
    head.register_buffer("weight", weight)
    return head


@pytest.mark.parametrize(
    ("head", "said"),
    [
        pytest.param(
            nn.Linear(12, 40, bias=False), r"head\.weight float32 \[40, 12\] and .* two widths", id="NNEF-4 shape"
        ),
        pytest.param(nn.Linear(16, 40, bias=False).half(), r"float16 .* float32", id="NNEF-4 type"),
        pytest.param(nn.Linear(16, 40, bias=False, device="meta"), "head.weight on meta", id="NNEF-4 meta"),
        pytest.param(buffer_head(), "some are buffers", id="NNEF-5 no parameter"),
    ],
)
def test_NNEF_4_NNEF_5_what_cannot_be_one_tensor_is_refused_and_left_as_it_was(head: nn.Module, said: str) -> None:
    module = Asked(head)
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    with pytest.raises(RewriteRefused, match=said):
        tieaudit.tie(module, scheme="io", allow_lossy=True, merge="keep:embedding")
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert before.keys() == after.keys() and all(after[name] is one for name, one in before.items())


def test_TT_1_a_head_that_only_refers_to_the_embedding_is_seen_in_the_graph_and_survives_resizing() -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(40, 16)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.emb(words), self.emb.weight)

    module = Borrowing()
    for n_words in (40, 44):
        module.emb = nn.Embedding(n_words, 16)
        assert groups(module) == []  # one name, so no parameter shows it
        (tie,) = report(module, IDS).subject.found.ties
        assert [member.use.partition(" ")[0] for member in tie.members] == ["embedding", "linear"]
        assert report(module, IDS).summary.n_parameters == n_words * 16
