"""Kinds of tensors and modules that PyTorch has: wrappers, shards, parametrizations, packed, lazy and scripted ones.

The truth of a tie is the library's identity: one object, or one view of one memory, while everything is held.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import TiedLM  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402
from tieaudit.scan import scan  # noqa: E402


def of(**parameters: Any) -> nn.Module:
    module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    return module


def ties(module: nn.Module, origin: str = "aliased") -> set[frozenset[str]]:
    return {frozenset(tie.ids) for tie in scan(read_module(module)).subject.found.ties if tie.origin == origin}


def notes(module: nn.Module) -> str:
    return " · ".join(item.because for item in scan(read_module(module)).cannot_tell)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_a_distributed_tensor_that_is_here_whole_is_compared_by_its_local_values(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    value = torch.randn(4, 6)
    one = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    module = of(a=one, b=one, copy=distribute_tensor(value.clone(), mesh, [Replicate()]), c=torch.randn(4, 6))
    assert ties(module) == {frozenset({"a", "b"})}
    assert ties(module, "measured") == {frozenset({"a", "b", "copy"})}
    assert notes(module) == ""


def test_a_part_of_a_distributed_tensor_cannot_be_told(mesh: Any) -> None:
    """Two ranks: the shard of this one is equal, and the other ranks' are not here."""
    from torch.distributed.tensor import DTensor, Shard

    local = torch.randn(2, 6)
    shards = [
        DTensor.from_local(one, mesh, [Shard(0)], run_check=False, shape=torch.Size([4, 6]), stride=(6, 1))
        for one in (local, local.clone())
    ]
    module = of(a=shards[0], b=shards[1])
    assert ties(module) == ties(module, "measured") == set()
    assert "it is a DTensor" in notes(module)


def test_a_partial_sum_is_not_its_value(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    value = torch.randn(4, 6)
    module = of(a=DTensor.from_local(value, mesh, [Partial()], run_check=False), b=value.clone())
    assert ties(module, "measured") == set()
    assert "it is a DTensor" in notes(module)


def test_a_wrapper_is_one_with_what_holds_the_same_tensors_inside() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    one = nn.Parameter(TwoTensor(a, b))
    module = of(x=one, y=one, again=TwoTensor(a, b), other=TwoTensor(a, b.clone()), inside=a, swapped=TwoTensor(b, a))
    assert ties(module) == {frozenset({"x", "y", "again"})}
    assert ties(module, "measured") == set()  # `other` is equal, and only its class could tell
    assert "it is a TwoTensor" in notes(module)


class Scaled(torch.Tensor):
    """As quantised tensors are made: codes inside, and a scale that is no tensor."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: float) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["codes"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], scale: float, size: Any, stride: Any) -> Any:
        return Scaled(inner["codes"], scale)

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].codes, args[0].scale)
        raise NotImplementedError(str(function))


def test_codes_shared_under_two_scales_are_two_values() -> None:
    codes = torch.randint(-8, 8, (4, 4), dtype=torch.int8)
    module = of(a=Scaled(codes, 0.5), b=Scaled(codes, 0.5), c=Scaled(codes, 0.25))
    assert ties(module) == {frozenset({"a", "b"})}
    report = scan(read_module(module))
    assert report.summary.n_parameters == sum(p.numel() for p in module.parameters()) == 3 * 16


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_tie_is_a_tie_of_originals(wrap: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap(module[0])
    apart = scan(read_module(module))
    assert [tie for tie in apart.subject.found.ties if tie.origin == "aliased"] == []
    module[1] = module[0]
    originals = {name for name, _ in module[0].named_parameters()}
    assert ties(module) >= {frozenset({f"0.{name}", f"1.{name}"}) for name in originals}
    assert scan(read_module(module)).summary.n_parameters == sum(p.numel() for p in module.parameters())


def test_spectral_norm_keeps_its_vectors_as_buffers_and_its_tie() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrizations.spectral_norm(module[0])
    module[1].weight = module[0].parametrizations.weight.original
    model = read_module(module)
    assert {weight.name for weight in model.weights if not weight.parameter} == {
        "0.parametrizations.weight.0._u",
        "0.parametrizations.weight.0._v",
    }
    assert ties(module) == {frozenset({"0.parametrizations.weight.original", "1.weight"})}


def test_one_original_under_two_parametrizations_is_tied_and_both_can_be_untied() -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer in module:
        parametrize.register_parametrization(layer, "weight", Twice())
    module[1].parametrizations.weight.original = module[0].parametrizations.weight.original
    names = frozenset({f"{index}.parametrizations.weight.original" for index in (0, 1)})
    assert ties(module) == {names}
    x = torch.randn(2, 4)
    before = module(x)
    change = tieaudit.untie(module)
    assert ties(module) == set()
    assert torch.equal(module(x), before)
    change.undo()
    assert ties(module) == {names}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_weights_that_live_in_one_block_are_no_tie(bidirectional: bool) -> None:
    rnn = nn.LSTM(3, 5, 2, bidirectional=bidirectional)
    flat = torch.randn(sum(p.numel() for p in rnn.parameters()))
    begin = 0
    for name, parameter in list(rnn.named_parameters()):  # as flatten_parameters lays them out for cuDNN
        end = begin + parameter.numel()
        setattr(rnn, name, nn.Parameter(flat[begin:end].view(parameter.shape)))
        begin = end
    report = scan(read_module(rnn))
    assert (report.subject.found.ties, report.subject.found.overlaps) == ((), ())
    assert report.summary.n_bytes == flat.numel() * 4


def test_two_layers_of_an_lstm_that_share_their_weights_are_one() -> None:
    rnn = nn.LSTM(4, 4, 2)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(rnn, f"{name}_l1", getattr(rnn, f"{name}_l0"))
    assert ties(rnn) == {
        frozenset({f"{name}_l{layer}" for layer in (0, 1)}) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_tied_buffers_are_ties_of_buffers_and_no_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mask = torch.randn(4, 4)
    for layer in module:
        layer.register_buffer("mask", mask)
        layer.register_buffer("scratch", mask.clone(), persistent=False)
    report = scan(read_module(module))
    assert ties(module) == {frozenset({"0.mask", "1.mask"})}
    assert report.summary.n_parameters == 2 * (16 + 4)
    because = {weight.name: weight.because for weight in report.subject.model.weights}
    assert (because["0.mask"], because["0.scratch"]) == ("a buffer", "a buffer that is not saved")


@pytest.mark.parametrize("kind", [nn.UninitializedParameter, nn.UninitializedBuffer])
def test_what_has_no_shape_yet_is_not_counted_and_said(kind: Any) -> None:
    module = of(a=torch.randn(2, 2))
    (module.register_parameter if kind is nn.UninitializedParameter else module.register_buffer)("later", kind())
    report = scan(read_module(module))
    assert [weight.name for weight in report.subject.model.weights] == ["a"]
    assert report.summary.n_parameters == 4
    assert "later: not made before the lazy module is called once" in notes(module)


def test_lists_and_dicts_of_parameters_are_named_and_compared() -> None:
    shared = nn.Parameter(torch.randn(3, 3))
    module = nn.Module()
    module.rows = nn.ParameterList([shared, nn.Parameter(torch.randn(3, 3))])
    module.named = nn.ParameterDict({"a": shared, "b": torch.randn(3)})
    assert ties(module) == {frozenset({"rows.0", "named.a"})}
    tieaudit.untie(module)
    assert module.rows[0] is not module.named["a"]
    assert torch.equal(module.rows[0], module.named["a"])


def test_a_scripted_module_is_read_with_its_ties_and_not_traced() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    report = tieaudit.scan(scripted)
    names = {weight.name: weight.parameter for weight in report.subject.model.weights}
    assert names == {
        "0.weight": True, "0.bias": True, "1.weight": True, "1.bias": True,
        "1.running_mean": False, "1.running_var": False, "1.num_batches_tracked": False,
    }  # fmt: skip
    assert report.subject.model.metadata["uses"].endswith("it holds TorchScript, which is not traced unasked")
    assert report.cannot_tell == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes
        traced = torch.jit.trace(TiedLM().eval(), torch.tensor([[1, 2]]))
    assert ties(traced) == {frozenset({"embed.weight", "head.weight"})}


def test_packed_weights_of_quantised_layers_are_said_not_to_be_looked_at() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        module = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})
        report = tieaudit.scan(module)
    assert [item.because for item in report.cannot_tell] == [
        "0._packed_params, 2._packed_params: weights packed for a kernel are no tensors, so neither compared nor "
        "counted"
    ]


def test_a_quantised_tensor_is_known_by_identity() -> None:
    module = nn.Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8)
        module.register_buffer("a", codes)
        module.register_buffer("b", codes)
        module.register_buffer("c", codes.clone())
        assert ties(module) == {frozenset({"a", "b"})}
        assert "it is a quantized tensor" in notes(module)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_module_made_without_initialisation_is_read_as_any_other(device: str) -> None:
    layer = torch.nn.utils.skip_init(nn.Linear, 4, 4, device=device)
    module = nn.Sequential(layer, nn.Linear(4, 4))
    module[1].weight = layer.weight
    assert ties(module) == {frozenset({"0.weight", "1.weight"})}


def test_fake_tensors_keep_structure_and_uses_and_have_no_values() -> None:
    with FakeTensorMode():
        module = TiedLM()
    report = tieaudit.scan(module)
    assert {frozenset(tie.ids) for tie in report.subject.found.ties} == {frozenset({"embed.weight", "head.weight"})}
    assert report.subject.model.metadata["uses"] == "from torch.export with generated inputs: words int64 2×7"
    assert any("it is a fake tensor" in item.because for item in report.cannot_tell)


def test_wrapping_for_several_processes_moves_names_and_keeps_ties(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    assert ties(DistributedDataParallel(TiedLM())) == {frozenset({"module.embed.weight", "module.head.weight"})}
    sharded = TiedLM()
    fully_shard(sharded, mesh=mesh)
    assert ties(sharded) == {frozenset({"embed.weight", "head.weight"})}
    assert scan(read_module(sharded)).summary.n_parameters == 1026
    compiled = torch.compile(TiedLM())
    assert ties(compiled) == {frozenset({"_orig_mod.embed.weight", "_orig_mod.head.weight"})}
