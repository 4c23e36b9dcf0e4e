"""Exports of small live models to ONNX with every name scrambled, and which weight of the file was which parameter.

`torch.onnx.export(dynamo=True)`, eager attention, symbolic batch and sequence where torch.export allows it; what torch
cannot export so is traced (`dynamo=False`).
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from pathlib import Path
from typing import Any


def sample(model: Any) -> dict[str, Any]:
    """Inputs by name: ids, or what an audio or vision encoder takes. ValueError for a model that takes neither."""
    import torch

    takes, config = inspect.signature(model.forward).parameters, model.config
    ids = torch.randint(3, 300, (2, 7))
    if "input_ids" in takes:
        found = {"input_ids": ids}
        if "token_type_ids" in takes:
            found["token_type_ids"] = torch.randint(0, 2, (2, 7))
    elif "input_features" in takes:
        found = {"input_features": torch.randn(2, 40, getattr(config, "input_feat_per_channel", 80))}
    elif "input_values" in takes:
        found = {"input_values": torch.randn(2, 4000)}
    elif "pixel_values" in takes:
        found = {"pixel_values": torch.randn(2, 3, config.image_size, config.image_size)}
    else:
        raise ValueError(f"{type(model).__name__} takes {', '.join(takes)}")
    if getattr(config, "is_encoder_decoder", False):
        by_ids = "decoder_input_ids" in takes
        name = "decoder_input_ids" if by_ids else "decoder_input_values"
        found[name] = torch.randint(3, 300, (2, 5)) if by_ids else torch.randn(2, 5, 80)
    return found


def export(model: Any) -> Any:
    """The model's logits as an ONNX message. Raises whatever torch's exporter raises. Cost: 5 to 60 s each."""
    import torch

    given = sample(model)
    for config in (model.config, *vars(model.config).values()):
        if hasattr(config, "use_cache"):
            config.use_cache = False

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            found = self.model(**dict(zip(given, values, strict=True)))
            return found.logits if hasattr(found, "logits") else found[0]

    free = torch.export.Dim.DYNAMIC
    shapes = tuple({0: free, 1: free} if one.dtype == torch.int64 else {0: free} for one in given.values())
    settings: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False}
    settings |= {"input_names": list(given), "output_names": ["logits"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(Logits(), tuple(given.values()), None, dynamic_shapes=(shapes,), **settings)
        except Exception:  # many models allow no free sizes
            try:
                made = torch.onnx.export(Logits(), tuple(given.values()), None, **settings)
            except Exception as error:
                return _traced(Logits(), given, error)
    return made.model_proto


def _traced(module: Any, given: dict[str, Any], first: Exception) -> Any:
    """The export by tracing; `first`, which says what torch.export could not do, if that fails too."""
    import io

    import onnx
    import torch

    file = io.BytesIO()
    try:
        torch.onnx.export(
            module, tuple(given.values()), file, dynamo=False, opset_version=17, input_names=list(given),
            output_names=["logits"],
        )  # fmt: skip
    except Exception:
        raise first from first.__cause__
    return onnx.load_from_string(file.getvalue())


def scramble(proto: Any, model: Any) -> dict[str, str]:
    """Give every value of the message a digest for a name, in place; name of a weight → the parameter it is.

    A parameter is recognised by its values, as it is or transposed. What the exporter folded into other numbers (a norm
    into the next matrix) is no parameter any more and is left out.
    """
    from onnx import numpy_helper

    known: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        for one in (array, array.T, array.swapaxes(-1, -2) if array.ndim == 3 else array):
            known.setdefault(_digest(one), name)
    origin = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and (name := known.get(_digest(array.astype("float32")))):
            origin[_scrambled(tensor.name)] = name
    _rename(proto.graph)
    del proto.metadata_props[:]
    return origin


def _digest(array: Any) -> str:
    import numpy as np

    squeezed = np.ascontiguousarray(array.squeeze())
    return f"{squeezed.shape} {hashlib.sha256(squeezed.tobytes()).hexdigest()}"


def _scrambled(name: str) -> str:
    return f"v{hashlib.sha256(name.encode()).hexdigest()[:12]}" if name else ""


def _rename(graph: Any) -> None:
    del graph.value_info[:]
    graph.name, graph.doc_string = "g", ""
    for item in (*graph.initializer, *graph.input, *graph.output):
        item.name = _scrambled(item.name)
    for node in graph.node:
        inputs, outputs = [_scrambled(one) for one in node.input], [_scrambled(one) for one in node.output]
        del node.input[:], node.output[:], node.metadata_props[:]
        node.input.extend(inputs)
        node.output.extend(outputs)
        node.name = node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g)


def write(model: Any, path: Path) -> dict[str, str]:
    """The scrambled export at `path`; name of a weight → the parameter it is."""
    import onnx

    proto = export(model)
    origin = scramble(proto, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(path))
    return origin
