"""Cases of accelerate and Lightning about modules in memory, and what tieaudit does with them.

ACC: huggingface/accelerate, LIT: Lightning-AI/pytorch-lightning, FACT-1_1: what accelerate 1.15 was seen to miss. Both
peers compare `Parameter` objects (`is`); tieaudit compares the bytes that a name stands for. See docs/peer-cases.md.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import IDS, LM, codes, groups, linears, of, outcomes, report, saved, views  # noqa: E402


def objects(module: nn.Module) -> dict[str, int]:
    return {name: id(one) for name, one in module.named_parameters(remove_duplicate=False)}


def share(module: nn.Module, *names: str) -> nn.Module:
    """Every one of these layers has the weight of the first."""
    kept = module.get_submodule(names[0]).weight
    for name in names[1:]:
        module.get_submodule(name).weight = kept
    return module


def test_ACC_1_a_module_in_which_nothing_is_shared_has_no_groups() -> None:
    module = linears(4)
    assert groups(module) == []
    assert report(module).summary.n_parameters == 4 * (8 * 8 + 8)


def test_ACC_3_three_names_of_one_weight_are_one_group_in_the_order_of_the_module() -> None:
    module = share(linears(4), "linear4", "linear2", "linear1")
    # accelerate sorts the names; here the first one of the module leads, which is the one that stays in a file
    assert groups(module) == [("linear1.weight", "linear2.weight", "linear4.weight")]
    assert report(module).summary.n_parameters == 2 * 8 * 8 + 4 * 8  # not 4 · 72


def test_ACC_4_two_groups_are_not_merged_into_one() -> None:
    module = share(share(linears(5), "linear1", "linear4"), "linear2", "linear3", "linear5")
    pair, three = ("linear1.weight", "linear4.weight"), ("linear2.weight", "linear3.weight", "linear5.weight")
    assert groups(module) == [pair, three]
    assert report(module).summary.n_parameters == 2 * 64 + 5 * 8


def test_ACC_6_one_module_at_two_places_is_a_group_for_each_of_its_parameters() -> None:
    layer = nn.Linear(10, 10)
    module = nn.Sequential(layer, layer)
    assert groups(module) == [("0.weight", "1.weight"), ("0.bias", "1.bias")]
    summary = report(module).summary
    assert (summary.n_parameters, summary.n_parameters_named) == (110, 220)


TIES: dict[str, tuple[Any, list[tuple[str, ...]]]] = {
    "one group of three": (lambda: linears(4), [("linear1", "linear3", "linear4")]),
    "two groups": (lambda: linears(5), [("linear1", "linear4"), ("linear2", "linear3", "linear5")]),
    "nested": (lambda: of(a=linears(2), b=of(c=linears(2))), [("a.linear1", "b.c.linear2")]),
}


@pytest.mark.parametrize("case", TIES)
def test_ACC_7_tied_again_every_name_of_a_group_is_one_object_and_the_others_are_untouched(case: str) -> None:
    make, names = TIES[case]
    module = make()
    for group in names:
        share(module, *group)
    tied, before = groups(module), objects(module)
    tieaudit.untie(module)
    assert groups(module) == []
    change = tieaudit.tie(module)
    assert groups(module) == tied
    after = objects(module)
    for group in tied:
        assert len({after[name] for name in group}) == 1
    others = set(before) - {name for group in tied for name in group}
    assert others and all(after[name] == before[name] for name in others)
    change.undo()
    assert groups(module) == []


def test_ACC_7_copies_that_drifted_apart_are_not_tied_again_by_name() -> None:
    # accelerate's retie_parameters sets the first member's object on every name and compares no values: the other
    # weights are gone. Different tensors are not tied here unless a lossy scheme is asked for.
    module = share(linears(2), "linear1", "linear2")
    tieaudit.untie(module)
    with torch.no_grad():
        module.linear2.weight += 1
    assert tieaudit.tie(module).plan.edits == ()
    assert not torch.equal(module.linear1.weight, module.linear2.weight)


def test_ACC_9_a_child_that_holds_the_weight_of_its_parent_shares_it_by_both_names() -> None:
    compute = nn.Linear(3, 8)
    compute.weight_submodule = of(parameter=compute.weight)
    module = of(compute=compute)
    assert groups(module) == [("compute.weight", "compute.weight_submodule.parameter")]
    assert report(module).summary.n_parameters == 3 * 8 + 8
    tieaudit.untie(module)
    assert groups(module) == []
    assert compute.weight is not compute.weight_submodule.parameter


def test_ACC_10_bytes_of_shared_layers_are_counted_once_as_more_of_them_are_shared() -> None:
    """A layer: 3·4 + 4, a batch norm of 4 (two parameters, two buffers, one int64), 4·5 + 5: 236 bytes, thrice."""

    def layer() -> nn.Module:
        return of(linear1=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), linear2=nn.Linear(4, 5))

    module = of(layer1=layer(), layer2=layer(), layer3=layer())

    def seen() -> tuple[list[int], int]:
        return sorted(len(group) for group in groups(module)), report(module).summary.n_bytes

    assert seen() == ([], 708)
    share(module, "layer1.linear2", "layer3.linear2")
    assert seen() == ([2], 708 - 80)
    share(module, "layer1.linear2", "layer2.linear2")
    assert seen() == ([3], 708 - 160)
    share(module, "layer1.linear1", "layer2.linear1")
    assert seen() == ([2, 3], 708 - 160 - 48)
    assert ("layer1.linear1.weight", "layer2.linear1.weight") in groups(module)


def test_ACC_12_tensors_that_disagree_with_their_layer_s_sizes_are_saved_and_found_as_they_are(tmp_path: Path) -> None:
    """linear2 says 4 → 2 and holds what linear1 (2 → 4) holds: only its tensors count."""
    module = of(linear1=nn.Linear(2, 4), linear2=nn.Linear(4, 2))
    module.linear2.weight, module.linear2.bias = module.linear1.weight, module.linear1.bias
    expected = [("linear1.weight", "linear2.weight"), ("linear1.bias", "linear2.bias")]
    assert groups(module) == expected
    assert groups(saved(tmp_path / "m.pt", module)) == expected
    ways = ("torch.save(state_dict), torch.load", "safetensors save_model, load_model")
    assert outcomes(module, *ways) == ["kept", "kept"]
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    norm = sum(float(one.detach().norm()) for one in module.parameters())
    assert sum(float(loaded[group[0]].norm()) for group in expected) == pytest.approx(norm)


def test_ACC_13_three_embeddings_of_one_table_are_one_group() -> None:
    table = nn.Embedding(20, 4)
    module = of(shared=table, encoder=of(embed_tokens=nn.Embedding(20, 4)), decoder=of(embed_tokens=table))
    module.encoder.embed_tokens.weight = table.weight
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    assert groups(module) == [names]
    assert report(module).summary.n_parameters == 80


# --- FACT-1_1: accelerate 1.15 answers [] for every one of these ------------------------------------------------------


def test_FACT_1_1a_two_parameters_over_one_storage_are_one_tensor_that_an_optimizer_moves_twice() -> None:
    module = LM(tied=False)
    module.head.weight = nn.Parameter(module.emb.weight.data)
    assert groups(module) == [("emb.weight", "head.weight")]
    summary = report(module).summary
    assert summary.n_bytes == 40 * 16 * 4  # not twice that
    assert summary.n_parameters == 2 * 40 * 16  # what the module itself counts, and the report says so
    assert "640" in summary.n_parameters_because
    assert tieaudit.gradients(module, IDS).updated_twice == (("emb.weight", "head.weight"),)
    tieaudit.tie(module)
    assert module.head.weight is module.emb.weight


def test_FACT_1_1b_a_transposed_alias_is_one_tensor_seen_in_two_ways() -> None:
    module = of(emb=nn.Embedding(40, 16), head=nn.Linear(40, 16, bias=False))
    module.head.weight = nn.Parameter(module.emb.weight.data.T)
    assert views(module) == [[("emb.weight", "as stored"), ("head.weight", "transposed")]]
    assert report(module).summary.n_bytes == 40 * 16 * 4


def test_FACT_1_1c_bit_equal_parameters_are_reported_with_what_they_waste() -> None:
    module = LM(tied=False)
    with torch.no_grad():
        module.head.weight.copy_(module.emb.weight)
    assert groups(module) == []
    assert groups(module, "measured") == [("emb.weight", "head.weight")]
    assert report(module).summary.n_bytes_duplicate == 40 * 16 * 4
    assert codes(module) == ["TIE103"]
    with torch.no_grad():
        module.head.weight[39, 15] += 1
    assert groups(module, "measured") == []
    assert codes(module) == []


def test_FACT_1_1d_tied_buffers_are_a_group_and_no_parameters() -> None:
    mask = torch.randn(4, 4)
    module = of(first=of(mask=mask), second=of(mask=mask), third=of(mask=mask.clone()))
    assert groups(module) == [("first.mask", "second.mask")]
    assert groups(module, "measured") == [("first.mask", "second.mask", "third.mask")]
    summary = report(module).summary
    assert (summary.n_parameters, summary.n_bytes) == (0, 2 * 64)


def test_FACT_1_1e_the_module_of_a_reloaded_program_has_separate_objects_over_one_storage() -> None:
    module = LM().eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (IDS,)), file)
    file.seek(0)
    back = torch.export.load(file).module()
    assert back.emb.weight is not back.head.weight  # so find_tied_parameters says []
    assert groups(back) == [("emb.weight", "head.weight")]
    assert report(back).summary.n_bytes == 40 * 16 * 4


# --- Lightning: find_shared_parameters, set_shared_parameters --------------------------------------------------------


def test_LIT_1_a_plain_model_shares_nothing() -> None:
    assert groups(nn.Sequential(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 32))) == []


def autoencoder() -> nn.Module:
    module = of(layer_1=nn.Linear(32, 10, bias=False), layer_2=nn.Linear(10, 32, bias=False))
    module.layer_3 = nn.Linear(32, 10, bias=False)
    module.layer_3.weight = module.layer_1.weight
    return module


def test_LIT_2_the_first_and_the_third_layer_share_a_weight() -> None:
    module = autoencoder()
    assert groups(module) == [("layer_1.weight", "layer_3.weight")]
    assert report(module).summary.n_parameters == 2 * 320


def test_LIT_3_tied_again_after_untying_the_two_layers_are_equal_and_one() -> None:
    module = autoencoder()
    before = module.layer_1.weight.detach().clone()
    tieaudit.untie(module)
    assert module.layer_3.weight is not module.layer_1.weight
    tieaudit.tie(module)
    assert module.layer_3.weight is module.layer_1.weight
    assert torch.equal(module.layer_3.weight, before)


def test_LIT_4_one_layer_at_three_places_becomes_three_and_one_tensor_again() -> None:
    layer = nn.Linear(10, 10, bias=False)
    module = of(layer=layer, net_a=of(layer=layer), net_b=of(layer=layer))
    names = ("layer.weight", "net_a.layer.weight", "net_b.layer.weight")
    assert groups(module) == [names]
    tieaudit.untie(module)
    assert len(set(objects(module).values())) == 3
    tieaudit.tie(module)
    assert groups(module) == [names]
    assert len(set(objects(module).values())) == 1
