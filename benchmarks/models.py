"""The generated models of the benchmarks: deterministic, streamed to disk, never committed.

    python benchmarks/models.py --list
    python benchmarks/models.py tied_external checkpoint_90k       # into benchmarks/built/<name>/

Each model is a folder that appears under its name only when it is complete. Building one needs little memory: at most
one matrix, and that only where a transposed copy of it has to be written.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import checkpoint  # noqa: E402 - runs as a script, from any folder
from benchmarks.spelling import write_external, write_inline, write_safetensors  # noqa: E402

BUILT = ROOT / "benchmarks" / "built"
FORMAT_VERSION = "2"
"""Counted up when the contents of a model change: folders built by an older script are built again."""

VOCABULARY, HIDDEN, INNER = 32_000, 1024, 2048
N_LAYERS, N_PER_LAYER = 16, 6
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Matrix:
    """A float32 matrix (or vector) with contents of its own, or a copy of those of another one."""

    name: str
    shape: tuple[int, ...]
    seed: int
    """Matrices of one seed and shape hold the same bytes."""
    transposed: bool = False
    """Whether the contents are those of a matrix of the reversed shape, with its axes swapped."""

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * 4

    def blocks(self) -> Iterator[bytes]:
        """The contents in order: uniform, scaled so that a chain of products neither grows nor vanishes."""
        rows, columns = self.shape[::-1] if self.transposed else (1, *self.shape)[-2:]
        parts = _random_rows(self.seed, rows, columns)
        if not self.transposed:
            yield from (part.tobytes() for part in parts)
            return
        whole = np.empty((rows, columns), np.float32)
        begin = 0
        for part in parts:
            whole[begin : begin + len(part)] = part
            begin += len(part)
        step = max(BLOCK_ELEMENTS // rows, 1)
        for begin in range(0, columns, step):
            yield np.ascontiguousarray(whole[:, begin : begin + step].T).tobytes()


def _random_rows(seed: int, rows: int, columns: int) -> Iterator[NDArray[np.float32]]:
    generator = np.random.Generator(np.random.PCG64(seed))
    scale = np.float32((12 / min(rows, columns)) ** 0.5)
    step = max(BLOCK_ELEMENTS // columns, 1)
    for begin in range(0, rows, step):
        yield (generator.random((min(step, rows - begin), columns), np.float32) - np.float32(0.5)) * scale


def language_model(
    tied: bool, n_layers: int = N_LAYERS, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, inner: int = INNER
) -> list[Matrix]:
    """An embedding, `n_layers` × 6 matrices, a head; by default 98 tensors of 1.07 GB.

    `tied`: the head is the transposed copy of the embedding, and the last matrix of the first layer's shape a plain
    copy of the second layer's. Otherwise no two tensors are related.
    """
    found = [Matrix("embed.weight", (vocabulary, hidden), 1)]
    for layer in range(n_layers):
        for index in range(N_PER_LAYER):
            shape = (inner, hidden) if index % 2 else (hidden, inner)
            found.append(Matrix(f"layers.{layer}.{index}.weight", shape, 10 + layer * N_PER_LAYER + index))
    if tied:  # the same place of the second and of the last layer
        first, last = found[1 + N_PER_LAYER], found[1 + (n_layers - 1) * N_PER_LAYER]
        found[found.index(last)] = Matrix(last.name, last.shape, first.seed)
    found.append(Matrix("head.weight", (hidden, vocabulary), 1 if tied else 2, transposed=tied))
    return found


def llama(n_layers: int = 16, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, inner: int = 2816) -> list[Matrix]:
    """The tensors of a LlamaForCausalLM of 1.08 GB whose head is stored although it is tied."""
    found = [Matrix("model.embed_tokens.weight", (vocabulary, hidden), 1)]
    for layer in range(n_layers):
        shapes: list[tuple[str, tuple[int, ...]]] = [
            *((f"self_attn.{one}_proj", (hidden, hidden)) for one in "qkvo"),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ]
        for name, shape in shapes:
            found.append(Matrix(f"model.layers.{layer}.{name}.weight", shape, 10 + len(found)))
    return [*found, Matrix("model.norm.weight", (hidden,), 2), Matrix("lm_head.weight", (vocabulary, hidden), 1)]


def _llama_folder(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", llama())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def one_shape(n_tensors: int, side: int = 64) -> list[Matrix]:
    """`n_tensors` different square matrices: the hardest case for a search that begins with shapes."""
    return [Matrix(f"layers.{index}.weight", (side, side), 1000 + index) for index in range(n_tensors)]


def _many(folder: Path, n_models: int = 2_000) -> None:
    """Small models as a repository has them, in folders of fifty: safetensors and ONNX, every fifth with a copy."""
    for index in range(n_models):
        home = folder / f"{index // 50:03d}"
        home.mkdir(exist_ok=True)
        copy = 10 * index if index % 5 else 10 * index + 1
        matrices = [Matrix("a.weight", (128, 16), 10 * index + 1), Matrix("b.weight", (128, 16), copy)]
        if index % 2:
            write_safetensors(home / f"{index}.safetensors", matrices)
        else:
            write_inline(home / f"{index}.onnx", matrices)


Build = Callable[[Path], None]
Contents = Callable[[], Sequence[Matrix]]


def _external(contents: Contents) -> Build:
    return lambda folder: write_external(folder / "model.onnx", contents())


def _inline(contents: Contents) -> Build:
    return lambda folder: write_inline(folder / "model.onnx", contents())


def _safetensors(contents: Contents) -> Build:
    return lambda folder: write_safetensors(folder / "model.safetensors", contents())


def _checkpoint(n_tensors: int, shrink: int = 1) -> Build:
    return lambda folder: checkpoint.write(folder, checkpoint.layout(n_tensors, shrink))


SPELLINGS: dict[str, Callable[[Contents], Build]] = {
    "external": _external,
    "inline": _inline,
    "safetensors": _safetensors,
}
CONTENTS: dict[str, Contents] = {
    "tied": lambda: language_model(tied=True),
    "distinct": lambda: language_model(tied=False),
    "tenth": lambda: language_model(tied=True, vocabulary=10_000, hidden=320, inner=640),
    "small": lambda: one_shape(4, side=362),  # 2.1 MB
    "same_1k": lambda: one_shape(1_000),
    "same_3k": lambda: one_shape(3_000),
    "same_10k": lambda: one_shape(10_000),
}
MODELS: dict[str, Build] = {
    f"{contents}_{spelling}": spell(of)
    for contents, of in CONTENTS.items()
    for spelling, spell in SPELLINGS.items()
    if spelling != "external" or contents in ("tied", "distinct", "tenth")
} | {
    "folder_tied": _llama_folder,
    "folder_many": _many,
    "checkpoint_10k": _checkpoint(10_000),
    "checkpoint_30k": _checkpoint(30_000),
    "checkpoint_60k": _checkpoint(60_000),
    "checkpoint_90k": _checkpoint(90_000),
    "checkpoint_30k_bytes_over_16": _checkpoint(30_000, shrink=4),
    "checkpoint_30k_bytes_over_256": _checkpoint(30_000, shrink=16),
    "checkpoint_90k_bytes_over_16": _checkpoint(90_000, shrink=4),
}


def main_file(name: str) -> Path:
    """What a program is told to read: the file, or the folder of a checkpoint."""
    folder = BUILT / name
    if name.startswith(("checkpoint", "folder")):
        return folder
    return folder / ("model.safetensors" if name.endswith("safetensors") else "model.onnx")


def build(name: str) -> Path:
    """Build a model unless it is there; the path to read."""
    folder, stamp = BUILT / name, f"{FORMAT_VERSION}\n"
    marker = folder / ".complete"
    if not marker.is_file() or marker.read_text() != stamp:
        unfinished = BUILT / f".{name}.unfinished"
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        MODELS[name](unfinished)
        (unfinished / ".complete").write_text(stamp)
        unfinished.rename(folder)
    return main_file(name)


def n_bytes(name: str) -> int:
    """Bytes of weights, headers and graph as a program could read them; of a sparse file, its apparent size."""
    return sum(path.stat().st_size for path in (BUILT / name).iterdir() if path.name != ".complete")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to build; `all` for every one")
    parser.add_argument("--list", action="store_true", help="the names, with sizes of those that are built")
    options = parser.parse_args()
    names = list(MODELS) if options.names == ["all"] else options.names
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if options.list:
        for name in MODELS:
            print(f"{name:32}", json.dumps(n_bytes(name)) if main_file(name).exists() else "not built")
    for name in names:
        print(build(name))


if __name__ == "__main__":
    main()
