"""The ONNX format: one file, or several that are parts of one export.

Importing this package loads neither onnx nor numpy; everything happens inside the functions.
"""

from __future__ import annotations

from tieaudit.formats import Format, later

FORMAT = Format(
    name="onnx",
    summary="ONNX files: inline and external data, subgraphs, Constant nodes, several parts of one export.",
    targets=("ort-cpu", "ort-cuda"),
    owns=later("tieaudit.formats.onnx.discover:owns"),
    group=later("tieaudit.formats.onnx.discover:group"),
    load=later("tieaudit.formats.onnx.read:load"),
    can_realise=later("tieaudit.formats.onnx.edit:can_realise"),
    edit=later("tieaudit.formats.onnx.edit:edit"),
    pool=later("tieaudit.formats.onnx.pool:edits_of"),
    holds_adjustments=True,
    gain=later("tieaudit.formats.onnx.gain:gain_of"),
    data_names=later("tieaudit.formats.onnx.discover:external_locations"),
    has_parts=True,
    stands_for_folder=later("tieaudit.formats.onnx.discover:stands_for_folder"),
    sure_names=(".onnx",),
)
