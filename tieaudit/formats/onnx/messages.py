"""The ModelProto class, without the rest of the onnx package where nobody has asked for that yet.

`import onnx` also loads its checker, helpers, printer and tar archives: three quarters of the time that a scan of a
small model takes. The generated message classes alone are one module, `onnx_ml_pb2`; protobuf registers them once in a
process, so the classes are the same objects when onnx is imported later.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

_GENERATED = "onnx_ml_pb2.py"


@cache
def model_proto() -> type[ModelProto]:
    """`onnx.ModelProto`."""
    if "onnx" not in sys.modules:
        found = _generated()
        if found is not None:
            return found
    from onnx import ModelProto

    return ModelProto


def _generated() -> type[ModelProto] | None:
    """The class from the generated module alone; None where the package looks different than expected."""
    package = find_spec("onnx")
    if package is None or package.origin is None or not (file := Path(package.origin).with_name(_GENERATED)).is_file():
        return None
    spec = spec_from_file_location("tieaudit_onnx_ml_pb2", file)
    if spec is None or spec.loader is None:
        return None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception:  # whatever a generated file of another version raises here, it raises again from `import onnx`
        return None
    found: type[ModelProto] | None = getattr(module, "ModelProto", None)
    return found
