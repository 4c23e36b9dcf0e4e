"""Small inputs to begin with: one for each construct that a reader treats in its own way. Made here, not stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from fuzz.boxes import FILE, LINK, PIPE, Box, pack

_V, _D = 12, 4


def _numbers(*shape: int, seed: int = 0, kind: Any = np.float32) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(kind)


def _model(nodes: list[Any], tensors: list[Any], inputs: list[Any], outputs: list[str], functions: Any = ()) -> bytes:
    from onnx import TensorProto, helper

    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)
    data: bytes = model.SerializeToString()
    return data


def onnx_files() -> Iterator[bytes]:
    """Serialized models; external data is `m.data`, 64 bytes."""
    from onnx import TensorProto, helper, numpy_helper

    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    table, large = numpy_helper.from_array(_numbers(_V, _D), "w"), numpy_helper.from_array(_numbers(24, 16), "v")
    lookup = helper.make_node("Gather", ["w", "ids"], ["x"])
    turned = numpy_helper.from_array(np.ascontiguousarray(_numbers(_V, _D).T), "head")
    yield _model([lookup, helper.make_node("MatMul", ["x", "head"], ["y"])], [table, turned], [ids], ["y"])
    shape = numpy_helper.from_array(np.array([2, -1], np.int64), "shape")
    chain = [
        helper.make_node("Identity", ["v"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        helper.make_node("Cast", ["b"], ["c"], to=10),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Unsqueeze", ["d"], ["e"], axes=[0]),
        helper.make_node("Squeeze", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "v"], ["y"], transB=1),
    ]
    yield _model(chain, [large, shape], [], ["y", "a"])
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=large), helper.make_node("Add", ["k", "w"], ["o"])],
        "then",
        [],
        [helper.make_tensor_value_info("o", 1, None)],
        [numpy_helper.from_array(_numbers(2, 2, seed=3), "w2")],
    )
    branch = helper.make_node("If", ["c"], ["y"], name="if", then_branch=inner, else_branch=inner)
    yield _model([branch], [table], [helper.make_tensor_value_info("c", TensorProto.BOOL, [])], ["y"])
    body = [helper.make_node("Identity", ["p"], ["q"]), helper.make_node("MatMul", ["q", "q"], ["r"])]
    function = helper.make_function("mine", "F", ["p"], ["r"], body, [helper.make_opsetid("", 17)])
    call = helper.make_node("F", ["v"], ["y"], domain="mine")
    yield _model([call], [large], [], ["y"], [function])
    made: Any = helper.make_tensor  # its own annotation knows no complex numbers and no strings
    typed = [
        made("f32", 1, [3], [1.0, float("nan"), -0.0]),
        made("f16", 10, [2], [1.0, 2.0]),
        made("i64", 7, [2, 0], []),
        made("u64", 13, [1], [2**63]),
        made("b", 9, [2], [True, False]),
        made("i4", 22, [3], [1, -2, 3]),
        made("s", 8, [2], [b"a", b"\xff"]),
        made("c64", 14, [1], [1 + 2j]),
    ]
    add = helper.make_node("Concat", [tensor.name for tensor in typed], ["y"], axis=0)
    yield _model([add], typed, [], ["y"])
    outside = TensorProto(name="w", data_type=1, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "m.data"), ("offset", "8"), ("length", "48")):
        outside.external_data.add(key=key, value=value)
    again = TensorProto()
    again.CopyFrom(outside)
    again.name = "w2"
    yield _model([helper.make_node("Add", ["w", "w2"], ["y"])], [outside, again], [], ["y"])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(_numbers(3), "sp"), numpy_helper.from_array(np.array([0, 5, 7], np.int64), "at"), [4, 4]
    )
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["sp"], ["y"])], "g", [], []))
    model.graph.sparse_initializer.append(sparse)
    yield model.SerializeToString()
    quantised = [
        numpy_helper.from_array(_numbers(_V, _D, kind=np.int8), "q"),
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["dq"]),
        helper.make_node("Gather", ["dq", "ids"], ["y"]),
    ]
    yield _model(nodes, quantised, [ids], ["y"])


def _safetensors(entries: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, (tag, shape, content) in entries.items():
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def safetensors_files() -> Iterator[bytes]:
    """Whole files."""
    table = _numbers(3, 4).tobytes()
    yield _safetensors({"a": ("F32", [3, 4], table), "b": ("F32", [4, 3], table)}, {"format": "pt"})
    yield _safetensors({"a": ("U8", [2], b"xy"), "b": ("BOOL", [0, 5], b""), "c": ("F4", [4], b"zz")})
    yield _safetensors({}, {})
    yield _safetensors({"é\u202e": ("F6_E2M3", [4], b"abc"), "s": ("BF16", [], b"ab")}, {"lm_head.weight": "s"})


_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def _checkpoints() -> Iterator[tuple[dict[str, Any], Box]]:
    table = _numbers(_V, _D).tobytes()
    one = {_EMBEDDING: ("F32", [_V, _D], table), _HEAD: ("F32", [_V, _D], table)}
    gpt = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
    yield gpt, [(FILE, "model.safetensors", _safetensors(one, {"format": "pt"}))]
    shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {"total_size": 384}, "weight_map": {_EMBEDDING: shards[0], _HEAD: shards[1]}}
    files = [(FILE, shard, _safetensors({name: one[name]})) for shard, name in zip(shards, one, strict=True)]
    yield (
        {**gpt, "tie_word_embeddings": False},
        [(FILE, "model.safetensors.index.json", json.dumps(index).encode()), *files],
    )
    t5 = {
        "shared.weight": one[_EMBEDDING],
        "encoder.embed_tokens.weight": one[_EMBEDDING],
        _HEAD: ("F32", [_V, _D], table),
    }
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "text_config": {"a": [1, None]}}
    yield config, [(FILE, "model.safetensors", _safetensors(t5, {"decoder.embed_tokens.weight": "shared.weight"}))]
    yield {"model_type": ["odd"]}, [(FILE, "model.safetensors", _safetensors({"embed_tokens.weight": one[_HEAD]}))]


def folders() -> Iterator[bytes]:
    """Boxes with config.json and weights."""
    for config, box in _checkpoints():
        yield pack([(FILE, "config.json", json.dumps(config).encode()), *box])
    yield pack([(FILE, "config.json", b"{}"), (FILE, "pytorch_model.bin", b"PK"), (PIPE, "model.safetensors", b"")])


def everything() -> Iterator[bytes]:
    """Boxes with files of every format."""
    for data in onnx_files():
        yield pack([(FILE, "m.onnx", data), (FILE, "m.data", bytes(range(64)))])
    for data in safetensors_files():
        yield pack([(FILE, "model.safetensors", data)])
    yield from folders()
    two = list(onnx_files())
    yield pack([(FILE, "encoder_model.onnx", two[0]), (FILE, "decoder_model.onnx", two[0])])
    yield pack(
        [(FILE, "m.onnx", two[5]), (LINK, "m.data", b"/etc/passwd"), (PIPE, "model.safetensors.index.json", b"")]
    )
