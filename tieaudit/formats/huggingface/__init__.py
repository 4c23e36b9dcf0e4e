"""A Hugging Face folder: config.json and safetensors weights as one model, with the ties that its class makes."""

from tieaudit.formats import Format
from tieaudit.formats.huggingface.folder import group, owns
from tieaudit.formats.huggingface.read import load
from tieaudit.formats.huggingface.realise import can_realise, switch
from tieaudit.formats.huggingface.write import edit

huggingface = Format(
    name="huggingface",
    summary="Hugging Face folders: config.json with safetensors weights, as transformers loads them",
    targets=("transformers-5", "transformers-4"),
    owns=owns,
    group=group,
    load=load,
    can_realise=can_realise,
    edit=edit,
    switch=switch,
    precedence=20,
)

__all__ = ["huggingface", "switch"]
