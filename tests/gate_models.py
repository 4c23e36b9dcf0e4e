"""Small models in files, for what the gate does with folders of them. Also work for processes, which import it."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tieaudit.toy import ramp

E, H = "model.embed_tokens.weight", "lm_head.weight"
W = ramp(64, 8)
"""64 · 8 · 4 = 2,048 bytes, over the threshold of 1,024."""
OTHER = ramp(64, 8, seed=1)


def save(path: Path, tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, written by hand: header length, header, bytes (huggingface/safetensors README, Format)."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, data = 0, []
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    return path


def folder(home: Path, tied: bool | None, head: NDArray[np.generic] | None) -> Path:
    """A Hugging Face folder of a tiny Llama whose configuration says `tied` (None: nothing) and that stores `head`."""
    tensors = {E: W} | ({H: head} if head is not None else {})
    save(home / "model.safetensors", tensors, {"format": "pt"})
    config = {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such", "vocab_size": 64, "hidden_size": 8}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (home / "config.json").write_text(json.dumps(config, indent=2))
    return home


def old(*paths: Path, seconds: float = 3600) -> None:
    """Give files times that lie behind: what has just changed may change again."""
    before = time.time() - seconds
    for path in paths:
        os.utime(path, (before, before))


def double(number: int) -> int:
    """Work for a process; of 13 a process ends without an answer."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def slow(number: int) -> int:
    """Work that takes long."""
    time.sleep(30)
    return number
