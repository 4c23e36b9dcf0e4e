"""Parameters told from masks, indices, shape constants, statistics and scales, by the slots that they reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.onnx_files import graph, helper, ids, info, read, rows, save, tensor
from onnx import NodeProto, TensorProto

Case = tuple[list[NodeProto], list[TensorProto], bool | None]


def _node(op: str, inputs: str, **options: Any) -> NodeProto:
    return helper.make_node(op, [name if name != "-" else "" for name in inputs.split()], ["y"], **options)


def _then(op: str, inputs: str, output: str, **options: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], **options)


MASK = np.triu(np.full((6, 6), -np.inf), 1)[None, None]
ANGLES = np.arange(9)[:, None] / 10 ** np.arange(4)[None]
SINES = np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], axis=1)
ONE_BY_ONE = [_then("MatMul", "x v", "h"), _node("Add", "h w")]

# how ONNX Runtime's quantize_dynamic writes a product: of whole numbers, with the scales multiplied afterwards
QUANTISED = [
    helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
    _then("MatMulInteger", "q k z", "p"),
    _then("Cast", "p", "f", to=1),
]
CODES = tensor("k", np.eye(3), np.int8)

CASES: dict[str, Case] = {
    # learned
    "a matrix": ([_node("MatMul", "x w")], [rows("w", 3, 3)], True),
    "a table read by ids": ([_node("Gather", "w ids")], [rows("w", 3, 3)], True),
    "a bias": ([_node("Add", "x w")], [rows("w", 3)], True),
    "a bias of zeros": ([_node("Add", "x w")], [tensor("w", np.zeros(3))], True),
    "a norm scale written out": ([_node("Mul", "x w")], [rows("w", 3)], True),
    "a norm scale of ones": ([_node("LayerNormalization", "x w")], [tensor("w", np.ones(3))], True),
    "a PReLU slope of one element": ([_node("PRelu", "x w")], [tensor("w", [0.25])], True),
    "the bias of one output": (ONE_BY_ONE, [tensor("w", [0.5]), rows("v", 3, 1)], True),
    "a scalar named as a parameter": ([_node("Mul", "x w.logit_scale")], [tensor("w.logit_scale", 2.0)], True),
    "a learned position table": ([_node("Add", "x w")], [rows("w", 1, 9, 3)], True),
    "a class token": ([_node("Concat", "x w", axis=0)], [rows("w", 1, 3)], True),
    "a mask token": ([_node("Where", "c w x")], [rows("w", 1, 3)], True),
    "a recurrent matrix cut by Slice": (
        [_then("Slice", "w zero one", "a"), _then("Unsqueeze", "a zero", "b"), _node("LSTM", "x b w2", hidden_size=1)],
        [rows("w", 8, 3), rows("w2", 1, 4, 1)],
        True,
    ),
    "a weight norm": (
        [_then("ReduceL2", "w", "n"), _then("Div", "w n", "v"), _node("Conv", "x v")],
        [rows("w", 4, 3, 3)],
        True,
    ),
    "a quantised matrix": ([_node("MatMulInteger", "x w")], [tensor("w", np.eye(3), np.uint8)], True),
    "a quantised table": (
        [_then("Gather", "w ids", "g"), _node("DequantizeLinear", "g s")],
        [tensor("w", np.eye(3), np.int8), tensor("s", 0.1)],
        True,
    ),
    "an int32 bias of a quantised convolution": (
        [_node("QLinearConv", "x s z k s z s z w")],
        [tensor("w", [1, 2], np.int32), tensor("s", 0.1), tensor("z", 0, np.uint8)],
        True,
    ),
    "4-bit blocks": (
        [_node("MatMulNBits", "x w s", domain="com.microsoft", K=32, N=2)],
        [tensor("w", np.ones((2, 1, 16)), np.uint8), rows("s", 2)],
        True,
    ),
    "a gain behind a quantised product": (
        [*QUANTISED, _then("Mul", "f s", "t"), _node("Mul", "t w")], [CODES, rows("w", 3)], True,
    ),
    # not learned
    "a target shape": ([_node("Reshape", "x w")], [tensor("w", [-1, 3], np.int64)], False),
    "an axis": ([_node("Unsqueeze", "x w")], [tensor("w", [0], np.int64)], False),
    "indices": ([_node("Gather", "x w")], [tensor("w", [0, 1], np.int64)], False),
    "a table of indices": ([_node("Gather", "w ids")], [tensor("w", np.eye(3), np.int64)], False),
    "scales of Resize": ([_node("Resize", "x - w")], [tensor("w", [1, 2, 2, 1])], False),
    "an attention scale": ([_node("Mul", "x w")], [tensor("w", 0.125)], False),
    "an epsilon": ([_node("Add", "x w")], [tensor("w", [1e-5])], False),
    "an exponent": ([_node("Pow", "x w")], [tensor("w", [2.0, 2.0])], False),
    "limits of Clip": ([_node("Clip", "x w")], [tensor("w", 0.0)], False),
    "a running mean": ([_node("BatchNormalization", "x a a w a")], [rows("w", 3), rows("a", 3)], False),
    "a quantisation scale": ([_node("DequantizeLinear", "x w")], [rows("w", 3)], False),
    "scales of 4-bit blocks": ([_node("MatMulNBits", "x q w", domain="com.microsoft", K=32, N=2)],
                               [tensor("q", np.ones((2, 1, 16)), np.uint8), rows("w", 2)], False),
    "a causal mask that is added": ([_node("Add", "x w")], [tensor("w", MASK)], False),
    "a mask of 0 and -1e4": ([_node("Add", "x w")], [tensor("w", np.maximum(MASK, -1e4))], False),
    "a lower triangle that is multiplied": ([_node("Mul", "x w")], [tensor("w", np.tri(6)[None, None])], False),
    "a boolean mask": ([_node("Where", "w x x")], [tensor("w", np.tri(6), np.bool_)], False),
    "a mask cut to length": (
        [_then("Slice", "w zero one", "a"), _then("Cast", "a", "b", to=9), _node("Where", "b x x")],
        [tensor("w", np.tri(6)[None, None], np.uint8)],
        False,
    ),
    "an initial state of zeros": ([_node("LSTM", "x a b - - w w")], [tensor("w", np.zeros((1, 1, 3)))], False),
    "a table of sines added by position": ([_node("Add", "x w")], [tensor("w", SINES)], False),
    "a cosine cache": (
        [_node("RotaryEmbedding", "x p w w", domain="com.microsoft")], [rows("w", 9, 4)], False,
    ),
    "rotary frequencies": (
        [
            _then("Cast", "positions", "p", to=1),
            _then("Expand", "w shape", "f"),
            _then("MatMul", "f p", "a"),
            _node("Cos", "a"),
        ],
        [rows("w", 1, 4, 1), tensor("shape", [1, 4, 1], np.int64)],
        False,
    ),
    "slopes of a position bias": ([_then("CumSum", "ids zero", "c"), _then("Cast", "c", "p", to=1),
                                  _node("Mul", "w p")], [rows("w", 4, 1, 1)], False),
    "the mean of the pixels": ([_node("Sub", "x w")], [rows("w", 3)], False),
    "strings": ([_node("Equal", "t w")], [helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])], False),
    "nothing": ([_node("Add", "x w")], [tensor("w", np.zeros((0, 3)))], False),
    "scales of the columns of a matrix, with that of an input": ([*QUANTISED, _then("Mul", "s w", "t"),
                                                                 _node("Mul", "f t")], [CODES, rows("w", 3)], False),
    "scales of the columns of a matrix, with that of a table": (
        [*QUANTISED, _then("Mul", "one_scale w", "t"), _node("Mul", "f t")],
        [CODES, rows("w", 3), tensor("one_scale", 0.5)], False,
    ),
    # cannot be told
    "nobody's": ([_node("Relu", "x")], [rows("w", 3, 3)], None),
    "probabilities of a random node": ([_then("Bernoulli", "w", "b"), _node("Mul", "x b")], [rows("w", 3, 3)], None),
    "an unknown operation's": ([_node("Mystery", "x w", domain="mine")], [rows("w", 3, 3)], None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_slot_decides(tmp_path: Path, case: str) -> None:
    nodes, tensors, expected = CASES[case]
    made = [*tensors, tensor("zero", [0], np.int64), tensor("one", [1], np.int64)]
    inputs = [info("x", rank=3), ids(), ids("positions"), info("c", TensorProto.BOOL), info("t", TensorProto.STRING)]
    model = read(save(tmp_path / "m.onnx", graph(nodes, made, inputs)))
    weight = next(weight for weight in model.weights if weight.name.startswith("w"))
    assert weight.parameter is expected, weight.because
    assert weight.because
    assert bool(model.notes) == (expected is None and case != "nobody's")


def test_a_constant_node_is_a_parameter_in_a_learned_slot_only(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value=rows("", 4, 3, 3)),
        helper.make_node("Constant", [], ["/Constant_output_0"], value=tensor("", [0.485, 0.456, 0.406])),
        helper.make_node("Conv", ["x", "k"], ["h"]),
        helper.make_node("Mul", ["h", "/Constant_output_0"], ["y"]),
    ]
    model = read(save(tmp_path / "m.onnx", graph(nodes, inputs=["x"])))
    assert [weight.parameter for weight in model.weights] == [True, False]


def test_a_weight_with_one_learned_use_is_a_parameter_whatever_the_other_uses(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mystery", ["w"], ["a"], domain="mine"),
        helper.make_node("Resize", ["x", "", "w"], ["b"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    (weight,) = read(save(tmp_path / "m.onnx", graph(nodes, [rows("w", 3, 3)], ["x"]))).weights
    assert weight.parameter is True and weight.because == "slot 1 of MatMul"


def test_large_tensors_are_not_read_to_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit.formats.onnx import parameters

    monkeypatch.setattr(parameters, "_N_MOST_BYTES_READ", 100)
    made = [tensor("w", MASK)]  # 144 bytes: a mask, if one looks
    (weight,) = read(save(tmp_path / "m.onnx", graph([_node("Add", "x w")], made, ["x"]))).weights
    assert weight.parameter is True


torch_models = {
    "lstm": 50 * 16 + 2 * (2 * 64 * 16 + 2 * 64) + 16 * 50 + 50 + 16 + 1,
    "convolutions": 8 * 3 * 9 + 8 + 8 + 8 + 5 * 8 + 5 + 1,  # without the 16 running statistics and the pixel means
}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", torch_models)
@pytest.mark.filterwarnings("ignore")
def test_exports_hold_the_parameters_of_the_live_model(tmp_path: Path, name: str, dynamo: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Recurrent(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = torch.nn.Embedding(50, 16), torch.nn.LSTM(16, 16, 2, batch_first=True)
            self.head, self.value = torch.nn.Linear(16, 50), torch.nn.Linear(16, 1)

        def forward(self, ids: Any) -> Any:
            hidden = self.rnn(self.embed(ids))[0]
            return self.head(hidden), self.value(hidden)

    class Convolutions(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
            self.slope, self.head = torch.nn.PReLU(), torch.nn.Linear(8, 5)
            self.register_buffer("mean", torch.rand(1, 3, 1, 1))

        def forward(self, pixels: Any) -> Any:
            hidden = torch.tanh(self.conv(pixels - self.mean))  # so that the norm is not folded into the convolution
            return self.head(self.slope(self.norm(hidden)).mean((2, 3)))

    torch.manual_seed(0)
    model, given = {
        "lstm": (Recurrent, torch.arange(12).reshape(2, 6)),
        "convolutions": (Convolutions, torch.rand(2, 3, 8, 8)),
    }[name]
    module = model().eval()
    assert sum(parameter.numel() for parameter in module.parameters()) == torch_models[name]
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (given,), str(path), dynamo=dynamo, verbose=False)
    assert sum(weight.n_elements for weight in read(path).weights if weight.parameter) == torch_models[name]
