"""Which tensors of a TorchScript archive are parameters and which are buffers: its own classes say so, read as text.

`__torch__.a.b.Linear` is the class `Linear` in `code/__torch__/a/b.py`, whose first lines are
`__parameters__ = ["weight", "bias", ]` and `__buffers__ = [ ]`. No line of that code is run.
Source: torch/csrc/jit/serialization/python_print.cpp (`printClass`), `export_module.cpp`; PyTorch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tieaudit.formats.torch_checkpoint.archive import Archive
from tieaudit.formats.torch_checkpoint.pickles import Made
from tieaudit.formats.torch_checkpoint.rebuild import Tensor

_PREFIX = "__torch__."
_MAX_CODE_BYTES = 16 * 1024 * 1024
"""Of one file; the code of a model of 100 layers, traced, has 5 MB."""
_MAX_ALL_CODE_BYTES = 256 * 1024 * 1024
_CLASS = re.compile(r"^class ([A-Za-z_]\w*)\(Module\):\n((?:  __\w+__ = \[[^\]\n]*\]\n)*)", re.MULTILINE)
_LIST = re.compile(r"  (__parameters__|__buffers__) = \[([^\]\n]*)\]")

Lists = Mapping[str, Mapping[str, frozenset[str]]]
"""Class → `__parameters__` and `__buffers__` → names."""


class _Code:
    """The classes of an archive's code, each file read once."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._files: dict[str, Lists] = {}
        self._n_bytes = 0

    def lists(self, name: str) -> Mapping[str, frozenset[str]] | None:
        """What a class says about its attributes; None where the archive has no such class."""
        home, _, cls = name.rpartition(".")
        file = f"code/{home.replace('.', '/')}.py"
        if file not in self._files:
            self._files[file] = self._read(file)
        return self._files[file].get(cls)

    def _read(self, file: str) -> Lists:
        member = self._archive.members.get(file)
        if member is None or self._n_bytes + member.n_bytes > _MAX_ALL_CODE_BYTES:
            return {}
        self._n_bytes += member.n_bytes
        text = self._archive.read(file, _MAX_CODE_BYTES).decode("utf-8", "replace")
        return {
            found[1]: {one[1]: frozenset(re.findall(r'"([^"]*)"', one[2])) for one in _LIST.finditer(found[2])}
            for found in _CLASS.finditer(text)
        }


def mark(value: object, archive: Archive) -> bool:
    """Tell every tensor that a module holds whether it is a parameter, as the module's class says; whether any is.

    Tensors of classes that the archive's code does not tell stay as they are. CorruptFile for code of absurd size.
    """
    code, any_parameter = _Code(archive), False
    for module in _modules(value):
        lists = code.lists(module.name)
        if lists is None or not isinstance(module.state, dict):
            continue
        parameters, buffers = (lists.get(name, frozenset()) for name in ("__parameters__", "__buffers__"))
        for name, held in module.state.items():
            if not isinstance(held, Tensor):
                continue
            if name in parameters:
                any_parameter = True
                module.state[name] = replace(held, parameter=True, because="a parameter of its TorchScript class")
            elif name in buffers:
                module.state[name] = replace(held, parameter=False, because="a buffer of its TorchScript class")
            else:
                because = "an attribute of its TorchScript class, neither parameter nor buffer"
                module.state[name] = replace(held, parameter=False, because=because)
    return any_parameter


def constant(value: object) -> object:
    """A constant of the code, of a module that has parameters: in a frozen one the constants are what was learned."""
    return replace(value, parameter=False, because="a constant of the code") if isinstance(value, Tensor) else value


def _modules(value: object) -> Iterator[Made]:
    """Every object of a class of the archive, once."""
    pending, met = [value], {id(value)}
    while pending:
        one = pending.pop()
        inner: list[object] = []
        if isinstance(one, Made):
            if one.name.startswith(_PREFIX):
                yield one
            inner = [one.state, one.items, one.entries]
        elif isinstance(one, dict):
            inner = list(one.values())
        elif isinstance(one, (list, tuple)):
            inner = list(one)
        for child in inner:
            if isinstance(child, (Made, dict, list, tuple)) and id(child) not in met:
                met.add(id(child))
                pending.append(child)
