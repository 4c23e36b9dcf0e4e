"""The generated model of the benchmarks: `python benchmarks/chain.py PATH MEGABYTES`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

SIDE = 1024
"""The generated matrices are SIDE × SIDE float32: 4 MiB each, all of one shape, the hardest case for a search."""
MATRIX_BYTES = SIDE * SIDE * 4


def generate(path: Path, n_megabytes: int) -> None:
    """A chain of MatMuls over different matrices, the last one a transposed copy of the first."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    n_matrices = max(2, n_megabytes * 1024 * 1024 // MATRIX_BYTES)
    generator = np.random.Generator(np.random.PCG64(0))
    first = generator.random((SIDE, SIDE), np.float32)
    matrices = [first, *(generator.random((SIDE, SIDE), np.float32) for _ in range(n_matrices - 2)), first.T.copy()]
    weights = [numpy_helper.from_array(matrix, f"w{index}") for index, matrix in enumerate(matrices)]
    nodes = [
        helper.make_node("MatMul", [f"x{index}" if index else "x", f"w{index}"], [f"x{index + 1}"], f"matmul{index}")
        for index in range(n_matrices)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIDE])
    y = helper.make_tensor_value_info(f"x{n_matrices}", TensorProto.FLOAT, ["batch", SIDE])
    graph = helper.make_graph(nodes, "chain", [x], [y], initializer=weights)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data")


if __name__ == "__main__":
    generate(Path(sys.argv[1]), int(sys.argv[2]))
