"""An exported program as a `Model`: weights from the archive's tables, uses from its graph. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tieaudit.formats.torch_export.fields import read_json
from tieaudit.formats.torch_export.flow import Value, uses_of
from tieaudit.formats.torch_export.layout import Layout, is_compiled, layout_of, whole_programs
from tieaudit.formats.torch_export.lookups import Lookups
from tieaudit.formats.torch_export.operations import operations_of
from tieaudit.formats.torch_export.payload import Payload, read_payload
from tieaudit.formats.torch_export.program import Program, read_program
from tieaudit.model import Model, Part, Use, Weight


def load(path: Path, files: tuple[Path, ...], key: str = "") -> Model:
    """One program of an archive. CorruptFile, UnreadableModel; UsageError for an unknown `key`.

    Cost: reads the directory, the tables and the graph; no tensor.
    """
    layout = layout_of(path, key)
    program = read_program(read_json(layout.archive, layout.program))
    payload = read_payload(path, layout)
    weights = tuple(_weights(program, payload))
    return Model(
        path=str(path),
        format="torch_export",
        parts=(Part("", (str(path),)),),
        weights=weights,
        uses=tuple(_uses(program, weights)),
        operations=operations_of(program, weights),
        metadata=dict(_metadata(layout, program, payload)),
        notes=tuple(_notes(layout, program, payload)),
        has_graph=True,
    )


_SAYS = {"parameter": "a parameter", "buffer": "a buffer", "tensor_constant": "a constant"}


def _weights(program: Program, payload: Payload) -> Iterator[Weight]:
    """In the order of the archive, with what the signature says they are."""
    sorts = {one.target: one.sort for one in program.placeholders if one.target}
    for name, weight in payload.weights.items():
        sort = sorts.get(name)
        if sort in _SAYS:
            weight = replace(weight, parameter=sort == "parameter", because=f"{_SAYS[sort]} in the program's signature")
        yield weight


def _uses(program: Program, weights: tuple[Weight, ...]) -> Iterator[Use]:
    lookups = Lookups(program.flow, program.user_inputs)
    values = program.weights
    for weight in weights:
        if weight.name in values:
            value = Value("", values[weight.name])
            yield from uses_of(program.flow, weight.id, value, weight.shape, weight.dtype, lookups)


def _metadata(layout: Layout, program: Program, payload: Payload) -> Iterator[tuple[str, str]]:
    yield "layout", "zip" if layout.name else "zip before PyTorch 2.8"
    if program.torch_version:
        yield "producer", f"PyTorch {program.torch_version}"
    if len(layout.names) > 1:
        yield "key", layout.name
        yield "beside", ", ".join(whole_programs(layout))
    if is_compiled(layout.archive):
        yield "compiled", "yes"
    if payload.pickled:
        yield "pickled", "yes"


def _notes(layout: Layout, program: Program, payload: Payload) -> Iterator[str]:
    yield from (f"{name}: {because}" for name, because in payload.left_out.items())
    known = payload.weights.keys() | payload.left_out.keys()
    for one in program.placeholders:
        if one.target and one.sort != "custom_obj" and one.target not in known:
            yield f"{one.target}: in the program's signature, but not stored"
    if is_compiled(layout.archive):
        yield "beside the program there is machine code of AOTInductor, which is not read and never loaded"
