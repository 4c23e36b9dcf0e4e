"""A Hugging Face folder: config.json and its weights as one model, with the ties that its class makes."""

from __future__ import annotations

from tieaudit.formats import Format, later

huggingface = Format(
    name="huggingface",
    summary="Hugging Face folders: config.json with safetensors or pytorch_model.bin",
    targets=("transformers-5", "transformers-4"),
    owns=later("tieaudit.formats.huggingface.folder:owns"),
    group=later("tieaudit.formats.huggingface.folder:group"),
    load=later("tieaudit.formats.huggingface.read:load"),
    can_realise=later("tieaudit.formats.huggingface.realise:can_realise"),
    edit=later("tieaudit.formats.huggingface.write:edit"),
    can_create=later("tieaudit.formats.huggingface.create:can_create"),
    create=later("tieaudit.formats.huggingface.create:create"),
    switch=later("tieaudit.formats.huggingface.realise:switch"),
    pool=later("tieaudit.formats.huggingface.pool:plan_of"),
    equalises=True,
    gain=later("tieaudit.formats.huggingface.gain:gain_of"),
    loads_without_weights=True,
    held_by=later("tieaudit.formats.huggingface.realise:held_by"),
    precedence=20,
)
