"""`pytorch_model.bin` and its shards as a checkpoint, so that everything that is known of a folder works on them too.

transformers loads them through `torch.load(weights_only=True)`, only where there are no safetensors, and with PyTorch
2.6 or newer; ties are then made by the class as for safetensors. Source: transformers 5.23, modeling_utils.py
`load_state_dict` and utils/import_utils.py `check_torch_load_is_safe`.
"""

from __future__ import annotations

from pathlib import Path

from tieaudit.formats.safetensors.header import Entry, Header
from tieaudit.formats.safetensors.sharded import Checkpoint, read_checkpoint
from tieaudit.formats.torch_checkpoint.discover import INDEX_SUFFIX
from tieaudit.formats.torch_checkpoint.read import read

WHAT = "pickled"


def read_weights(main: Path) -> tuple[Checkpoint, dict[str, str], tuple[str, ...]]:
    """The checkpoint of a folder, and for a pickled one what its loader says: facts and notes."""
    if not main.name.endswith((".bin", INDEX_SUFFIX)):
        return read_checkpoint(main), {}, ()
    pickled = read(main)
    headers: dict[str, Header] = {}
    entries: dict[str, tuple[str, Entry]] = {}
    for file, weights in pickled.by_file.items():
        held = tuple(Entry(one.name, one.dtype, one.shape, one.storage) for one in weights if one.storage is not None)
        headers[file.name] = Header(str(file), held, {})
        entries.update((entry.name, (file.name, entry)) for entry in held)
    return Checkpoint(main, headers, entries), {"weights": WHAT, **pickled.metadata}, pickled.notes
