"""What is fuzzed: for each reader a check that no input may fail, a way to change inputs, and inputs to begin with.

A check returns for input that was read or refused in one line, and raises for anything else. It needs no fuzzer: the
tests run every input that once failed through the same check.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fuzz import boxes, checkpoints, onnx_oracle, pickles, records, seeds, texts
from fuzz.guard import Violation, folder, guarded
from tieaudit.errors import CorruptFile, TieAuditError
from tieaudit.model import Model
from tieaudit.printable import printable

DATA = bytes(range(64))
"""What lies beside an ONNX file under the name `m.data`."""
_OURS_ONLY = (
    "no JSON object",
    "expected unique names",
    "expected an object with dtype, shape and data_offsets, found [",
)
"""Refusals of a safetensors file that its library reads; see tieaudit/formats/safetensors/header.py."""


@dataclass(frozen=True)
class Target:
    """One reader under test."""

    name: str
    check: Callable[[bytes], None]
    mutated: Callable[[bytes, random.Random, int, Callable[[bytes], bytes]], bytes]
    """(input, random numbers, most bytes, a change of single bytes) → a new input."""
    seeds: Callable[[], Iterable[bytes]]
    n_most: int
    """Bytes of the longest input."""


def said_in_one_line(error: TieAuditError) -> str:
    """The message of an error as it is printed; Violation if it is no line or blames the machine for a small file."""
    message = printable(str(error), None)
    if "\n" in message or not message:
        raise Violation(f"expected one line, found {message!r}")
    if "more than fits into memory" in message or "a fault in tieaudit" in message:
        raise Violation(message)
    return message


def check_onnx(data: bytes) -> None:
    """Ours against the onnx library: names, shapes, types, bytes and uses."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    from tieaudit.formats.onnx.discover import external_locations
    from tieaudit.formats.onnx.limits import id_limits
    from tieaudit.formats.onnx.read import load, parse

    with folder() as home:
        path = home / "m.onnx"
        path.write_bytes(data)
        (home / "m.data").write_bytes(DATA)
        model, refused = None, ""
        with guarded(home):
            external_locations(path)
            id_limits(path)
            try:
                model = load(path, (path,))
            except CorruptFile as error:
                refused = said_in_one_line(error)
        try:
            expected = ModelProto.FromString(data)
        except DecodeError:
            if model is not None:
                raise Violation("read what the library refuses") from None
            return
        if model is None:
            if "is no protobuf message" in refused or "breaks off" in refused:
                raise Violation(f"refused what the library reads: {refused}")
            return
        _same_message(parse(path), expected, data)
        _same_model(model, expected)


def _same_message(found: Any, expected: Any, data: bytes) -> None:
    proto, source = found
    if source.skeleton is not None:
        _restore(proto, source.skeleton, data)
    if proto.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
        raise Violation("the walk over the records gave another message than the library")


def _restore(message: Any, skeleton: Any, data: bytes) -> None:
    """Put the bytes at the remembered places back where the tokens are."""
    from onnx import TensorProto

    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for item in value if kind.is_repeated else [value]:
                _restore(item, skeleton, data)
    if isinstance(message, TensorProto) and (place := skeleton.place(message.raw_data)):
        message.raw_data = data[place[0] : place[0] + place[1]]


def _same_model(model: Model, expected: Any) -> None:
    graphs = onnx_oracle.graphs(expected)
    held = onnx_oracle.tensors(graphs)
    ours = {(weight.scope, weight.name): weight for weight in model.weights}
    if ours.keys() != held.keys():
        raise Violation(f"weights differ: {sorted(ours.keys() ^ held.keys())[:3]}")
    for key, weight in ours.items():
        tensor = held[key]
        if tuple(tensor.dims) != weight.shape:
            raise Violation(f"{key}: shape {weight.shape}, the library has {list(tensor.dims)}")
        if hasattr(tensor, "data_type"):
            _same_tensor(key, weight, tensor)
    for use in model.uses:
        str(use.view), use.view.shape(model.by_id[use.weight].shape)
    if expected.functions:  # calls are followed into bodies, which the second reading does not do
        return
    scopes = {weight.id: (weight.scope, weight.name) for weight in model.weights}
    found = {(*scopes[use.weight], use.scope, use.op, use.node, use.slot) for use in model.uses}
    if found != (wanted := onnx_oracle.uses(graphs, set(held))):
        raise Violation(f"uses differ: {sorted(found ^ wanted)[:3]}")


def _same_tensor(key: object, weight: Any, tensor: Any) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    from tieaudit.dtypes import dtype

    stored = weight.storage.read_ranges([(0, weight.n_bytes)])[0]
    if len(stored) != weight.n_bytes:
        raise Violation(f"{key}: {len(stored)} bytes read of {weight.n_bytes}")
    if dtype(weight.dtype).item_bytes is None:
        return
    if tensor.data_location == 1:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        begin = int(entries.get("offset") or 0)
        wanted = DATA[begin : begin + weight.n_bytes]
    elif tensor.HasField("raw_data"):
        wanted = tensor.raw_data
    else:
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError):  # numbers that do not fit into their type
            return
        if array.dtype.kind in "fcV" and np.isnan(array.astype(np.complex128)).any():
            return  # the library quietens signalling NaNs
        if array.dtype != helper.tensor_dtype_to_np_dtype(tensor.data_type):
            raise Violation(f"{key}: {weight.dtype} against {array.dtype}")
        # the library's array of truth values may hold any byte that is not 0 for a true one
        wanted = (array.view(np.uint8) != 0).tobytes() if array.dtype == bool else array.tobytes()
    if stored != wanted:
        raise Violation(f"{key}: other bytes than the library's")


def check_safetensors(data: bytes) -> None:
    """Ours against the safetensors library: what is accepted, and every name, type, shape and byte."""
    import safetensors

    from tieaudit.formats.safetensors.header import SPELLINGS, read_header

    with folder() as home:
        path = home / "model.safetensors"
        path.write_bytes(data)
        header, refused = None, ""
        with guarded(home):
            try:
                header = read_header(path)
            except TieAuditError as error:
                refused = said_in_one_line(error)
        try:
            expected = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            if header is not None:
                raise Violation(f"read what the library refuses: {error}") from None
            return
        if header is None:
            if not any(reason in refused for reason in _OURS_ONLY):
                raise Violation(f"refused what the library reads: {refused}")
            return
        found = {entry.name: entry for entry in header.entries}
        if found.keys() != expected.keys():
            raise Violation(f"names differ: {sorted(found.keys() ^ expected.keys())[:3]}")
        for name, entry in found.items():
            wanted = expected[name]
            (stored,) = entry.storage.read_ranges([(0, entry.storage.n_bytes)])
            ours = (SPELLINGS[entry.dtype], list(entry.shape), stored)
            if ours != (wanted["dtype"], list(wanted["shape"]), bytes(wanted["data"])):
                raise Violation(f"tensor {name!r}: {ours[:2]} against {wanted['dtype']} {wanted['shape']}")
        with safetensors.safe_open(str(path), "np") as opened:
            if (opened.metadata() or {}) != dict(header.metadata):
                raise Violation("metadata differs")


def _linked(box: boxes.Box, home: Path) -> frozenset[str]:
    """Where links lead that a reader may follow: a cache of downloads is full of linked models, but not of data."""
    from tieaudit.formats.torch_checkpoint.discover import SUFFIXES

    endings = (".json", ".safetensors", ".onnx", *SUFFIXES)
    names = [name for kind, name, _ in box if kind == boxes.LINK and name.endswith(endings)]
    found = set()
    for name in names:
        with suppress(OSError, RuntimeError, ValueError):
            found.add(str((home / name).resolve()))
    return frozenset(found)


def check_folder(data: bytes) -> None:
    """A folder with config.json: what is stored is what index and shards say, read with the libraries."""
    from tieaudit.formats.huggingface import asking
    from tieaudit.load import locate

    box = boxes.unpack(data)
    # a class takes seconds to answer; the data files answer at once
    with patch.object(asking, "installed", lambda: False), folder() as home:
        boxes.lay_out(box, home)
        model = None
        with guarded(home, _linked(box, home)):
            try:
                sources, _ = locate([str(home)])
                loaded = [source.load() for source in sources if source.format.name in ("huggingface", "safetensors")]
                model = next((one for one in loaded if one.format == "huggingface"), None)
            except TieAuditError as error:
                said_in_one_line(error)
        if model is not None:
            _same_checkpoint(model)


def _same_checkpoint(model: Model) -> None:
    import safetensors

    from tieaudit.formats.safetensors.header import SPELLINGS

    files = [Path(path) for path in model.parts[0].paths]
    shards = [path for path in files if path.name.endswith(".safetensors")]
    index = next((path for path in files if path.name.endswith(".index.json")), None)
    expected: dict[str, tuple[str, list[int]]] = {}
    for shard in shards:
        with safetensors.safe_open(str(shard), "np") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                piece = opened.get_slice(name)
                expected[name] = (str(piece.get_dtype()), list(piece.get_shape()))
    found = {w.name: (SPELLINGS[w.dtype], list(w.shape)) for w in model.weights if not w.absent}
    if found != expected:
        raise Violation(f"stored tensors differ: {sorted(found.keys() ^ expected.keys())[:3]}")
    if index is not None and json.loads(index.read_bytes())["weight_map"].keys() != found.keys():
        raise Violation("the index names other tensors")


def check_scan(data: bytes) -> None:
    """The whole of `scan` and of planning on a folder of any files: every answer is printable text and valid JSON."""
    from tieaudit.formats.huggingface import asking
    from tieaudit.load import locate
    from tieaudit.plan import Choices
    from tieaudit.plan import plan as make_plan
    from tieaudit.scan import look, scan

    box = boxes.unpack(data)
    with patch.object(asking, "installed", lambda: False), folder() as home:
        boxes.lay_out(box, home)
        reports, subjects = [], []
        with guarded(home, _linked(box, home)):
            sources, errors = locate([str(home)])
            for source in sources:
                try:
                    model = source.load()
                    reports.append(scan(model))
                    subjects.append(look(model))
                except TieAuditError as error:
                    errors.append((str(source.path), said_in_one_line(error)))
            _check_printed(reports, errors)
            for subject in subjects:
                for scheme in ("dedup", "io", "untie", "declare"):
                    with suppress(TieAuditError):
                        make_plan(subject, Choices(schemes=(scheme,)))


def _check_printed(reports: list[Any], errors: list[tuple[str, str]]) -> None:
    from tieaudit.registry import discover
    from tieaudit.reports import ReportFormat

    renderers = discover("reports", ReportFormat)
    settings: dict[str, object] = {"width": 100, "color": False}
    for report in reports:
        if report.crashed:
            raise Violation(f"a rule crashed: {report.crashed[0]}")
    printed = renderers["text"].render(reports, errors, settings)
    odd = next((sign for sign in printed if not sign.isprintable() and sign != "\n"), None)
    if odd is not None:
        raise Violation(f"{odd!r} would reach the terminal")
    document = renderers["json"].render(reports, errors, {})
    if not document.isascii():
        raise Violation("the JSON is not plain ASCII")
    json.loads(document, parse_constant=lambda name: (_ for _ in ()).throw(Violation(f"{name} in the JSON")))


def check_checkpoint(data: bytes) -> None:
    """Ours against PyTorch: read or refused, nothing executed, and the tensors that it loads."""
    checkpoints.check(data, said_in_one_line)


def _mutated_onnx(data: bytes, rng: random.Random, n_most: int, bytewise: Callable[[bytes], bytes]) -> bytes:
    return bytewise(data)[:n_most] if rng.random() < 0.08 else records.mutated(data, rng, n_most)


def _mutated_safetensors(data: bytes, rng: random.Random, n_most: int, bytewise: Callable[[bytes], bytes]) -> bytes:
    return bytewise(data)[:n_most] if rng.random() < 0.1 else texts.mutated_safetensors(data, rng, n_most)


TARGETS = {
    target.name: target
    for target in (
        Target("onnx", check_onnx, _mutated_onnx, seeds.onnx_files, 1 << 15),
        Target("safetensors", check_safetensors, _mutated_safetensors, seeds.safetensors_files, 1 << 13),
        Target("checkpoint", check_checkpoint, pickles.mutated_checkpoint, checkpoints.seeds, 1 << 14),
        Target("folder", check_folder, boxes.mutated_box, seeds.folders, 1 << 14),
        Target("scan", check_scan, boxes.mutated_box, seeds.everything, 1 << 15),
    )
}
