"""What a runner is given instead of a path: the pieces of a clean archive, and what the program takes and gives."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tieaudit.errors import UnreadableModel
from tieaudit.formats.torch_checkpoint.zipped import ZipWriter
from tieaudit.formats.torch_export.clean import Cleaner, path
from tieaudit.formats.torch_export.fields import Fields
from tieaudit.formats.torch_export.layout import CONSTANTS, SAMPLES, WEIGHTS, Layout, is_compiled
from tieaudit.formats.torch_export.lookups import LOOKUPS, Lookups
from tieaudit.formats.torch_export.payload import Payload
from tieaudit.formats.torch_export.program import Program, spec_of
from tieaudit.formats.torch_export.realise import opened
from tieaudit.storage import BLOCK_BYTES, FileStorage, Storage, blocks

_TOP = "archive/"
_FOLDERS = (WEIGHTS, CONSTANTS)


class Pieces:
    """The parts of a file that is never written: bytes, and ranges of other files. A `Target` of `ZipWriter`."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._pieces: list[bytearray | FileStorage] = []

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def write(self, data: bytes) -> None:
        if not self._pieces or not isinstance(self._pieces[-1], bytearray):
            self._pieces.append(bytearray())
        last = self._pieces[-1]
        assert isinstance(last, bytearray)
        last += data
        self.n_bytes += len(data)

    def copy(self, storage: Storage) -> int:
        begin = self.n_bytes
        if type(storage) is FileStorage and storage.n_bytes > BLOCK_BYTES // 64:
            self._pieces.append(storage)
            self.n_bytes += storage.n_bytes
        else:
            for block in blocks(storage):
                self.write(block)
        return begin

    def to_json(self) -> list[Any]:
        """Texts in base 64, and [path, offset, length]."""
        return [
            [one.path, one.offset, one.n_bytes] if isinstance(one, FileStorage) else base64.b64encode(one).decode()
            for one in self._pieces
        ]


def handed(file: Path, device: str) -> dict[str, Any]:
    """Parameters for the runner's `open`: `pieces`, `signature`, `arguments`, `outputs`.

    UnreadableModel with the reason for a program that is not run. Cost: reads the graph; weights stay where they are.
    """
    layout, program, payload = opened(file)
    refuse_what_unpickles(file, layout, payload)
    arguments = list(_arguments(program))
    names = output_names(program)
    cleaner = Cleaner(device)
    document = cleaner.document(program.json, len(arguments), len(names))
    pieces = Pieces()
    with ZipWriter(pieces, _TOP) as archive:
        for folder in _FOLDERS:
            archive.add(f"{folder}model_{folder.split('/')[1]}_config.json", _table(cleaner, payload, folder))
            for blob in dict.fromkeys(one.blob for one in payload.entries.values() if one.folder == folder):
                member = layout.archive.members[folder + blob]
                archive.add_full(_TOP + folder + blob, layout.archive.content(member), member.crc)
        archive.add("models/model.json", json.dumps(document).encode())
        archive.add(f"{SAMPLES}model.pt", b"")
        for name, content in (("archive_format", b"pt2"), ("archive_version", b"0"), (".data/version", b"6\n")):
            archive.add(name, content)
        archive.add("byteorder", b"little")
    return {
        "pieces": pieces.to_json(), "signature": _signature(program), "arguments": arguments, "outputs": names,
        "weights": {name: path(name, file.name) for name in payload.entries},
    }  # fmt: skip


def refuse_what_unpickles(file: Path, layout: Layout, payload: Payload) -> None:
    """UnreadableModel if an archive cannot be loaded without unpickling, or holds machine code."""
    for name, because in payload.left_out.items():
        raise UnreadableModel(f"{file}: {name[:200]} is {because.partition(';')[0]}, so the program is not run")
    if payload.pickled:
        raise UnreadableModel(f"{file}: its weights are pickled, as PyTorch before 2.9 wrote them, so it is not run")
    if is_compiled(layout.archive):
        raise UnreadableModel(f"{file}: it holds machine code beside the program, so it is not run")
    if len(layout.archive.members) and "byteorder" in layout.archive:
        if layout.archive.read("byteorder", 16).strip() != b"little":
            raise UnreadableModel(f"{file}: its numbers are big-endian, so it is not run here")


def _table(cleaner: Cleaner, payload: Payload, folder: str) -> bytes:
    rows: dict[str, Any] = {}
    for name, entry in payload.entries.items():
        if entry.folder == folder and entry.meta is not None:
            rows[path(name, entry.row.where)] = {
                "path_name": entry.blob, "is_param": entry.is_parameter, "use_pickle": False,
                "tensor_meta": cleaner.tensor(entry.meta),
            }  # fmt: skip
    return json.dumps({"config": rows}).encode()


def _arguments(program: Program) -> Iterator[dict[str, Any]]:
    """Positional arguments in order: {"name": …} of a tensor, or {"value": …} of a constant."""
    for spec in program.json.object("graph_module").object("signature").objects("input_specs"):
        tag, value = spec.union()
        held = Fields(value, spec.where)
        if tag == "user_input":
            kind, inside = held.object("arg").union()
            if kind == "as_tensor":
                yield {"name": Fields(inside, spec.where).text("name")}
            elif kind in ("as_none", "as_int", "as_float", "as_bool", "as_string"):
                yield {"value": None if kind == "as_none" else inside}
            else:
                raise UnreadableModel(f"{spec.where}: it takes {kind.removeprefix('as_')}, which is not made up here")
        elif tag == "constant_input":
            kind, inside = held.object("value").union()
            yield {"value": None if kind == "as_none" else inside}


def _signature(program: Program) -> dict[str, Any]:
    """The ports, as `Signature.to_json` writes them, with the number of valid ids and the ranges of free sizes."""
    limits = id_limits(program)
    ports = [
        {"name": one.name, "dtype": one.dtype, "dims": list(one.dims), "limit": limits.get(one.name)}
        for one in program.ports
    ]
    ranges = {symbol: list(limit) for symbol, limit in program.ranges.items()}
    return {"inputs": ports, "outputs": [], "ranges": ranges}


def id_limits(program: Program) -> dict[str, int]:
    """Input name → smallest number of rows among the tables that it indexes."""
    lookups = Lookups(program.flow, program.user_inputs)
    found: dict[str, int] = {}
    for call in program.flow.calls:
        if call.op in LOOKUPS:
            rows, inputs = lookups.indexed(call)
            for name in inputs if rows else ():
                found[name] = min(rows, found.get(name, rows))
    return found


def output_names(program: Program) -> list[str]:
    """Names of what the program gives, by the structure that its module returned: keys of dictionaries or indices."""
    signature = program.json.object("graph_module").object("signature")
    count = sum(spec.union()[0] in ("user_output", "loss_output") for spec in signature.objects("output_specs"))
    entries = program.json.object("graph_module").objects("module_call_graph")
    calling = entries[0].value.get("signature") if entries else None
    tree = spec_of(calling.get("out_spec")) if isinstance(calling, dict) else None
    if not isinstance(tree, list) or len(tree) != 2:
        return [str(index) for index in range(count)]
    names = [name or "0" for name in _leaves(tree[1], "", 0)]
    return names if len(names) == count == len(set(names)) else [str(index) for index in range(count)]


def _leaves(node: Any, name: str, depth: int) -> Iterator[str]:
    if not isinstance(node, dict) or depth > 20:
        return
    children = node.get("children_spec")
    if node.get("type") is None or not isinstance(children, list):
        yield name
        return
    context = spec_of(node.get("context"))
    keys = context if isinstance(context, list) and len(context) == len(children) else None
    named = keys is not None and all(isinstance(key, str) for key in keys)
    for index, child in enumerate(children):
        inner = str(keys[index]) if named and keys is not None else str(index)
        yield from _leaves(
            child, f"{name}[{inner}]" if name and not named else f"{name}.{inner}".lstrip("."), depth + 1
        )
