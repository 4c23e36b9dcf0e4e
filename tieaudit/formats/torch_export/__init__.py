"""Exported PyTorch programs: archives of `torch.export.save` (.pt2), read and rewritten without PyTorch.

Nothing in such an archive is unpickled, evaluated or loaded. Source: torch/export/pt2_archive, version 2.13.
"""

from __future__ import annotations

from tieaudit.formats import Format, later

torch_export = Format(
    name="torch_export",
    summary="exported PyTorch programs (.pt2), read and rewritten without PyTorch",
    targets=("torch",),
    owns=later("tieaudit.formats.torch_export.discover:owns"),
    group=later("tieaudit.formats.torch_export.discover:group"),
    load=later("tieaudit.formats.torch_export.read:load"),
    load_key=later("tieaudit.formats.torch_export.read:load"),
    can_realise=later("tieaudit.formats.torch_export.realise:can_realise"),
    edit=later("tieaudit.formats.torch_export.write:edit"),
    pool=lambda model, id, n_groups: (
        "an exported program is fixed to the shapes it was traced with: pool the Hugging Face folder and export that, "
        "or pool the ONNX model"
    ),
    precedence=5,
)
