"""Folders of transformers models under PyTorch, CPU and CUDA.

Only classes of the installed library are run, never a folder's own code, and only safetensors are read, never a pickle.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.class_inputs import class_inputs
from tieaudit.runners import Answer, Array, Params, Port, Runner, Signature, Verb, processor_name

if TYPE_CHECKING:
    import torch


def _start(device: str) -> Mapping[str, Verb]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = False  # not the arithmetic that is being compared
    torch.backends.cudnn.allow_tf32 = False
    n_threads = torch.get_num_threads()
    models: dict[int, Any] = {}
    kept: dict[int, list[tuple[Any, Any]]] = {}

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        began = time.perf_counter()
        model, loading = _load(params["path"], device)
        seconds = time.perf_counter() - began
        handle = max(models, default=0) + 1
        models[handle] = model
        facts = {"handle": handle, "signature": signature_of(model).to_json(), "loading": loading, "seconds": seconds}
        return {**facts, "n_bytes_grown": _held_bytes(model), "class": type(model).__name__}, {}

    def run(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """`threads`: 0 for the usual number; `split`: one row of the batch at a time."""
        torch.set_num_threads(int(params.get("threads", 0)) or n_threads)
        model = models[params["handle"]]
        if not params.get("split"):
            return {}, _run(model, arrays, device)
        n_rows = max((len(array) for array in arrays.values() if array.ndim), default=1)
        rows = [_run(model, _row(arrays, index, n_rows), device) for index in range(n_rows)]
        names = [name for name in rows[0] if all(row[name].ndim and len(row[name]) == 1 for row in rows)]
        return {}, {name: np.concatenate([row[name] for row in rows]) for name in names}

    def time_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        model, seconds = models[params["handle"]], []
        _run(model, arrays, device)
        for _ in range(params["n_runs"]):
            began = time.perf_counter()
            _run(model, arrays, device)
            seconds.append(time.perf_counter() - began)
        return {"seconds": statistics.median(seconds)}, {}

    def state(params: Params, arrays: Mapping[str, Array]) -> Answer:
        return _state(models[params["handle"]]), {}

    def perturb(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """Noise of four times their usual size on some `rows` (None: all) of the parameter `name`, until `restore`."""
        tensor = _parameter(models[params["handle"]], params["name"])
        kept.setdefault(params["handle"], []).append((tensor, tensor.detach().clone()))
        rows = range(len(tensor)) if params["rows"] is None else [row for row in params["rows"] if row < len(tensor)]
        with torch.no_grad():
            torch.manual_seed(0)
            size = max(float(tensor.float().square().mean().sqrt()), 0.25)
            noise = torch.randn((len(rows), *tensor.shape[1:]), device=tensor.device) * 4 * size
            tensor[list(rows)] += noise.to(tensor.dtype)
        return {}, {}

    def restore(params: Params, arrays: Mapping[str, Array]) -> Answer:
        with torch.no_grad():
            for tensor, value in reversed(kept.pop(params["handle"], [])):
                tensor.copy_(value)
        return {}, {}

    def close(params: Params, arrays: Mapping[str, Array]) -> Answer:
        models.pop(params["handle"], None)
        return {}, {}

    verbs: dict[str, Verb] = {"hello": _hello, "open": open_, "run": run, "time": time_, "close": close}
    return {**verbs, "state": state, "perturb": perturb, "restore": restore}


def _hello(params: Params, arrays: Mapping[str, Array]) -> Answer:
    import torch
    import transformers

    devices = {"cpu": processor_name()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name(0)
    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "devices": devices}, {}


def _load(path: str, device: str) -> tuple[Any, dict[str, list[str]]]:
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
    return model.eval().to(device), problems


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


def _run(model: Any, arrays: Mapping[str, Array], device: str) -> dict[str, Array]:
    import inspect

    import torch

    taken = inspect.signature(model.forward).parameters
    feed = {name: _tensor(array, model).to(device) for name, array in arrays.items() if name in taken}
    extra = {name: value for name, value in {"use_cache": False, "return_dict": True}.items() if name in taken}
    torch.manual_seed(0)
    with torch.inference_mode():
        result = model(**feed, **extra)
    items = result.items() if hasattr(result, "items") else enumerate([result])
    return {name: array for key, value in items for name, array in _flat(str(key), value)}


def _tensor(array: Array, model: Any) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    tensor = torch.from_numpy(np.array(array))
    if tensor.is_floating_point():
        return tensor.to(model.dtype)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _flat(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """Tensors inside a class's output; caches and other objects are no outputs."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield name, tensor.numpy()
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)


def _held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers in memory, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def _parameter(model: Any, name: str) -> Any:
    """A parameter or buffer by the name that the file gives it, which may lack or have a prefix."""
    found = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    near = [name] if name in found else [n for n in found if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if len(near) != 1:
        raise KeyError(f"the class {type(model).__name__} has no parameter {name}")
    return found[near[0]]


def _row(arrays: Mapping[str, Array], index: int, n_rows: int) -> dict[str, Array]:
    return {n: a[index : index + 1] if a.ndim and len(a) == n_rows else a for n, a in arrays.items()}


def _state(model: Any) -> dict[str, Any]:
    """sha256 of every parameter and saved buffer, and the groups of names that are one tensor in memory."""
    import torch

    digests: dict[str, str] = {}
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel():
            places.setdefault(place, []).append(name)
        if place not in seen or not tensor.numel():
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
            seen[place] = hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
        digests[name] = seen[place]
    return {"digests": digests, "tied": [names for names in places.values() if len(names) > 1]}


RUNNER = Runner(
    name="torch",
    title="transformers",
    formats=("huggingface",),
    packages=("torch", "transformers", "safetensors"),
    extra="transformers",
    start=_start,
)
