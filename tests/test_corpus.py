"""Every ONNX and safetensors file of a corpus of real models: tieaudit's measured ties against brute force.

The oracle shares no code with the tool: it loads everything with the formats' own libraries, compares all pairs of
equal byte length, and knows nothing of buckets, probes, storages or views.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.errors import TieAuditError
from tieaudit.find import find
from tieaudit.load import load_one

Tensor = tuple[str, tuple[int, ...], bytes]
"""Element type, shape, canonical bytes."""


def onnx_tensors(path: Path) -> dict[str, Tensor]:
    """Every initializer and tensor-valued Constant of the main graph and of subgraphs, read by the onnx library.

    Keyed by name; a name that occurs in several graphs is numbered, in the order of a depth-first walk.
    """
    import onnx

    found: dict[str, Tensor] = {}

    def keep(name: str, tensor: Any) -> None:
        if tensor.data_type == onnx.TensorProto.STRING or tensor.data_type == 0:
            return
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        found[f"{name}#{len(found)}"] = (str(array.dtype), tuple(tensor.dims), np.ascontiguousarray(array).tobytes())

    def walk(graph: Any) -> None:
        last = {tensor.name: tensor for tensor in graph.initializer}  # of two with one name the runtime sees the last
        for name, tensor in last.items():
            keep(name, tensor)
        nodes(graph.node)

    def nodes(body: Any) -> None:
        for node in body:
            for attribute in node.attribute:
                if attribute.HasField("t") and node.op_type == "Constant":
                    keep(node.output[0], attribute.t)
                for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                    walk(inner)

    model = onnx.load(str(path), load_external_data=False)
    walk(model.graph)
    for function in model.functions:
        nodes(function.node)
    return found


def safetensors_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import deserialize

    return {
        f"{name}#{index}": (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for index, (name, entry) in enumerate(deserialize(path.read_bytes()))
    }


def classes(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names of equal or transposed tensors, all pairs compared; constants and empty tensors left out."""
    by_length: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, (kind, shape, data) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64))
        item = len(data) // size if size else 0
        if size > 1 and data != data[:item] * size:
            by_length[kind, len(data)].append(name)
    groups: list[list[str]] = []
    for names in by_length.values():
        homes: list[list[str]] = []
        for name in names:
            touching = [home for home in homes if any(same(tensors[name], tensors[other]) for other in home)]
            homes = [home for home in homes if home not in touching] + [
                [*(one for home in touching for one in home), name]
            ]
        groups += [sorted(name.split("#")[0] for name in home) for home in homes if len(home) > 1]
    return sorted(groups)


def same(a: Tensor, b: Tensor) -> bool:
    if a[1] == b[1] and a[2] == b[2]:
        return True
    return len(a[1]) == 2 and a[1] == b[1][::-1] and transposed(a) == b[2]


def transposed(a: Tensor) -> bytes:
    rows, columns = a[1]
    item = len(a[2]) // (rows * columns)
    return np.frombuffer(a[2], np.uint8).reshape(rows, columns, item).transpose(1, 0, 2).tobytes()


def files(corpus: Path) -> Iterator[Path]:
    yield from (path for path in sorted(corpus.rglob("*")) if path.suffix in (".onnx", ".safetensors"))


def test_measured_ties_are_those_of_brute_force_on_every_file(corpus: Path) -> None:
    wrong, n_compared, n_ties = [], 0, 0
    for path in files(corpus):
        try:
            tensors = onnx_tensors(path) if path.suffix == ".onnx" else safetensors_tensors(path)
        except Exception:  # what the library itself cannot read is the business of the other tests
            continue
        model = load_one(path)
        if any(weight.held_as == "sparse_initializer" for weight in model.weights):
            continue  # the oracle reads dense tensors only
        ours = [sorted(model.by_id[id].name for id in tie.ids) for tie in find(model).ties if tie.origin == "measured"]
        strings = {weight.name for weight in model.weights if weight.dtype == "string"}
        ours = sorted(names for names in ours if not strings & set(names))
        expected = classes(tensors)
        n_compared, n_ties = n_compared + 1, n_ties + len(expected)
        if ours != expected:
            wrong.append((str(path.relative_to(corpus)), ours, expected))
    assert wrong == []
    assert n_compared > 100
    assert n_ties > 20


def test_every_file_is_scanned_or_refused_in_one_line(corpus: Path) -> None:
    paths = [str(path) for path in files(corpus)]
    result = CliRunner().invoke(main, ["scan", *paths, "--format", "json"])
    answer = json.loads(result.stdout)
    assert all(not model["crashed"] for model in answer["models"])
    assert all("\n" not in error["message"] for error in answer["errors"])
    assert len(answer["models"]) + len(answer["errors"]) >= len(paths) * 0.95  # parts of one export are one model
    assert len(answer["errors"]) <= len(paths) * 0.05


@pytest.mark.parametrize(
    ("name", "mark"),
    [("test_arbitrary_external_file.onnx", "inside the model's folder"), ("come_from_user.onnx", "expected")],
)
def test_what_must_be_refused_is_refused(corpus: Path, name: str, mark: str) -> None:
    paths = [path for path in files(corpus) if path.name.endswith(name)]
    if not paths:
        pytest.skip(f"no {name} in this corpus")
    with pytest.raises(TieAuditError, match=mark):
        load_one(paths[0])
