"""Brute force over a folder of models: which stored tensors are equal, or each other's transpose, and nothing else.

    python tests/corpus_truth.py CORPUS          prints every class, for a person to read and to judge

An oracle for `test_corpus.py`, so it shares no code with the tool: the formats' own libraries load everything, all
pairs of equal byte length are compared, and there are no buckets, probes, storages or views. What it says about a file
is held against `corpus_truth.toml`, which a person wrote, and against what the tool prints.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """One stored tensor."""

    kind: str
    """Element type and layout, e.g. `float32` or `sparse int64`."""
    shape: tuple[int, ...]
    data: bytes
    """Row-major bytes; of a sparse one, its values and then its indices."""
    constant: bool
    """Whether every element is the same, bit for bit, or there is but one."""

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Class:
    """Tensors of one value: the closure of *equal* and *transposed*."""

    members: tuple[str, ...]
    transposed: frozenset[str]
    """Members that equal the first one only with their axes swapped."""
    n_bytes: int
    """Of one of them."""


def tensors(path: Path) -> dict[str, Tensor]:
    """Every stored tensor by its id: the name in the main graph, `|scope|name` inside a body."""
    return _onnx(path) if path.suffix == ".onnx" else _safetensors(path)


def classes(found: dict[str, Tensor]) -> list[Class]:
    """Classes of two or more tensors that are not constant."""
    return _classes({id: tensor for id, tensor in found.items() if not tensor.constant and tensor.n_elements})


def constants(found: dict[str, Tensor]) -> list[Class]:
    """Classes of two or more tensors that are filled with one value, of one shape."""
    same: dict[tuple[str, tuple[int, ...], bytes], list[str]] = defaultdict(list)
    for id, one in found.items():
        if one.constant:
            same[one.kind, one.shape, one.data].append(id)
    return [Class(tuple(ids), frozenset(), len(key[2])) for key, ids in same.items() if len(ids) > 1]


def _classes(found: dict[str, Tensor]) -> list[Class]:
    by_length: dict[tuple[str, int], list[str]] = defaultdict(list)
    for id, one in found.items():
        by_length[one.kind, len(one.data)].append(id)
    result: list[Class] = []
    for ids in by_length.values():
        homes: list[list[str]] = []
        for id in ids:
            touching = [home for home in homes if any(_related(found[id], found[other]) for other in home)]
            homes = [home for home in homes if home not in touching]
            homes.append([*(member for home in touching for member in home), id])
        for home in (home for home in homes if len(home) > 1):
            members = tuple(id for id in found if id in set(home))
            first = found[members[0]]
            turned = frozenset(id for id in members if not _equal(first, found[id]))
            result.append(Class(members, turned, len(first.data)))
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data == b.data


def _related(a: Tensor, b: Tensor) -> bool:
    if _equal(a, b):
        return True
    if len(a.shape) != 2 or a.shape != b.shape[::-1] or len(a.data) % a.n_elements:
        return False
    item = len(a.data) // a.n_elements
    turned = np.frombuffer(a.data, np.uint8).reshape(*a.shape, item).transpose(1, 0, 2)
    return turned.tobytes() == b.data


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import deserialize

    found = {}
    for name, entry in sorted(deserialize(path.read_bytes())):
        shape, data = tuple(entry["shape"]), bytes(entry["data"])
        found[name] = Tensor(str(entry["dtype"]), shape, data, _constant(data, int(np.prod(shape, dtype=np.int64))))
    return found


def _constant(data: bytes, n_elements: int) -> bool:
    if not n_elements:
        return False
    item = len(data) // n_elements
    return n_elements == 1 or data == data[:item] * n_elements


def _onnx(path: Path) -> dict[str, Tensor]:
    import onnx

    found: dict[str, Tensor] = {}

    def keep(scope: str, name: str, tensor: Any) -> None:
        made = _tensor(tensor, path.parent)
        if made is not None:
            name, where = (text.replace("%", "%25").replace("|", "%7C") for text in (name, scope))
            found[f"|{where}|{name}" if where else name] = made

    def walk(graph: Any, scope: str) -> None:
        # of two initializers with one name the runtime takes the last
        for name, tensor in {tensor.name: tensor for tensor in graph.initializer}.items():
            keep(scope, name, tensor)
        for sparse in graph.sparse_initializer:
            values, indices = _tensor(sparse.values, path.parent), _tensor(sparse.indices, path.parent)
            if values is not None and indices is not None:
                one = Tensor(f"sparse {values.kind}", tuple(sparse.dims), values.data + indices.data, False)
                found[f"|{scope}|{sparse.values.name}" if scope else sparse.values.name] = one
        nodes(graph.node, scope)

    def nodes(body: Any, scope: str) -> None:
        names = Counter(node.name for node in body)
        for index, node in enumerate(body):
            outputs = [name for name in node.output if name]
            handle = node.name if node.name and names[node.name] == 1 else (outputs or [f"{node.op_type}#{index}"])[0]
            for attribute in node.attribute:
                if attribute.HasField("t") and node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                    keep(scope, node.output[0], attribute.t)
                inner = [attribute.g] if attribute.HasField("g") else []
                for number, graph in enumerate([*inner, *attribute.graphs]):
                    step = f"{handle}.{attribute.name}" + (f"[{number}]" if attribute.graphs else "")
                    walk(graph, f"{scope}/{step}" if scope else step)

    model = onnx.load(str(path), load_external_data=False)
    walk(model.graph, "")
    for function in model.functions:
        nodes(function.node, f"function:{function.domain}:{function.name}")
    return found


def _tensor(tensor: Any, base: Path) -> Tensor | None:
    """A TensorProto's values; None for one without any."""
    import onnx

    shape = tuple(tensor.dims)
    if tensor.data_type == onnx.TensorProto.UNDEFINED:
        return None
    if tensor.data_type == onnx.TensorProto.STRING:
        strings = [bytes(text) for text in tensor.string_data]
        data = b"".join(len(text).to_bytes(8, "little") + text for text in strings)
        return Tensor("string", shape, data, len(strings) == 1)
    array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor, base_dir=str(base)))
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    return Tensor(kind, shape, array.tobytes(), _constant(array.tobytes(), int(array.size)))


def files(corpus: Path) -> Iterator[Path]:
    """Every file that this oracle has a library for."""
    yield from (path for path in sorted(corpus.rglob("*")) if path.suffix in (".onnx", ".safetensors"))


def main() -> int:
    """Print what there is to judge."""
    corpus = Path(sys.argv[1])
    for path in files(corpus):
        try:
            found = tensors(path)
        except Exception as error:
            print(f"# {path.relative_to(corpus)}: {type(error).__name__}: {error}"[:200])
            continue
        here = classes(found)
        if here:
            print(f"\n{path.relative_to(corpus)}")
        for one in here:
            first = found[one.members[0]]
            begins = first.data[:16].hex(" ", 4)
            print(f"  {first.kind} {list(first.shape)}, {one.n_bytes} bytes × {len(one.members)}, begins {begins}")
            for id in one.members:
                print(f"    {'transposed' if id in one.transposed else 'equal'} {id!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
