"""ONNX Runtime, CPU and CUDA: sessions under every setting that may not matter, and its own optimised model."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.machine import processor_name, repeated, resident_bytes
from tieaudit.runners import Answer, Array, Params, Port, Runner, Signature, Verb
from tieaudit.summing import ASIDE, PLACES, SCORED, TARGETS, Sums, packed, places, scores_among, token_losses

if TYPE_CHECKING:
    import onnxruntime as ort

_ONNX_NUMBERS = {
    "float": ("float32", 1), "uint8": ("uint8", 2), "int8": ("int8", 3), "uint16": ("uint16", 4),
    "int16": ("int16", 5), "int32": ("int32", 6), "int64": ("int64", 7), "string": ("string", 8),
    "bool": ("bool", 9), "float16": ("float16", 10), "double": ("float64", 11), "uint32": ("uint32", 12),
    "uint64": ("uint64", 13), "bfloat16": ("bfloat16", 16), "float8e4m3fn": ("float8_e4m3fn", 17),
    "float8e4m3fnuz": ("float8_e4m3fnuz", 18), "float8e5m2": ("float8_e5m2", 19),
    "float8e5m2fnuz": ("float8_e5m2fnuz", 20),
}  # fmt: skip
"""ONNX Runtime's spelling → (canonical name, TensorProto.DataType). Source: onnx.proto3, TensorProto.DataType."""
_CANONICAL = dict(_ONNX_NUMBERS.values())
_EXOTIC = frozenset(name for name in _CANONICAL if name.startswith(("bfloat", "float8")))
"""Types that numpy does not have and the Python binding therefore does not convert."""
_SMALL_BYTES = 1024


def _start(device: str) -> Mapping[str, Verb]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    onnxruntime.disable_telemetry_events()
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    sessions: dict[int, ort.InferenceSession] = {}
    growth: dict[int, int | None] = {}

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        before = resident_bytes()
        began = time.perf_counter()
        session = _session(params, device)
        seconds = time.perf_counter() - began
        after = resident_bytes()
        handle = max(sessions, default=0) + 1
        sessions[handle] = session
        growth[handle] = None if before is None or after is None else max(0, after - before)
        signature = Signature(_ports(session.get_inputs()), _ports(session.get_outputs()))
        facts = {"handle": handle, "signature": signature.to_json()}
        return {**facts, "n_bytes_grown": growth[handle], "seconds": seconds}, {}

    def run(params: Params, arrays: Mapping[str, Array]) -> Answer:
        return {}, _run(sessions[params["handle"]], arrays, params.get("outputs"))

    def time_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """At least `n_runs` runs, at least `seconds` long in sum, after one to warm up; arrays in, arrays out."""
        session, grown = sessions[params["handle"]], growth[params["handle"]]
        found = repeated(lambda: _run(session, arrays, None), params["n_runs"], float(params.get("seconds", 0.0)))
        facts = {
            "seconds": found.median,
            "each": list(found.seconds),
            "on": _hello({}, {})[0]["devices"].get(device, device),
        }
        known = device == "cpu" and grown is not None and found.n_bytes_peak is not None
        return {**facts, "n_bytes_peak": (grown or 0) + (found.n_bytes_peak or 0) if known else None}, {}

    def close(params: Params, arrays: Mapping[str, Array]) -> Answer:
        sessions.pop(params["handle"], None)
        return {}, {}

    verbs = {"hello": _hello, "open": open_, "run": run, "time": time_, "close": close}
    return {**verbs, "optimise": _optimise_on(device), **_calibration(sessions)}


def _calibration(sessions: Mapping[int, ort.InferenceSession]) -> Mapping[str, Verb]:
    """Verbs that add up what flows through values of a graph, and that give the loss of each token."""
    watched: dict[int, tuple[list[dict[str, Any]], dict[str, Sums]]] = {}

    def watch(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """Begin to add up at `sites`: {key, kind lookup | product, value, result, scores, n_rows}: names of outputs.

        Of a head what it gives and the scores that are made of it, else both empty."""
        watched[params["handle"]] = (list(params["sites"]), {one["key"]: Sums() for one in params["sites"]})
        return {"unfit": {}}, {}

    def calibrate(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """One more batch through what is watched. There are no gradients: ONNX Runtime computes none."""
        sites, sums = watched[params["handle"]]
        session, feed = sessions[params["handle"]], {name: one for name, one in arrays.items() if name not in ASIDE}
        wanted = dict.fromkeys(name for one in sites for name in (one["value"], one["result"], one["scores"]) if name)
        shown, scored = arrays.get(PLACES), arrays.get(SCORED)
        found = {**feed, **_run(session, feed, [name for name in wanted if name not in feed])}
        for one in sites:
            if one["kind"] == "lookup":
                ids = found[one["value"]]
                sums[one["key"]].add_ids(ids, one["n_rows"], places(ids.shape, shown))
                continue
            x = found[one["value"]]
            kept = places(x.shape[:-1], scored if one["scores"] else shown)
            sums[one["key"]].add_inputs(x, kept)
            if one["scores"]:
                sums[one["key"]].add_scores(found[one["result"]], found[one["scores"]], kept)
        return {}, {}

    def calibrated(params: Params, arrays: Mapping[str, Array]) -> Answer:
        facts, found = packed(watched.pop(params["handle"])[1])
        return {**facts, "unfit": {}}, found

    def losses(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """−log p of every target, in nats and in order."""
        feed = {name: one for name, one in arrays.items() if name != TARGETS}
        outputs = _run(sessions[params["handle"]], feed, params.get("outputs"))
        scores = outputs[scores_among(outputs, arrays[TARGETS])]
        return {}, {"losses": token_losses(scores, arrays[TARGETS])}

    return {"watch": watch, "calibrate": calibrate, "calibrated": calibrated, "losses": losses}


def _hello(params: Params, arrays: Mapping[str, Array]) -> Answer:
    import onnxruntime

    devices = {"cpu": processor_name()}
    graphics = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and (graphics or Path("/dev/nvidia0").exists()):
        lines = graphics[0].read_text(errors="replace").splitlines() if graphics else []
        devices["cuda"] = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")), "CUDA")
    return {"versions": {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}, "devices": devices}, {}


def _session(params: Params, device: str) -> ort.InferenceSession:
    """`params`: path; threads (0: the runtime's choice); level all | extended | basic | disable; prepack."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(params.get("threads", 0))
    level = str(params.get("level", "all")).upper()
    names = {"DISABLE": "ORT_DISABLE_ALL", "BASIC": "ORT_ENABLE_BASIC", "EXTENDED": "ORT_ENABLE_EXTENDED"}
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, names.get(level, "ORT_ENABLE_ALL"))
    if not params.get("prepack", True):
        options.add_session_config_entry("session.disable_prepacking", "1")
    if params.get("optimised"):
        target = Path(params["optimised"])
        options.optimized_model_filepath = str(target)
        entry = "session.optimized_model_external_initializers_"
        # a serialised protobuf ends at 2 GiB, so the weights go beside it
        options.add_session_config_entry(entry + "file_name", target.name + ".data")
        options.add_session_config_entry(entry + "min_size_in_bytes", str(_SMALL_BYTES))
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        # TensorFloat-32 rounds matrix products to 10 bits: not the arithmetic that is being compared
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    session = onnxruntime.InferenceSession(params["path"], options, providers=providers)
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("the CUDA provider could not be started; ONNX Runtime fell back to the CPU")
    return session


def _ports(args: list[Any]) -> tuple[Port, ...]:
    found = []
    for arg in args:
        kind = arg.type.removeprefix("tensor(").removesuffix(")") if arg.type.startswith("tensor(") else ""
        dims = tuple(d if isinstance(d, (int, str)) and d != "" else None for d in arg.shape or ())
        found.append(Port(arg.name, _ONNX_NUMBERS.get(kind, ("", 0))[0], dims))
    return tuple(found)


def _run(session: ort.InferenceSession, arrays: Mapping[str, Array], wanted: list[str] | None) -> dict[str, Array]:
    taken = {arg.name: arg.type for arg in session.get_inputs()}
    kinds = {arg.name: arg.type for arg in session.get_outputs()}
    names = list(kinds) if wanted is None else wanted
    if not names:
        return {}
    exotic = [array.dtype.name for array in arrays.values() if array.dtype.name in _EXOTIC]
    plain = all(
        kinds[name][7:-1] in _ONNX_NUMBERS and _ONNX_NUMBERS[kinds[name][7:-1]][0] not in _EXOTIC for name in names
    )
    feed = {name: array for name, array in arrays.items() if name in taken}
    if not exotic and (plain or not all(kinds[name].startswith("tensor(") for name in names)):
        values = session.run(names, feed)
        return _flat(dict(zip(names, values, strict=True)))
    results = session.run_with_ort_values(names, {name: _value(array) for name, array in feed.items()})
    return {name: _array(result) for name, result in zip(names, results, strict=True)}


def _value(array: Array) -> ort.OrtValue:
    import onnxruntime

    array = np.ascontiguousarray(array)
    if array.dtype.name not in _EXOTIC:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = array.view(f"uint{array.dtype.itemsize * 8}")
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _CANONICAL[array.dtype.name])


def _array(value: ort.OrtValue) -> Array:
    from tieaudit.dtypes import dtype

    kind = _ONNX_NUMBERS[value.data_type()[7:-1]][0]
    if kind not in _EXOTIC:
        return np.asarray(value.numpy())
    import ctypes

    # the binding has no conversion for these types; the bytes are there all the same
    size = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, dtype(kind).numpy()).reshape(value.shape())


def _flat(values: Mapping[str, Any]) -> dict[str, Array]:
    """Sequences and maps taken apart into arrays `name[i]`, `name{key}`."""
    found: dict[str, Array] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found.update(_flat({f"{name}[{index}]": item for index, item in enumerate(value)}))
        elif isinstance(value, dict):
            found.update(_flat({f"{name}{{{key}}}": item for key, item in sorted(value.items(), key=str)}))
        elif value is not None:
            array = np.asarray(value)
            found[name] = array.astype(str) if array.dtype.kind == "O" else array
    return found


def _optimise_on(device: str) -> Verb:
    def optimise(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """`params`: path, to (a folder), watch: {id: [path, offset, n_bytes, dtype, shape]}.

        What ONNX Runtime really runs at its highest level: bytes, operations, and for each watched weight how many
        of its tensors hold it, as stored or transposed, in [its own type, a wider one].
        """
        target = Path(params["to"]) / "optimised.onnx"
        _session({"path": params["path"], "optimised": str(target)}, device)
        data = target.with_name(target.name + ".data")
        n_bytes = target.stat().st_size + (data.stat().st_size if data.exists() else 0)
        operations, copies = _look_at(target, params.get("watch", {}))
        return {"n_bytes": n_bytes, "operations": operations, "copies": copies}, {}

    return optimise


def _look_at(path: Path, watch: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, list[int]]]:
    import onnx

    from tieaudit.dtypes import dtype

    model = onnx.load(str(path), load_external_data=False)
    operations: Counter[str] = Counter()
    wanted: dict[str, tuple[str, set[str]]] = {}
    for id, (file, offset, n_bytes, kind, shape) in watch.items():
        with open(file, "rb") as stream:
            stream.seek(offset)
            array = np.frombuffer(stream.read(n_bytes), dtype(kind).numpy()).reshape(shape)
        wanted[id] = (array.dtype.name, _prints(array))
    n_elements = {int(np.prod(entry[4])) for entry in watch.values()}
    copies = {id: [0, 0] for id in watch}
    for graph in _graphs(model.graph):
        operations.update(node.op_type for node in graph.node)
        for tensor in graph.initializer:
            if int(np.prod(tensor.dims)) not in n_elements:
                continue
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            array = onnx.numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            prints = _prints(array)
            for id, (kind, known) in wanted.items():
                copies[id][array.dtype.name != kind] += bool(prints & known)
    return dict(operations), copies


def _prints(array: Array) -> set[str]:
    """Digests of the values, as stored and transposed, so that layout and a widening cast do not matter."""
    array = np.squeeze(array)
    wide = array.astype(np.float32) if array.dtype.kind in "fV" and array.dtype.itemsize < 4 else array
    turned = wide.T if wide.ndim == 2 else wide
    return {hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for one in (wide, turned)}


def _graphs(graph: Any) -> list[Any]:
    found, queue = [], [graph]
    while queue:
        one = queue.pop()
        found.append(one)
        for node in one.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    queue.append(attribute.g)
                queue.extend(attribute.graphs)
    return found


RUNNER = Runner(
    name="onnxruntime",
    title="ONNX Runtime",
    formats=("onnx",),
    packages=("onnxruntime", "onnx"),
    extra="onnxruntime",
    start=_start,
)
