"""Which files are ONNX models, and which of them are parts of one export.

Several files of one folder are one model only if a `genai_config.json` names them, if their stems are known parts of
one export (`encoder_model`, `decoder_with_past_model`, `joiner` … with a common name and variant), or if they share
external data. Variants (`_fp16`, `_quantized`, `_merged` …) are alternatives: models of their own.

Sources of the part names: optimum/exporters/onnx (ONNX_*_NAME in optimum/onnxruntime/constants.py), transformers.js
src/models.js (session names), sherpa-onnx docs (encoder, decoder, joiner; `<name>-encoder`), onnxruntime-genai
genai_config.json, moonshine, Olive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from tieaudit.formats.onnx.wire import Malformed, skeleton
from tieaudit.model import classes

_VARIANTS = (
    "fp32 fp16 bf16 f16 half int8 uint8 int4 uint4 q4 q4f16 q8 q2 q2f16 q1 q1f16 bnb4 quantized quantised quant qdq "
    "optimized optimised opt o1 o2 o3 o4 sim simplified slim"
).split()
_VARIANT = re.compile(rf"(?:[._-](?:{'|'.join(_VARIANTS)}))+$", re.IGNORECASE)
_PARTS = (
    "encoder_model decoder_model decoder_with_past_model decoder_model_merged encoder decoder decoder_with_past "
    "decoder_init init_decoder decoder_merged decoder_joint decoder_iter joiner predictor ctc embed_tokens "
    "text_embeddings embedding embeddings vision_encoder audio_encoder speech_encoder text_encoder text_encoder_2 "
    "vision_model text_model audio_model language_model lm_head vision text speech audio prepare_inputs_embeds "
    "prompt_encoder_mask_decoder mask_decoder image_encoder prompt_encoder vae_encoder vae_decoder "
    "preprocess encode uncached_decode cached_decode decoder_postnet_and_vocoder encoder_decode_init "
    "conditional_decoder speech_decoder text_decoder image_decoder encodec_decode decoder_model_init "
    "lm_encoder lm_decoder"
).split()
_MERGED = {
    "decoder_model_merged": ("decoder_model", "decoder_with_past_model"),
    "decoder_merged": ("decoder", "decoder_with_past"),
}
_DOCUMENTS = frozenset(
    ".json .txt .md .py .yaml .yml .toml .csv .tsv .png .jpg .jpeg .gif .pdf .html .cfg .ini .sh .pb .npz .npy "
    ".model .safetensors .vocab .gitignore .gitattributes .lock .log .js .ts".split()
)
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
_N_MOST_BYTES_MANIFEST = 1 << 20


@cache
def _with_name() -> list[tuple[str, re.Pattern[str]]]:
    """The longest name that fits counts: `vision_encoder` is itself, not the encoder of something called vision."""
    return [
        (name, re.compile(rf"^(?:(.+?)[._-])?{name.replace('_', '[_-]')}(?:[._-](.+))?$", re.IGNORECASE))
        for name in sorted(_PARTS, key=len, reverse=True)
    ]


def owns(path: Path) -> bool:
    """Whether a path is an `.onnx` file, the data file of one, or a folder with `.onnx` files in it or in `onnx/`.

    The content is not looked at: a damaged model is still a model, and `load` says what is wrong with it.
    """
    if path.is_dir():
        return any(True for _ in _models_of(path))
    return _is_model(path) or _owner(path) is not None


def group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """Owned paths → (path of the model, its ONNX files), in the order of the paths.

    The path of a model of several parts is their folder. Files named one by one are grouped among themselves only.
    Cost: a directory listing; where data files lie beside several models, their graphs are read once.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files.update(dict.fromkeys(_models_of(path)))
        else:
            files[_owner(path) or path] = None
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    found = []
    for folder, members in folders.items():
        for parts in _grouped(folder, members):
            found.append((folder if len(parts) > 1 else parts[0], parts))
    return found


def _is_model(path: Path) -> bool:
    return path.suffix.lower() == ".onnx" and not path.is_dir()


def _models_of(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "onnx"):
        if place.is_dir():
            yield from sorted(
                (path for path in place.iterdir() if _is_model(path)), key=lambda path: (path.stem, path.name)
            )


def _owner(path: Path) -> Path | None:
    """The model beside a data file called `model.onnx_data` or `model.onnx.data`, or None."""
    head, dot, rest = path.name.partition(".onnx")
    owner = path.with_name(head + dot)
    return owner if head and rest and owner.is_file() else None


class _Name(NamedTuple):
    part: str
    """Known part of an export, or ''."""
    name: str
    """What is common to the parts of one export."""
    variant: str


@cache
def _parse(stem: str) -> _Name:
    variant = _VARIANT.search(stem)
    base = stem[: variant.start()] if variant else stem
    suffix = variant.group().lower().lstrip("._-") if variant else ""
    for part, pattern in _with_name():
        if found := pattern.match(base):
            return _Name(part, f"{found[1] or ''}|{found[2] or ''}", suffix)
    return _Name("", base, suffix)


def _grouped(folder: Path, files: list[Path]) -> list[tuple[Path, ...]]:
    """The files of one folder as models; a file belongs to exactly one."""
    together = [sorted(_named_by_manifest(folder, files))]
    taken = set(together[0])
    by_export: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        name = _parse(file.stem)
        if name.part and file not in taken:
            by_export.setdefault((name.name, name.variant), []).append(file)
    for members in by_export.values():
        parts = {_parse(file.stem).part for file in members}
        merged = [file for file in members if any(one in parts for one in _MERGED.get(_parse(file.stem).part, ()))]
        together.append([file for file in members if file not in merged])
    together.extend(_sharing_data(folder, files))
    joined = classes([str(file) for file in members] for members in together if len(members) > 1)
    of_file = {member: index for index, members in enumerate(joined) for member in members}
    found: dict[object, list[Path]] = {}
    for file in files:
        found.setdefault(of_file.get(str(file), file), []).append(file)
    return [tuple(members) for members in found.values()]


def _named_by_manifest(folder: Path, files: list[Path]) -> set[Path]:
    """Files that onnxruntime-genai's manifest names as parts of its model."""
    manifest = folder / "genai_config.json"
    try:
        if not manifest.is_file() or manifest.stat().st_size > _N_MOST_BYTES_MANIFEST:
            return set()
        text = manifest.read_text(encoding="utf-8")
        named: set[str] = set()

        def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
            named.update(value for _, value in pairs if isinstance(value, str))
            return dict(pairs)

        json.loads(text, object_pairs_hook=collect)
    except (OSError, ValueError, RecursionError):
        return set()
    return {file for file in files if file.name in named}


def _sharing_data(folder: Path, files: list[Path]) -> list[list[Path]]:
    if len(files) < 2 or not any(_may_hold_data(entry) for entry in folder.iterdir()):
        return []
    users: dict[str, list[Path]] = {}
    for file in files:
        for location in external_locations(file):
            users.setdefault(location, []).append(file)
    return [members for members in users.values() if len(members) > 1]


def _may_hold_data(entry: Path) -> bool:
    return entry.suffix.lower() not in _DOCUMENTS and entry.suffix.lower() != ".onnx" and not entry.name.startswith(".")


def external_locations(file: Path) -> set[str]:
    """Names of the external data files that an ONNX file mentions, without parsing its graph; empty if unreadable."""
    if not file.is_file():  # opening a pipe would wait for a writer
        return set()
    try:
        with file.open("rb", buffering=0) as stream:
            data = skeleton(stream, file.stat().st_size).data
    except (OSError, Malformed):
        return set()
    found = set()
    for match in _LOCATION.finditer(data):
        name = data[match.end() : match.end() + match.group(1)[0]]
        found.add(name.decode("utf-8", "replace"))
    return found


def alternative_of(files: Sequence[Path]) -> str | None:
    """The model that this one is another variant of, if that one lies beside it: its stem (for parts, its folder)."""
    file = files[0]
    name = _parse(file.stem)
    beside = _beside(file.parent, file.parent.stat().st_mtime_ns)
    if name.variant:
        for stem, other in beside.items():
            if other == name._replace(variant=""):
                return (
                    stem
                    if len(files) == 1
                    else ", ".join(
                        one
                        for one, parsed in beside.items()
                        if parsed.part and parsed == parsed._replace(name=name.name, variant="")
                    )
                )
    if len(files) == 1 and name.part in _MERGED:
        separate = [
            stem for stem, other in beside.items() if other.part in _MERGED[name.part] and other[1:] == name[1:]
        ]
        return ", ".join(separate) or None
    return None


def stands_for_folder(files: Sequence[Path]) -> bool:
    """Whether the model of several files is the plain one of its folder: no variant, and the only such one.

    A variant is known by its file also where it lies there alone: the plain one that joins it later is another model.
    """
    if _is_variant(files):
        return False
    folder, own = files[0].parent, {file.name for file in files}
    others = [file for file in _models_of(folder) if file.parent == folder and file.name not in own]
    if all(_parse(file.stem).variant for file in others):  # mostly so, and nothing has to be opened
        return True
    groups = _grouped(folder, [file for file in _models_of(folder) if file.parent == folder])
    plain = [one for one in groups if len(one) > 1 and not _is_variant(one)]
    return all(own.intersection(file.name for file in one) for one in plain)


def _is_variant(files: Sequence[Path]) -> bool:
    """Whether all files of a model are of one variant, by their names."""
    variants = {_parse(file.stem).variant for file in files}
    return len(variants) == 1 and "" not in variants


@lru_cache(maxsize=4)
def _beside(folder: Path, changed_ns: int) -> dict[str, _Name]:
    """Stem → name of every model of a folder. Kept while the folder does not change: each of thousands asks."""
    return {path.stem: _parse(path.stem) for path in _models_of(folder) if path.parent == folder}


def not_a_model(file: Path) -> str | None:
    """What a file is if it is plainly no ONNX model, as the end of a sentence that begins with *found*; else None.

    Reads its first KiB. Raises OSError.
    """
    if not file.is_file():
        return "no file" if not file.exists() else "something that is not a file"
    with file.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        return f"a git-LFS pointer ({size.group(1).decode() if size else '?'} bytes elsewhere): run git lfs pull"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")):
        return "an HTML page, perhaps an error page saved under this name; download the file again"
    for magic, what in _MAGIC:
        if head[: len(magic)] == magic:
            return what
    if head[4:8] == b"ORTM":
        return "a model in ONNX Runtime's own ORT format; use the .onnx file that it was made from"
    if head.isascii() and not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head):
        first = head.split(b"\n")[0][:60].decode("ascii").strip()
        return f"text, beginning {first!r}"
    return None


_MAGIC = (
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x7fELF", "a program"),
)
