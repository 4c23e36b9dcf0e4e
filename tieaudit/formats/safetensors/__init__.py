"""safetensors without a config.json beside it: a lone file, or shards with their index.

Such a file has no class that would restore a dropped tensor, so a scheme can only give names one value (`equal.py`); a
tie that a checkpoint or a module already has is carried over as `safetensors.torch.save_model` does (`create.py`).
Source of the format: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

from tieaudit.formats import Format, later

safetensors = Format(
    name="safetensors",
    summary="safetensors files, alone or sharded with an index (a tie becomes equal values: no class restores it)",
    targets=("safetensors",),
    owns=later("tieaudit.formats.safetensors.discover:owns"),
    group=later("tieaudit.formats.safetensors.discover:group"),
    load=later("tieaudit.formats.safetensors.weights:load"),
    can_realise=later("tieaudit.formats.safetensors.equal:can_realise"),
    edit=later("tieaudit.formats.safetensors.equal:edit"),
    pool=lambda model, id, n_groups: (
        "a lone safetensors file says nowhere how many heads there are, and whoever loads it builds a module of the "
        "old shapes: pool the Hugging Face folder, where config.json says it, or the ONNX model"
    ),
    equalises=True,
    held_by=later("tieaudit.formats.safetensors.equal:held_by"),
    can_create=later("tieaudit.formats.safetensors.create:can_create"),
    create=later("tieaudit.formats.safetensors.create:create"),
    has_program=False,
)
