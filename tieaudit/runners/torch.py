"""Folders of transformers models under PyTorch, CPU and CUDA.

Only classes of the installed library are run, never a folder's own code, and only safetensors are read, never a pickle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.class_inputs import class_inputs
from tieaudit.runners import Answer, Array, Params, Port, Runner, Signature, Verb

if TYPE_CHECKING:
    import torch

_SWITCHES = {"use_cache": False, "return_dict": True}


def _start(device: str) -> Mapping[str, Verb]:
    from tieaudit.torch_session import Session

    session = Session(device)
    import transformers

    transformers.logging.set_verbosity_error()

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        began = time.perf_counter()
        model, loading = _load(params["path"])
        handle, facts = session.hold(model, lambda given: ((), arguments_of(model, given)))
        seconds = time.perf_counter() - began
        signature = signature_of(model).to_json()
        told = {"loading": loading, "seconds": seconds, "n_positions": _n_positions(model)}
        return {"handle": handle, "signature": signature, **told, **facts}, {}

    return {**session.verbs(open_, ("torch", "transformers")), "tokenize": _tokenize}


def _n_positions(model: Any) -> int | None:
    """The longest text that the class says it takes; None where it does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return min((one for one in named if isinstance(one, int) and one > 0), default=None)


def _tokenize(params: Params, arrays: Mapping[str, Array]) -> Answer:
    """The ids of a text (`path`, its first `n_bytes`) by the tokenizer in `folder`, whose own code is never run.

    `first`: the token that it puts before every text, if it puts one there and nothing else.
    """
    import numpy as np
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        params["folder"], local_files_only=True, trust_remote_code=False
    )
    with open(params["path"], "rb") as file:
        raw = file.read(params["n_bytes"])
    # the last character may have been cut in two
    text = raw.decode("utf-8", "strict" if len(raw) < params["n_bytes"] else "ignore")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    around = tokenizer("")["input_ids"]
    first = around[0] if len(around) == 1 and around[0] == tokenizer.bos_token_id else None
    return {"n_tokens": len(tokenizer), "first": first}, {"ids": np.asarray(ids, np.int64)}


def _load(path: str) -> tuple[Any, dict[str, list[str]]]:
    """The class that config.json names, in the stored precision, and what its loader could not place."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    names = [name for name in getattr(config, "architectures", None) or [] if hasattr(transformers, name)]
    if not names and getattr(config, "architectures", None):
        raise RuntimeError(
            f"transformers {transformers.__version__} has no class {config.architectures[0]}, which config.json names"
        )
    cls = getattr(transformers, names[0]) if names else _class_without_name(config, path)
    torch.manual_seed(0)  # what the loader draws at random is then the same in both models
    # where there are safetensors nothing else; a .bin file is a pickle, which PyTorch's safe loader alone may read
    plain = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in os.listdir(path))
    how = {"use_safetensors": True} if plain else {"use_safetensors": False, "weights_only": True}
    model, loading = cls.from_pretrained(
        path, config=config, local_files_only=True, output_loading_info=True, **how, **_as_stored()
    )
    problems = {
        key: sorted(str(item) for item in loading.get(key, ()))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return model, problems


def _class_without_name(config: Any, path: str) -> Any:
    """For a config.json that names no class: the one whose own names cover most of the stored ones."""
    import torch
    from transformers.models.auto import modeling_auto as auto

    stored = _stored_names(path)
    best, most = None, -1
    for kind in ("PRETRAINING", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", ""):
        mapping = getattr(auto, f"MODEL_FOR_{kind}_MAPPING" if kind else "MODEL_MAPPING")
        if type(config) not in mapping:
            continue
        found = mapping[type(config)]
        cls = found[0] if isinstance(found, (tuple, list)) else found
        with torch.device("meta"):
            covered = len(stored & set(cls(config).state_dict()))
        if covered > most:  # on a tie the earlier kind, which has the head
            best, most = cls, covered
    if best is None:
        raise RuntimeError(f"transformers has no class for the model type {config.model_type}")
    return best


def _stored_names(path: str) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


def _as_stored() -> dict[str, str]:
    """The keyword for *keep the stored precision*: `torch_dtype` before transformers 4.56, `dtype` since."""
    import transformers

    version = tuple(int(piece) for piece in transformers.__version__.split(".")[:2])
    return {"dtype": "auto"} if version >= (4, 56) else {"torch_dtype": "auto"}


def signature_of(model: Any) -> Signature:
    """Inputs by the class's forward and main input, sizes by its configuration."""
    return Signature(tuple(Port(one.name, one.dtype, one.dims, one.limit) for one in class_inputs(model)), ())


def arguments_of(model: Any, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Keyword arguments for a transformers model: those that its class takes, without a cache."""
    import inspect

    taken = inspect.signature(model.forward).parameters
    feed = {name: _tensor(array, model) for name, array in arrays.items() if name in taken}
    return {**feed, **{name: value for name, value in _SWITCHES.items() if name in taken}}


def _tensor(array: Array, model: Any) -> torch.Tensor:
    import torch

    from tieaudit.nested import tensor_of

    tensor = tensor_of(array)
    if array.dtype.name == "bfloat16":
        return tensor
    if tensor.is_floating_point():
        return tensor.to(model.dtype)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


RUNNER = Runner(
    name="torch",
    title="transformers",
    formats=("huggingface",),
    packages=("torch", "transformers", "safetensors"),
    extra="transformers",
    start=_start,
)
