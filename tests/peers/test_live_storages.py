"""Cases of safetensors, huggingface_hub, ModelOpt and ExecuTorch about tensors that share storages in memory or in a
PyTorch checkpoint, and what tieaudit does with them.

ST: huggingface/safetensors, HUB: huggingface/huggingface_hub, MO: NVIDIA/Model-Optimizer, ET: pytorch/executorch, MOB:
onnxruntime/mobius, FACT-1_3: bugs of safetensors 0.8 that were reproduced. See docs/peer-cases.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import (  # noqa: E402
    codes,
    groups,
    linears,
    of,
    outcomes,
    report,
    saved,
    slices,
    stored_bytes,
    values,
    views,
)  # fmt: skip
from tieaudit.errors import TieAuditError  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402
from tieaudit.load import load_one  # noqa: E402


def parameters(**tensors: torch.Tensor) -> nn.Module:
    return of(**{name: nn.Parameter(one, one.is_floating_point()) for name, one in tensors.items()})


def pair(layer: nn.Module) -> nn.Module:
    """One layer under two names."""
    return of(a=layer, b=layer)


# --- safetensors: which names of one storage are a tie --------------------------------------------------------------


def test_ST_1_ST_8_a_tensor_that_covers_its_storage_leads_those_that_do_not() -> None:
    """_is_complete: A yes, B = A[:1] no, C = A[::2] no, a meta tensor yes. Which of several names is kept: A."""
    whole = torch.randn(3, 3)
    module = parameters(C=whole[::2], B=whole[:1], A=whole, D=torch.empty(2, 2, device="meta"))
    assert groups(module) == []
    ((first, *others),) = slices(module)
    assert first == "A" and set(others) == {"B", "C"}
    (overlap,) = report(module).subject.found.overlaps
    assert overlap.because.startswith("views of parts of A")
    rows = parameters(C=whole[::2], B=whole[:1])  # neither is a part of the other: C has no second row
    assert report(rows).subject.found.overlaps[0].because.startswith("views that begin or end inside each other")
    assert report(module).summary.n_bytes == 9 * 4 + 2 * 2 * 4  # D has no memory here, and would need 16 bytes


def test_ST_2_a_part_of_a_tensor_is_a_slice_of_it_and_alone_it_is_nothing_special() -> None:
    whole = torch.randn(3, 3)
    assert slices(parameters(A=whole, B=whole[:1])) == [("A", "B")]
    assert slices(parameters(A=whole)) == slices(parameters(B=whole[:1])) == []


def test_ST_4_ST_5_halves_of_a_storage_share_nothing_and_overlapping_parts_do() -> None:
    # safetensors: [{B}, {C}] and [{B, C}]
    four = torch.randn(4)
    halves = parameters(B=four[:2], C=four[2:])
    assert (groups(halves), slices(halves)) == ([], [])
    assert slices(parameters(B=four[:2], C=four[1:])) == [("C", "B")]  # the longer one first


@pytest.mark.parametrize(
    ("tensor", "n_bytes"),
    [
        pytest.param(torch.zeros(4), 16, id="four floats"),
        pytest.param(torch.zeros(16)[::4], 16 * 3 + 4, id="every fourth of sixteen"),
        pytest.param(torch.zeros(4, dtype=torch.float16), 8, id="four halves"),
        pytest.param(torch.zeros(16, dtype=torch.float16)[::4], 8 * 3 + 2, id="every fourth half of sixteen"),
    ],
)
def test_ST_7_a_strided_view_reaches_from_its_first_element_to_behind_its_last(
    tensor: torch.Tensor, n_bytes: int
) -> None:
    storage = read_module(parameters(x=tensor)).by_id["x"].storage
    assert storage is not None
    _, begin, end = storage.region
    assert end - begin == n_bytes
    assert storage.n_bytes == tensor.numel() * tensor.element_size()  # what a dense copy of it would hold


def test_ST_8_a_whole_its_part_and_a_second_name_are_a_tie_and_a_slice_of_both() -> None:
    """_remove_duplicate_names keeps A and drops B and C, so B is lost as a tensor of its own; and B alone raises."""
    whole = torch.randn(3, 3)
    module = parameters(A=whole, B=whole[:1], C=whole)
    assert groups(module) == [("A", "C")]
    assert slices(module) == [("A", "C", "B")]
    alone = report(parameters(B=whole[:1]))
    assert (alone.findings, alone.summary.n_bytes) == ((), 12)


def test_ST_10_what_the_tie_aware_writer_leaves_of_a_live_tie_is_found_in_its_file(tmp_path: Path) -> None:
    module = pair(nn.Linear(8, 4))
    names = [("a.weight", "b.weight"), ("a.bias", "b.bias")]
    assert groups(module) == names
    safetensors.save_model(module, str(tmp_path / "m.safetensors"))
    written = report(tmp_path / "m.safetensors")
    assert sorted(groups(tmp_path / "m.safetensors", "declared")) == sorted(names)
    assert {one.name for one in written.subject.model.weights if one.absent} == {"b.weight", "b.bias"}
    assert written.summary.n_parameters == report(module).summary.n_parameters == 36
    assert outcomes(module, "safetensors save_model, load_model") == ["kept"]


def test_ST_13_a_deep_copy_is_four_storages_and_two_classes_of_equal_bytes() -> None:
    layer = nn.Linear(8, 4)
    copied = nn.Linear(8, 4)
    copied.load_state_dict(layer.state_dict())
    module = of(a=layer, b=copied)
    assert groups(module) == []  # safetensors stops here
    assert sorted(groups(module, "measured")) == [("a.bias", "b.bias"), ("a.weight", "b.weight")]


def test_ST_14_a_tied_file_in_an_untied_architecture_is_no_tie_any_more(tmp_path: Path) -> None:
    """torch.load: loads, and stays untied. safetensors: b.weight and b.bias are missing."""
    tied, apart = pair(nn.Linear(8, 4)), of(a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    apart.load_state_dict(torch.load(saved(tmp_path / "m.pt", tied), weights_only=True))
    assert groups(apart) == []
    assert sorted(groups(apart, "measured")) == [("a.bias", "b.bias"), ("a.weight", "b.weight")]
    tieaudit.tie(apart)
    assert sorted(groups(apart)) == [("a.bias", "b.bias"), ("a.weight", "b.weight")]
    safetensors.save_model(tied, str(tmp_path / "m.safetensors"))
    with pytest.raises(RuntimeError, match="Missing key"):
        safetensors.load_model(of(a=nn.Linear(8, 4), b=nn.Linear(8, 4)), str(tmp_path / "m.safetensors"))
    unsure = report(tmp_path / "m.safetensors").cannot_tell  # said before anybody loads it
    assert {one.code for one in unsure} == {"TIE105"}
    assert {name for one in unsure for name in ("b.weight", "b.bias") if name in one.because} == {"b.weight", "b.bias"}


# --- what safetensors raises on (FACT-1_3), in memory and in a checkpoint -------------------------------------------

WHOLE = torch.arange(40.0)
MATRIX = torch.arange(40.0).reshape(5, 8)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("case", "tensors", "raises"),
    [
        ("a", {"A": WHOLE, "B": WHOLE[1:10], "C": WHOLE[20:30]}, "covering the entire storage"),
        ("b", {"A": MATRIX, "B": MATRIX.T}, "view size is not compatible"),
        ("c", {"q": WHOLE[:20], "k": WHOLE[20:]}, "covering the entire storage"),
        ("c alone", {"q": WHOLE[:20]}, "covering the entire storage"),
        ("d", {"A": WHOLE, "B": WHOLE.view(4, 10)}, ""),
    ],
)
def test_FACT_1_3_what_the_sweep_of_safetensors_gets_wrong_is_told_apart(
    tmp_path: Path, case: str, tensors: dict[str, torch.Tensor], raises: str, live: bool
) -> None:
    if raises:
        with pytest.raises(RuntimeError, match=raises):
            safetensors._remove_duplicate_names(dict(tensors))
    else:  # B is dropped for A, and its shape is written nowhere
        assert dict(safetensors._remove_duplicate_names(dict(tensors))) == {"A": ["B"]}
    source: Any = parameters(**tensors) if live else saved(tmp_path / "m.pt", tensors)
    expected: dict[str, tuple[list[Any], list[Any]]] = {
        "a": ([], [("A", "C", "B")]),  # a whole with two parts, all three together
        "b": ([[("A", "as stored"), ("B", "transposed")]], []),
        "c": ([], []),
        "c alone": ([], []),
        "d": ([[("A", "as stored"), ("B", "reshaped to [4, 10]")]], []),
    }
    assert (views(source), slices(source)) == expected[case]
    stored = 20 if case == "c alone" else 40
    assert report(source).summary.n_bytes == stored * 4


def test_FACT_1_3_a_view_as_another_type_is_the_same_bytes_and_no_tie() -> None:
    """safetensors drops B for A and records no type."""
    module = of(A=WHOLE, B=WHOLE.view(torch.int32))
    assert dict(safetensors._remove_duplicate_names(dict(module.state_dict()))) == {"A": ["B"]}
    assert groups(module) == []
    assert slices(module) == [("A", "B")]
    assert report(module).summary.n_bytes == 160


# --- huggingface_hub -------------------------------------------------------------------------------------------------


def test_HUB_1_five_names_of_two_storages_are_two_classes_and_two_tensors(tmp_path: Path) -> None:
    """split_torch_state_dict_into_shards: names of one storage go into one shard, each storage counted once."""
    hub = pytest.importorskip("huggingface_hub")
    one, two = torch.randn(1), torch.randn(1)
    tensors = {"layer_1": one, "layer_2": two, "layer_3": one, "layer_4": two, "layer_5": one}
    path = saved(tmp_path / "m.pt", tensors)
    assert groups(path) == [("layer_1", "layer_3", "layer_5"), ("layer_2", "layer_4")]
    split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=1)
    assert sorted(map(tuple, split.filename_to_tensors.values())) == groups(path)
    assert report(path).summary.n_bytes == split.metadata["total_size"] == 8


def test_HUB_7_a_text_among_the_tensors_is_no_weight(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"w": WHOLE, "w.quant_type": "nf4", "w.blocksize": 64})
    assert [one.name for one in report(path).subject.model.weights] == ["w"]
    assert report(path).summary.n_bytes == 160


def test_HUB_8_a_module_saved_and_loaded_shares_what_it_shared(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_model(pair(nn.Linear(100, 100)), tmp_path)
    assert report(tmp_path / "model.safetensors").summary.n_bytes == 100 * 101 * 4
    fresh = pair(nn.Linear(100, 100))
    hub.load_torch_model(fresh, tmp_path)
    assert groups(fresh) == [("a.weight", "b.weight"), ("a.bias", "b.bias")]
    # strict=False is its default: an untied module loads too, with half of it random, and only a scan shows it
    apart = of(a=nn.Linear(100, 100), b=nn.Linear(100, 100))
    hub.load_torch_model(apart, tmp_path)
    assert groups(apart) == groups(apart, "measured") == []


# --- ModelOpt: postprocess_state_dict --------------------------------------------------------------------------------


def test_MO_9_MO_10_MO_15_a_longer_view_another_shape_and_disjoint_slices_all_keep_their_bytes(tmp_path: Path) -> None:
    """MO-9 is known to lose data there: two keys of one address, the second dropped although it is longer."""
    tensors = {"first": WHOLE[:2], "whole": WHOLE, "square": WHOLE.view(5, 8), "left": MATRIX[:2] + 0}
    for source in (parameters(**tensors), saved(tmp_path / "m.pt", tensors)):
        assert views(source) == [[("whole", "as stored"), ("square", "reshaped to [5, 8]")]]
        assert slices(source) == [("whole", "square", "first")]
        model = report(source).subject.model
        assert all(stored_bytes(model, name) == values(one) for name, one in tensors.items())
    apart = saved(tmp_path / "apart.pt", {"left": MATRIX[:2], "right": MATRIX[2:]})
    assert (groups(apart), slices(apart)) == ([], [])


def test_MO_13_tensors_without_memory_are_no_aliases_of_each_other() -> None:
    with torch.device("meta"):
        module = linears(2)
    assert groups(module) == groups(module, "measured") == []
    module.linear2.weight = module.linear1.weight
    assert groups(module) == [("linear1.weight", "linear2.weight")]


def test_MO_16_MOB_3_FX_4_the_first_name_that_was_registered_stands_for_the_class(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(8, 4))
    for order in (("z", "a"), ("a", "z")):
        module = of(**{name: of(weight=weight) for name in order})
        expected = [tuple(f"{name}.weight" for name in order)]
        assert groups(module) == groups(saved(tmp_path / "m.pt", module)) == expected
        assert [name for name, _ in module.named_parameters()] == [expected[0][0]]


def test_MOB_6_two_tensor_objects_over_one_memory_are_one_tensor() -> None:
    numbers = torch.randn(8, 4).numpy()
    module = of(embed=torch.from_numpy(numbers), head=torch.from_numpy(numbers))
    assert module.embed.untyped_storage()._cdata != module.head.untyped_storage()._cdata
    assert groups(module) == [("embed", "head")]
    assert report(module).summary.n_bytes == 128


# --- ExecuTorch: what its named-data store and its serialiser do, told of a checkpoint ------------------------------


def test_ET_1_ET_2_ET_23_equal_constants_are_one_class_and_different_ones_are_none(tmp_path: Path) -> None:
    one, two = torch.randn(40), torch.randn(40)
    a_b = saved(tmp_path / "ab.pt", {"a": one, "b": one.clone(), "c": two})
    assert groups(a_b, "measured") == [("a", "b")]  # ET-1: owners {a, c}, alias {b: a}
    assert report(a_b).summary.n_bytes_duplicate == 160
    assert groups(saved(tmp_path / "ac.pt", {"a": one, "c": two}), "measured") == []  # ET-2
    six = {f"c{index}": (one if index < 4 else two).clone() for index in range(6)}  # ET-23: 4 + 2 names, two buffers
    assert sorted(groups(of(**six), "measured")) == [("c0", "c1", "c2", "c3"), ("c4", "c5")]


def test_ET_4_ET_7_ET_8_overlapping_views_are_slices_with_contents_of_their_own(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    path = saved(tmp_path / "m.pt", {"low": base[0:4], "high": base[2:6]})
    assert (groups(path), slices(path)) == ([], [("low", "high")])
    assert all(stored_bytes(load_one(path), name) == values(one)
               for name, one in (("low", base[0:4]), ("high", base[2:6])))  # fmt: skip
    # ET-4: two buffers of one storage that a program writes to: refused there, shown here before it is exported
    assert slices(of(k=base[0:4], v=base[2:6])) == [("k", "v")]
    tail = load_one(saved(tmp_path / "tail.pt", {"tail": base[4:]}))
    assert stored_bytes(tail, "tail") == values(torch.tensor([4.0, 5.0]))  # ET-8: not the storage from its start
    assert tail.by_id["tail"].n_bytes == 8


def test_ET_5_a_tied_name_is_one_owner_and_both_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"w": MATRIX, "tied": MATRIX})
    assert groups(path) == [("w", "tied")]
    model = load_one(path)
    assert stored_bytes(model, "w") == stored_bytes(model, "tied") == values(MATRIX)


def test_ET_11_a_write_that_is_refused_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.pt", {"a": MATRIX.clone(), "b": MATRIX.clone()})
    there = tmp_path / "there.pt"
    there.write_bytes(b"what somebody had")
    with pytest.raises(TieAuditError):
        tieaudit.apply(source, to=there)
    assert there.read_bytes() == b"what somebody had"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "there.pt"]  # and nothing half-written beside


def test_ET_22_two_entry_points_of_one_module_hold_its_weight_once(tmp_path: Path) -> None:
    linear = nn.Linear(40, 40)
    module = of(forward_relu=nn.Sequential(linear, nn.ReLU()), forward_sigmoid=nn.Sequential(linear, nn.Sigmoid()))
    names = [("forward_relu.0.weight", "forward_sigmoid.0.weight"), ("forward_relu.0.bias", "forward_sigmoid.0.bias")]
    assert groups(module) == names
    path = saved(tmp_path / "m.pt", module)
    assert groups(path) == names
    assert report(path).summary.n_bytes == (40 * 40 + 40) * 4
    assert codes(path) == []
