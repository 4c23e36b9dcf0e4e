"""Which folder is a Hugging Face model, which of its files are the weights, and which are alternatives to them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieaudit.errors import CorruptFile, UnreadableModel, WeightsNotHere
from tieaudit.formats.safetensors.sharded import INDEX_SUFFIX, read_index
from tieaudit.formats.torch_checkpoint.discover import INDEX_SUFFIX as PICKLED_INDEX
from tieaudit.pointers import DVC, elsewhere

CONFIG = "config.json"
MAX_CONFIG_BYTES = 32_000_000
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_PREFERRED = ("model.safetensors", "model" + INDEX_SUFFIX, "diffusion_pytorch_model.safetensors")
_PICKLED = re.compile(
    r"^(pytorch_model.*\.bin|pytorch_model.*\.bin\.index\.json|tf_model.*\.h5|flax_model.*\.msgpack)$"
)
_READ_PICKLED = ("pytorch_model.bin", "pytorch_model" + PICKLED_INDEX, "diffusion_pytorch_model.bin")
"""Pickled weights that are read where a folder has no others, in the order in which transformers looks for them."""
_OTHER_WEIGHTS = (".onnx", ".gguf", ".pt2")


def owns(path: Path) -> bool:
    """A folder with config.json and weights that are this format's; or config.json, index or shard inside one."""
    if path.is_dir():
        return _is_model_folder(path)
    if path.name.endswith((".safetensors", INDEX_SUFFIX)):  # no listing: a folder may hold thousands of them
        return (path.parent / CONFIG).is_file() and (os.path.lexists(path) or _is_model_folder(path.parent))
    return (path.name == CONFIG or bool(_PICKLED.match(path.name))) and _is_model_folder(path.parent)


def _is_model_folder(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    names = [entry.name.removesuffix(DVC) for entry in folder.iterdir()]
    if any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in names):
        return True
    # weights that only transformers could read: owned, so that the user is told what to do about them
    return any(_PICKLED.match(name) for name in names) and not any(name.endswith(_OTHER_WEIGHTS) for name in names)


def group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """Every owned path means its folder."""
    found: dict[Path, tuple[Path, ...]] = {}
    for path in paths:
        folder = path if path.is_dir() else path.parent
        if folder not in found:
            found[folder] = weight_set(folder).files if has_weights(folder) else (folder / CONFIG,)
    return list(found.items())


def has_weights(folder: Path) -> bool:
    """Whether weights that are read lie in a folder."""
    names = (entry.name.removesuffix(DVC) for entry in folder.iterdir())
    return any(name.endswith((".safetensors", INDEX_SUFFIX)) or name in _READ_PICKLED for name in names)


@dataclass(frozen=True)
class WeightSet:
    """The weights of a folder: the set that is loaded by default, and the sets beside it."""

    main: Path
    """A safetensors file, a pickle or an index; it and its shards may be elsewhere (see `pointers.py`)."""
    files: tuple[Path, ...]
    """config.json first, then `main`, then its shards."""
    others: tuple[str, ...]
    """File names of alternatives: other precisions, other formats. Not loaded, never counted as waste."""


def weight_set(folder: Path) -> WeightSet:
    """The default weights of a folder. UnreadableModel if there are none that can be read."""
    names = _names(folder)
    tensors = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not tensors and not indices:
        return _pickled_set(folder, names)
    main = next((name for name in _PREFERRED if name in tensors or name in indices), None)
    if main is None:
        lone = [name for name in tensors if not _SHARD.search(name) and name != "adapter_model.safetensors"]
        main = next(iter([*indices, *lone, *tensors]))
        if shard := _SHARD.search(main):
            index = main[: shard.start()] + INDEX_SUFFIX
            raise CorruptFile(
                f"{folder / main}: expected the index {index} beside the shard, found none",
                hint="the download is incomplete",
            )
    shards: tuple[str, ...] = ()
    if main in indices and elsewhere(folder / main) is None:
        shards = tuple(dict.fromkeys(read_index(folder / main).values()))
    used = {main, *shards}
    others = tuple(n for n in names if n not in used and (n in tensors or n in indices or _PICKLED.match(n)))
    return WeightSet(folder / main, tuple(folder / n for n in (CONFIG, main, *shards)), others)


def _pickled_set(folder: Path, names: Sequence[str]) -> WeightSet:
    """The weights of a folder without safetensors, as transformers chooses them."""
    main = next((name for name in _READ_PICKLED if name in names), None)
    pickled = [name for name in names if _PICKLED.match(name)]
    if main is not None:
        whole = main.endswith(PICKLED_INDEX) and elsewhere(folder / main) is None
        shards = tuple(dict.fromkeys(read_index(folder / main).values())) if whole else ()
        others = tuple(name for name in pickled if name not in (main, *shards))
        return WeightSet(folder / main, tuple(folder / name for name in (CONFIG, main, *shards)), others)
    if pickled:
        raise UnreadableModel(
            f"{folder}: expected safetensors or pytorch_model.bin, found only {', '.join(pickled[:3])}",
            hint="convert with `AutoModel.from_pretrained(folder).save_pretrained(out)`",
        )
    raise UnreadableModel(f"{folder}: a config.json without weights", hint="download the safetensors files too")


def _names(folder: Path) -> list[str]:
    """Files of a folder, those among them that are elsewhere: links that lead nowhere, and what DVC keeps."""
    found: set[str] = set()
    for entry in folder.iterdir():
        if entry.is_file() or entry.is_symlink() and not entry.exists():
            kept = entry.name.removesuffix(DVC)
            found.update((entry.name, kept) if kept != entry.name and not (folder / kept).is_dir() else (entry.name,))
    return sorted(found)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as an object. CorruptFile if it is none or unreasonably large."""
    path = folder / CONFIG
    if (away := elsewhere(path)) is not None:
        raise WeightsNotHere(f"{path}: {away.because}, the file itself is not here", hint=away.hint)
    n_bytes = path.stat().st_size
    if n_bytes > MAX_CONFIG_BYTES:
        raise CorruptFile(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, found {n_bytes}")
    text = path.read_bytes()
    try:  # as lenient as transformers itself: Mamba configurations spell out Infinity, which JSON does not have
        found = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise CorruptFile(f"{path}: JSON nested too deeply to be read safely") from None
    except ValueError as error:
        raise CorruptFile(f"{path}: expected JSON, found an error: {error}") from None
    if not isinstance(found, dict):
        raise CorruptFile(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def architecture_of(config: Mapping[str, Any]) -> str:
    """`architectures[0]`, or empty."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


__all__ = ["CONFIG", "WeightSet", "architecture_of", "group", "owns", "read_config", "weight_set"]
