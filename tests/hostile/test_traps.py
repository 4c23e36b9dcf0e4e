"""Small files that cost far more than they are long: time and memory grow with the file and no faster.

Time is counted in calls of functions, which a profiler sees the same on every machine: twice the file may cost little
more than twice the calls. What is copied in C is measured by the memory that it needs.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import tracemalloc
from collections.abc import Callable
from itertools import islice, pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tieaudit.errors import CorruptFile, TieAuditError
from tieaudit.formats.huggingface import asking
from tieaudit.load import load_one
from tieaudit.plan import Choices
from tieaudit.plan import plan as make_plan
from tieaudit.scan import look, scan

node = helper.make_node
Make = Callable[[Path, int], Path]


def tensor(name: str, *shape: int, seed: int = 0) -> Any:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name)


def save(
    path: Path, nodes: list[Any], tensors: Any = (), outputs: Any = ("y",), inputs: Any = (), functions: Any = ()
) -> Path:
    infos = [[helper.make_tensor_value_info(name, 1, None) for name in names] for names in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *infos, list(tensors))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    path.write_bytes(helper.make_model(graph, functions=list(functions), opset_imports=opsets).SerializeToString())
    return path


def outside(name: str, shape: list[int], offset: int = 0) -> Any:
    """A float32 tensor in `m.data`."""
    made = TensorProto(name=name, data_type=1, data_location=1, dims=shape)
    for key, value in (("location", "m.data"), ("offset", str(offset)), ("length", str(4 * int(np.prod(shape))))):
        made.external_data.add(key=key, value=value)
    return made


def safetensors(path: Path, names: list[str], metadata: dict[str, str] | None = None) -> Path:
    """A file of small tensors, each two of them equal."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    for place, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [8 * place, 8 * place + 8]}
    text = json.dumps(header).encode()
    body = b"".join((place // 2).to_bytes(8, "little") for place in range(len(names)))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def identities_that_are_all_read(home: Path, n: int) -> Path:
    chain = [node("Identity", [f"x{i}"], [f"x{i + 1}"]) for i in range(n)]
    return save(home / "m.onnx", [*chain, *(node("Neg", [f"x{i}"], [f"n{i}"]) for i in range(n))], [tensor("x0", 2, 2)])


def casts_that_are_all_read(home: Path, n: int) -> Path:
    chain = [node("Cast", [f"x{i}"], [f"x{i + 1}"], to=10 - 9 * (i % 2)) for i in range(n)]
    return save(home / "m.onnx", [*chain, *(node("Neg", [f"x{i}"], [f"n{i}"]) for i in range(n))], [tensor("x0", 2, 2)])


def a_wide_node(home: Path, n: int) -> Path:
    outputs = [f"y{i}" for i in range(n)]
    return save(home / "m.onnx", [node("Split", ["w"] * n, outputs)], [tensor("w", 2, 2)], outputs)


def a_sum_of_constants(home: Path, n: int) -> Path:
    adds = [node("Add", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(n)]
    held = [tensor("x0", 2), *(tensor(f"w{i}", 2, seed=i) for i in range(n))]
    return save(home / "m.onnx", [*adds, node("Mul", [f"x{n}", "in"], ["y"])], held, ["y"], ["in"])


def every_value_reads_all_before_it(home: Path, n: int) -> Path:
    n = isqrt(200 * n)  # inputs grow with its square
    joins = [node("Concat", [f"x{j}" for j in range(i + 1)], [f"x{i + 1}"]) for i in range(n)]
    return save(home / "m.onnx", [*joins, node("Gather", ["w", f"x{n}"], ["y"])], [tensor("w", 4, 4)], ["y"], ["x0"])


def one_weight_with_many_readers(home: Path, n: int) -> Path:
    return save(home / "m.onnx", [node("MatMul", ["a", "w"], [f"y{i}"]) for i in range(n)], [tensor("w", 8, 8)], ["y0"])


def many_names_of_one_range(home: Path, n: int) -> Path:
    (home / "m.data").write_bytes(bytes(range(256)) * 16)
    held = [outside(f"w{i}", [32, 32]) for i in range(n)]
    return save(home / "m.onnx", [node("MatMul", ["a", f"w{i}"], [f"y{i}"]) for i in range(n)], held, ["y0"], ["a"])


def many_equal_tensors(home: Path, n: int) -> Path:
    held = [tensor(f"w{i}", 4, 4) for i in range(n)]
    return save(home / "m.onnx", [node("MatMul", ["a", f"w{i}"], [f"y{i}"]) for i in range(n)], held, ["y0"], ["a"])


def many_equal_constants(home: Path, n: int) -> Path:
    held = [numpy_helper.from_array(np.zeros((3, 3), np.float32), f"w{i}") for i in range(n)]
    return save(home / "m.onnx", [node("Add", ["a", f"w{i}"], [f"y{i}"]) for i in range(n)], held, ["y0"], ["a"])


def masks_that_differ_in_one_element(home: Path, n: int) -> Path:
    held = []
    for place in range(n):
        mask = np.zeros((80, 80), np.float32)
        mask.reshape(-1)[1000 + place] = 1
        held.append(numpy_helper.from_array(mask, f"w{place}"))
    return save(home / "m.onnx", [node("MatMul", ["a", f"w{i}"], [f"y{i}"]) for i in range(n)], held, ["y0"], ["a"])


def many_pairs_of_equal_tensors(home: Path, n: int) -> Path:
    held = [tensor(f"w{i}", 4, 4, seed=i // 2) for i in range(2 * n)]
    return save(home / "m.onnx", [node("MatMul", ["a", f"w{i}"], [f"y{i}"]) for i in range(2 * n)], held, ["y0"], ["a"])


def bodies_with_one_path(home: Path, n: int) -> Path:
    body = helper.make_graph([node("Identity", ["w"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)])
    return save(home / "m.onnx", [node("If", ["c"], ["y"], then_branch=body) for _ in range(n)], [tensor("w", 2, 2)])


def repeated_names(home: Path, n: int) -> Path:
    return save(home / "m.onnx", [node("Neg", ["w"], ["y"])] * n, [tensor("w", 2, seed=i) for i in range(n)])


def calls_of_a_function_with_many_results(home: Path, n: int) -> Path:
    n //= 8  # calls × results is what a reader may follow, so only one of the two grows
    body = [node("Constant", [], [f"k{i}"], value=tensor("", 2, seed=i)) for i in range(20)]
    function = helper.make_function("f", "F", ["a"], [f"k{i}" for i in range(20)], body, [helper.make_opsetid("", 17)])
    calls = [node("F", ["a"], [f"y{i}_{k}" for k in range(20)], domain="f") for i in range(n)]
    return save(home / "m.onnx", calls, [], ["y0_0"], ["a"], [function])


def names_that_each_document_another(home: Path, n: int) -> Path:
    names = [f"w{i}" for i in range(n)]
    return safetensors(home / "m.safetensors", names, {f"d{name}": name for name in names})


def names_that_document_one(home: Path, n: int) -> Path:
    return safetensors(home / "m.safetensors", ["a", "b"], {f"d{i}": "a" for i in range(n)})


def a_class_with_a_tie_for_every_layer(home: Path, n: int) -> Path:
    config = {"model_type": "rt_detr", "architectures": ["RTDetrForObjectDetection"]}
    (home / "config.json").write_text(json.dumps(config))
    names = [f"{start}class_embed.{i}.weight" for i in range(n) for start in ("", "model.decoder.")]
    safetensors(home / "model.safetensors", names)
    return home


TRAPS: tuple[tuple[Make, int], ...] = (
    (identities_that_are_all_read, 250),
    (casts_that_are_all_read, 250),
    (a_wide_node, 200),
    (a_sum_of_constants, 200),
    (every_value_reads_all_before_it, 20),
    (one_weight_with_many_readers, 150),
    (many_names_of_one_range, 500),
    (many_equal_tensors, 150),
    (many_equal_constants, 150),
    (masks_that_differ_in_one_element, 100),
    (many_pairs_of_equal_tensors, 100),
    (bodies_with_one_path, 150),
    (repeated_names, 150),
    (calls_of_a_function_with_many_results, 200),
    (names_that_each_document_another, 500),
    (names_that_document_one, 200),
    (a_class_with_a_tie_for_every_layer, 100),
)


def n_calls(path: Path) -> int:
    """Function calls of a scan and a plan."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        model = load_one(path)
        scan(model)
        make_plan(look(model), Choices())
    except TieAuditError:
        pass
    finally:
        profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("make", "n"), TRAPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_twice_the_file_costs_hardly_more_than_twice_the_calls(
    make: Make, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "installed", lambda: False)
    # budgets that make the worst case linear shall be used up by the small file already
    monkeypatch.setattr("tieaudit.formats.onnx.parameters._N_STEPS_FOR_ALL", 1000)
    monkeypatch.setattr("tieaudit.formats.onnx.uses._N_MOST_VIEWS", 20)
    counts = []
    for factor in (1, 1, 2, 4):  # the first one warms what is imported and kept
        home = tmp_path / f"{len(counts)}"
        home.mkdir()
        counts.append(n_calls(make(home, factor * n)))
    _, once, twice, fourfold = counts
    # each step measured against the one before it, less what does not grow: quadratic would be 4, linear is 2
    assert fourfold - twice < 2.6 * (twice - once) + 2000, counts


def n_most_bytes(path: Path) -> int:
    """Memory of a scan at its peak."""
    load_one(path)
    tracemalloc.start()
    try:
        scan(load_one(path))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_chain_of_views_is_not_kept_for_each_of_its_readers(tmp_path: Path) -> None:
    # 4000 readers, each behind a chain of up to 4000 views: 64 MB of references if every chain were kept whole
    assert n_most_bytes(identities_that_are_all_read(tmp_path, 4000)) < 30_000_000


def test_a_long_name_of_a_node_is_not_kept_for_each_weight_of_its_body(tmp_path: Path) -> None:
    # 500 weights in the body of a node whose name has a million characters: 500 MB of ids if each held the whole path
    body = [node("Constant", [], [f"k{i}"], value=tensor("", 2, seed=i)) for i in range(500)]
    graph = helper.make_graph(body, "b", [], [helper.make_tensor_value_info("k0", 1, None)])
    path = save(tmp_path / "m.onnx", [node("If", ["c"], ["y"], name="n" * 1_000_000, then_branch=graph)])
    assert n_most_bytes(path) < 30_000_000
    model = load_one(path)
    assert len({weight.id for weight in model.weights}) == 500
    assert all(len(weight.scope) <= 2000 for weight in model.weights)


def test_functions_that_pass_weights_through_many_views_end_with_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tieaudit.formats.onnx.uses._N_MOST_STEPS_IN_CALLS", 500)
    names = ["a", *(f"i{i}" for i in range(98)), "b"]
    body = [node("Identity", [one], [other]) for one, other in pairwise(names)]
    function = helper.make_function("f", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    calls = [node("F", [f"w{i}"], [f"y{i}"], domain="f") for i in range(20)]
    held = [tensor(f"w{i}", 2, 2, seed=i) for i in range(20)]
    path = save(tmp_path / "m.onnx", calls, held, [f"y{i}" for i in range(20)], (), [function])
    ops = {weight.name: load_one(path).uses_of[weight.id][0].op for weight in load_one(path).weights}
    assert ops["w0"] == "output"  # followed through the body and out again
    assert ops["w19"] == "f.F"  # 20 weights × 99 nodes are more than 500 steps
    assert len(ops) == 20


@pytest.mark.parametrize("n_dims", [64, 65, 100_000])
def test_more_dimensions_than_numpy_holds_are_refused(tmp_path: Path, n_dims: int) -> None:
    # the product of 100,000 sizes of 2^62 has six million bits and takes a quadratic time to multiply
    made = TensorProto(name="w", data_type=1, dims=[*([2**62] * (n_dims - 1)), 0])
    path = save(tmp_path / "m.onnx", [node("Neg", ["w"], ["y"])], [made])
    if n_dims == 64:
        assert load_one(path).weights[0].n_elements == 0
    else:
        with pytest.raises(CorruptFile, match=f"at most 64 dimensions, found {n_dims}"):
            load_one(path)


def test_tensors_that_overlap_without_end_are_refused_before_they_are_read(tmp_path: Path) -> None:
    # a data file full of holes costs its maker nothing; 300 tensors of nearly all of it would be read 300 times
    with (tmp_path / "m.data").open("wb") as file:
        file.truncate(8_000_000)
    held = [outside(f"w{i}", [1_900_000], 4 * i) for i in range(300)]
    path = save(tmp_path / "m.onnx", [node("Neg", [one.name], [f"y{one.name}"]) for one in held], held, ["yw0"])
    with pytest.raises(CorruptFile, match="hardly overlap"):
        load_one(path)
    shapes = ([2**a, 2**b, 2 ** (20 - a - b)] for a in range(21) for b in range(21 - a))
    held = [outside(f"w{i}", shape) for i, shape in enumerate(islice(shapes, 200))]
    with pytest.raises(CorruptFile, match="hardly overlap"):
        load_one(save(tmp_path / "m.onnx", [node("Neg", ["w0"], ["y"])], held))
    same = [outside(f"w{i}", [1_900_000]) for i in range(300)]  # one range under many names is read once
    assert len(load_one(save(tmp_path / "m.onnx", [node("Neg", ["w0"], ["y"])], same)).weights) == 300


def test_sparse_tensors_of_one_range_are_not_all_taken_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "m.data").open("wb") as file:
        file.truncate(12_000_000)
    model = helper.make_model(helper.make_graph([node("Neg", ["s0"], ["y"])], "g", [], []))
    for number in range(40):
        sparse = model.graph.sparse_initializer.add(dims=[10**6])
        sparse.values.CopyFrom(outside(f"s{number}", [10**6]))
        sparse.indices.CopyFrom(outside(f"i{number}", [10**6]))
        sparse.indices.data_type = 7
        sparse.indices.external_data[2].value = "8000000"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFile, match=r"'s\d'.* each byte of a data file in one tensor"):
        load_one(path)
    del model.graph.sparse_initializer[1:]
    path.write_bytes(model.SerializeToString())
    assert load_one(path).weights[0].n_bytes == 12_000_000


def test_nodes_of_thousands_of_inputs_and_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tieaudit.formats.onnx.read._N_MOST_PAIRS", 9999)
    for n, refused in ((99, False), (100, True)):
        path = save(tmp_path / "m.onnx", [node("Split", ["w"] * n, [f"y{i}" for i in range(n)])], [tensor("w", 2)])
        if refused:
            with pytest.raises(CorruptFile, match="few inputs and outputs"):
                load_one(path)
        else:
            assert load_one(path).weights
