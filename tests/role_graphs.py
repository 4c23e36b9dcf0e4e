"""Small graphs whose weights have known roles: made node by node, every weight named by nothing but a number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnx_cases import model_of, node, saved, tensor, value

from tieaudit.model import Model, Role
from tieaudit.roles import roles

V, D, H, F = 96, 16, 4, 24


class Graph:
    """Adds nodes and remembers what each weight is for."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.truth: dict[str, str] = {}
        self._values = np.random.default_rng(seed)
        self._n = 0

    def name(self) -> str:
        self._n += 1
        return f"t{self._n}"

    def weight(self, kind: str, *shape: int) -> str:
        name = self.name()
        self.tensors.append(tensor(name, self._values.standard_normal(shape).astype(np.float32)))
        self.truth[name] = kind
        return name

    def number(self, values: object, kind: type = np.float32) -> str:
        name = self.name()
        self.tensors.append(tensor(name, np.asarray(values, kind)))
        return name

    def ids(self, *shape: int | str) -> str:
        name = self.name()
        self.inputs.append(value(name, TensorProto.INT64, shape or ("b", "s")))
        return name

    def floats(self, *shape: int | str) -> str:
        name = self.name()
        self.inputs.append(value(name, TensorProto.FLOAT, shape))
        return name

    def op(self, op: str, *inputs: str, n: int = 1, **attributes: object) -> str:
        outputs = [self.name() for _ in range(n)]
        self.nodes.append(node(op, inputs, outputs, **attributes))
        return outputs[0]

    def linear(self, x: str, kind: str, n_in: int, n_out: int, bias: str = "") -> str:
        y = self.op("MatMul", x, self.weight(kind, n_in, n_out))
        return self.op("Add", y, self.weight(bias, n_out)) if bias else y

    def rms(self, x: str, size: int = D) -> str:
        mean = self.op("ReduceMean", self.op("Pow", x, self.number(2.0)), self.number([-1], np.int64), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.number(1e-5)))
        return self.op("Mul", self.weight("norm_scale", size), self.op("Mul", x, self.op("Reciprocal", root)))

    def layer_norm(self, x: str, size: int = D) -> str:
        scale, bias = self.weight("norm_scale", size), self.weight("norm_bias", size)
        return self.op("LayerNormalization", x, scale, bias, axis=-1)

    def heads(self, x: str) -> str:
        shaped = self.op("Reshape", x, self.number([0, 0, H, D // H], np.int64))
        return self.op("Transpose", shaped, perm=[0, 2, 1, 3])

    def rotated(self, x: str) -> str:
        half = [self.number([at], np.int64) for at in (0, D // H // 2, D // H, 3)]
        low, high = self.op("Slice", x, half[0], half[1], half[3]), self.op("Slice", x, half[1], half[2], half[3])
        turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        cos, sin = self.number(np.ones(D // H) * 0.5), self.number(np.ones(D // H) * 0.25)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def attention(self, x: str, memory: str | None = None, *, rotate: bool = False, biases: bool = False) -> str:
        """Query, key and value of x (keys and values of `memory` if given), softmax, output."""
        made = []
        for kind in ("query", "key", "value"):
            source = x if kind == "query" or memory is None else memory
            made.append(self.linear(source, f"attention_{kind}", D, D, f"attention_{kind}_bias" if biases else ""))
        q, k, v = (self.heads(one) for one in made)
        if rotate:
            q, k = self.rotated(q), self.rotated(k)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = self.op("Softmax", self.op("Div", scores, self.number(2.0)), axis=-1)
        seen = self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        flat = self.op("Reshape", seen, self.number([0, 0, D], np.int64))
        return self.linear(flat, "attention_output", D, D, "attention_output_bias" if biases else "")

    def gated(self, x: str) -> str:
        gate = self.linear(x, "ffn_gate", D, F)
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", gate, self.linear(x, "ffn_up", D, F)), "ffn_down", F, D)

    def plain(self, x: str, biases: bool = True) -> str:
        inner = self.linear(x, "ffn_up", D, F, "ffn_up_bias" if biases else "")
        return self.linear(self.op("Relu", inner), "ffn_down", F, D, "ffn_down_bias" if biases else "")

    def embedded(self, ids: str, rows: int = V) -> str:
        return self.op("Gather", self.weight("token_embedding", rows, D), ids)

    def head(self, x: str) -> str:
        return self.linear(x, "output_head", D, V)

    def proto(self, *outputs: str, opset: int = 18, check: bool = True, rank: int = 3) -> onnx.ModelProto:
        results = [value(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)]) for name in outputs]
        return model_of(self.nodes, self.inputs, results, self.tensors, opset=opset, check=check)

    def model(self, folder: Path, *outputs: str, **options: int | bool) -> Model:
        return saved(self.proto(*outputs, **options), folder)  # type: ignore[arg-type]


def decoder(n_layers: int = 2, seed: int = 0) -> tuple[Graph, str]:
    """A pre-norm decoder with rotary positions, gated feed-forwards and a capped head."""
    graph = Graph(seed)
    x = graph.embedded(graph.ids())
    for _ in range(n_layers):
        x = graph.op("Add", x, graph.attention(graph.rms(x), rotate=True))
        x = graph.op("Add", x, graph.gated(graph.rms(x)))
    scores = graph.op("Mul", graph.head(graph.rms(x)), graph.number(1 / 30))
    return graph, graph.op("Mul", graph.op("Tanh", scores), graph.number(30.0))


def scrambled(proto: onnx.ModelProto, seed: int) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Every value under a drawn name, nodes without one; and old name → new name."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph, drawn = made.graph, random.Random(seed)
    names = [*(one.name for one in graph.initializer), *(one.name for one in graph.input)]
    names += [name for one in graph.node for name in one.output]
    new = {name: f"{drawn.getrandbits(60):x}" for name in names if name}
    for one in (*graph.initializer, *graph.input, *graph.output):
        one.name = new[one.name]
    for one in graph.node:
        inputs, outputs = [new.get(name, "") for name in one.input], [new.get(name, "") for name in one.output]
        del one.input[:], one.output[:]
        one.input.extend(inputs)
        one.output.extend(outputs)
        one.name = ""
    return made, new


def kinds(model: Model, names: Sequence[str] | None = None) -> dict[str, str]:
    """Weight → kind, of these weights."""
    found = roles(model)
    return {id: role.kind for id, role in found.items() if names is None or id in names}


def layers(model: Model, truth: dict[str, str], kind: str) -> list[int | None]:
    """Layers of the weights of one kind, in the order of the graph."""
    found: dict[str, Role] = dict(roles(model))
    return [found[id].layer for id, told in truth.items() if told == kind]
