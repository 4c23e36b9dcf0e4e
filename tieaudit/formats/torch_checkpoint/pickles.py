"""A pickle machine that builds nothing but plain values: opcodes from an allow-list, and no import and no call, ever.

What a pickle names becomes a `Global`, what it would call becomes a `Made`: inert records. `rebuild.py` gives the few
functions a meaning that PyTorch writes. Source of the opcodes: CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # how Python 2 spelt the names of protocols 0 to 2
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tieaudit.errors import CorruptFile
from tieaudit.formats.torch_checkpoint.stream import Blob, Stream

MAX_STEPS = 8_000_000
"""Opcodes of one pickle: 200,000 tensors, at 40 each."""
_MAX_TEXT_BYTES = 65536
"""Longer texts and byte strings are passed over (`Blob`)."""
_MAX_ALL_TEXT_BYTES = 128 * 1024 * 1024
_MAX_INTEGER_BYTES = 64
_NO_MARK = "expected a MARK on the stack"

RUNS_CODE = frozenset(
    "os posix nt sys subprocess commands runpy pty shutil socket ctypes importlib imp builtins.eval "
    "builtins.exec builtins.compile builtins.open builtins.__import__ builtins.input builtins.breakpoint "
    "builtins.globals builtins.execfile builtins.apply builtins.exit builtins.quit code codeop bdb pdb timeit "
    "multiprocessing asyncio webbrowser pip pickle _pickle marshal requests httplib urllib http ftplib smtplib "
    "telnetlib cProfile pydoc doctest types.CodeType types.FunctionType numpy.testing torch.hub "
    "torch.utils.cpp_extension torch.jit._script.script torch._inductor".split()
)
"""Modules, and single functions, of which no checkpoint has need and many an attack has; naming one is enough.

Source: the block lists of torch/_weights_only_unpickler.py, modelscan and fickling.
"""


class Global:
    """A module's attribute that a pickle names. Nothing was imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name
        """`module.name`"""


class Made:
    """What calling a `Global` would have made. Nothing was called."""

    __slots__ = ("args", "entries", "function", "items", "state")

    def __init__(self, function: object, args: object) -> None:
        self.function = function
        self.args = args
        self.state: object = None
        self.items: dict[object, object] = {}
        self.entries: list[object] = []

    @property
    def name(self) -> str:
        return self.function.name if isinstance(self.function, Global) else "?"


class Ordered(dict[Any, Any]):
    """An `OrderedDict`, which may have attributes: PyTorch keeps the versions of modules in `_metadata`."""

    state: object = None


class UnhashedKey:
    """Stands for a dictionary key that is no plain value: hashing a nested tuple may take forever."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


Call = Callable[[Global, tuple[Any, ...]], object]
"""(function, arguments) → what it makes, or NotImplemented for a placeholder."""


class Machine:
    """One run over one pickle. Memory and time are bounded by `MAX_STEPS` and by the texts that are kept."""

    def __init__(self, stream: Stream, persistent: Callable[[object], object], call: Call) -> None:
        self.placeholders: Counter[str] = Counter()
        """Names of what was not made, and how often."""
        self._stream = stream
        self._persistent = persistent
        self._call = call
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._n_text = 0
        self._globals: dict[str, Global] = {}

    def load(self) -> object:
        """The value that the pickle describes. CorruptFile names the byte where it makes no sense."""
        stream, table = self._stream, OPERATIONS
        byte = stream.byte
        for _ in range(MAX_STEPS):
            code = byte()
            if code == 46:  # STOP
                if not self._stack:
                    raise self._wrong("expected a value at the end, found none")
                return self._stack[-1]
            operation = table.get(code)
            if operation is None:
                raise self._wrong(f"expected an opcode that PyTorch writes, found {bytes([code])!r}")
            try:
                operation(self)
            except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
                raise self._wrong(
                    f"opcode {bytes([code])!r} does not fit what is there ({type(error).__name__})"
                ) from None
        raise self._wrong(f"expected at most {MAX_STEPS:,} steps, found more")

    def _wrong(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self._stream.where}: {what}, before byte {self._stream.at} of the pickle")

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError(_NO_MARK)
        items, self._stack = self._stack, self._marks.pop()
        return items

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def push(self, value: object) -> None:
        self._stack.append(value)

    # values ------------------------------------------------------------------------------------------------------

    def text(self, n_length: int, decode: bool = True) -> None:
        n_bytes = self._stream.number(n_length)
        if n_bytes > _MAX_TEXT_BYTES or (n_bytes > 256 and self._n_text > _MAX_ALL_TEXT_BYTES):
            self.push(self._stream.skip(n_bytes))
            return
        self._n_text += n_bytes
        data = self._stream.take(n_bytes)
        self.push(data.decode("utf-8", "surrogatepass") if decode else data)

    def old_string(self, n_length: int) -> None:
        """A `str` of Python 2: a text where it can be one."""
        self.text(n_length, decode=False)
        if isinstance(self._stack[-1], bytes):
            self._stack[-1] = self._stack[-1].decode("latin-1")

    def integer(self, n_length: int) -> None:
        n_bytes = self._stream.number(n_length)
        if n_bytes > _MAX_INTEGER_BYTES:
            raise self._wrong(f"expected an integer of at most {_MAX_INTEGER_BYTES} bytes, found {n_bytes}")
        self.push(self._stream.number(n_bytes, signed=True))

    def written_integer(self) -> None:
        text = self._stream.line().rstrip("L")
        if text in ("00", "01"):
            self.push(text == "01")
            return
        if len(text) > 2 * _MAX_INTEGER_BYTES:
            raise self._wrong(f"expected a short integer, found {len(text)} digits")
        self.push(int(text))

    def real(self) -> None:
        self.push(struct.unpack(">d", self._stream.take(8))[0])

    # containers --------------------------------------------------------------------------------------------------

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def new_dict(self) -> None:
        items = self._since_mark()
        self.push({})
        self._set(items)

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Made):
            target.entries.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        held = target.items if isinstance(target, Made) else target
        if not isinstance(held, dict) or len(items) % 2:
            raise TypeError
        for index in range(0, len(items), 2):
            held[_key(items[index])] = items[index + 1]

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    # names, and what would be made of them -----------------------------------------------------------------------

    def name_of(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        said = f"{module}.{name}"
        full = ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        if _runs_code(said) or _runs_code(full):
            raise self._wrong(
                f"the pickle names {full[:80]}, which runs code when PyTorch loads it without weights_only: nothing "
                "was executed, and the file is not to be trusted"
            )
        self.push(self._globals.setdefault(full, Global(full)))

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.name_of(module, name)

    def make(self, function: object, args: object) -> None:
        """Push what the function makes if that is known, else a placeholder."""
        if isinstance(function, Global) and isinstance(args, tuple):
            made = self._call(function, args)
            if made is not NotImplemented:
                self.push(made)
                return
        made = Made(function, args)
        self.placeholders[made.name] += 1
        self.push(made)

    def reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self.make(function, args)

    def new_object_with_keywords(self) -> None:
        keywords, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self.make(function, args)
        if isinstance(self._stack[-1], Made) and isinstance(keywords, dict):
            self._stack[-1].items.update(keywords)

    def named_instance(self) -> None:
        """INST of protocol 0."""
        module, name = self._stream.line(), self._stream.line()
        args = self._since_mark()
        self.name_of(module, name)
        self.make(self._stack.pop(), tuple(args))

    def instance(self) -> None:
        """OBJ of protocol 1."""
        function, *args = self._since_mark()
        self.make(function, tuple(args))

    def build(self) -> None:
        state = self._stack.pop()
        made = self._stack[-1]
        if isinstance(made, Made):
            finished = self._call(Global("build"), (made, state))
            if finished is not NotImplemented:
                self._stack[-1] = finished
            else:
                made.state = state
        elif isinstance(made, Ordered):
            made.state = state

    def persistent(self) -> None:
        self._stack[-1] = self._persistent(self._stack[-1])

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]


def _runs_code(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in RUNS_CODE for count in range(1, len(parts) + 1))


def _key(value: object) -> object:
    """A key that is cheap to hash: plain values, and short tuples of them."""
    if isinstance(value, (str, int, float, bytes, bool, type(None), Global, Made)):
        return value
    if isinstance(value, tuple) and len(value) < 9 and all(isinstance(one, (str, int, float, bool)) for one in value):
        return value
    return UnhashedKey(value)


def _operations() -> Mapping[int, Callable[[Machine], object]]:
    found: dict[str, Callable[[Machine], object]] = {
        "\x80": lambda s: s._stream.byte(),
        "\x95": lambda s: s._stream.take(8),
        "(": Machine.mark,
        "0": lambda s: s._stack.pop() if s._stack else s._since_mark(),
        "1": Machine._since_mark,
        "2": lambda s: s.push(s._stack[-1]),
        "F": lambda s: s.push(float(s._stream.line())),
        "G": Machine.real,
        "I": Machine.written_integer,
        "L": Machine.written_integer,
        "J": lambda s: s.push(s._stream.number(4, signed=True)),
        "K": lambda s: s.push(s._stream.byte()),
        "M": lambda s: s.push(s._stream.number(2)),
        "\x8a": lambda s: s.integer(1),
        "\x8b": lambda s: s.integer(4),
        "N": lambda s: s.push(None),
        "\x88": lambda s: s.push(True),
        "\x89": lambda s: s.push(False),
        "S": lambda s: s.push(s._stream.line().strip("'\"")),
        "V": lambda s: s.push(s._stream.line()),
        "T": lambda s: s.old_string(4),
        "U": lambda s: s.old_string(1),
        "X": lambda s: s.text(4),
        "\x8c": lambda s: s.text(1),
        "\x8d": lambda s: s.text(8),
        "B": lambda s: s.text(4, decode=False),
        "C": lambda s: s.text(1, decode=False),
        "\x8e": lambda s: s.text(8, decode=False),
        "\x96": lambda s: s.text(8, decode=False),
        "}": lambda s: s.push({}),
        "]": lambda s: s.push([]),
        ")": lambda s: s.push(()),
        "\x8f": lambda s: s.push([]),  # a set: its members are never looked up
        "t": lambda s: s.push(tuple(s._since_mark())),
        "\x85": lambda s: s.tuple_of(1),
        "\x86": lambda s: s.tuple_of(2),
        "\x87": lambda s: s.tuple_of(3),
        "l": lambda s: s.push(s._since_mark()),
        "d": Machine.new_dict,
        "\x91": lambda s: s.push(s._since_mark()),
        "a": lambda s: s.append([s._stack.pop()]),
        "e": lambda s: s.append(s._since_mark()),
        "\x90": lambda s: s.append(s._since_mark()),
        "s": lambda s: s.set_item(),
        "u": lambda s: s._set(s._since_mark()),
        "c": lambda s: s.name_of(s._stream.line(), s._stream.line()),
        "\x93": Machine.stack_global,
        "i": Machine.named_instance,
        "o": Machine.instance,
        "R": Machine.reduce,
        "\x81": Machine.reduce,
        "\x92": Machine.new_object_with_keywords,
        "b": Machine.build,
        "Q": lambda s: s.persistent(),
        "p": lambda s: s.put(int(s._stream.line())),
        "q": lambda s: s.put(s._stream.byte()),
        "r": lambda s: s.put(s._stream.number(4)),
        "\x94": lambda s: s.put(len(s._memo)),
        "g": lambda s: s.get(int(s._stream.line())),
        "h": lambda s: s.get(s._stream.byte()),
        "j": lambda s: s.get(s._stream.number(4)),
    }
    return {ord(code): operation for code, operation in found.items()}


OPERATIONS = _operations()
"""Opcode → what it does to a machine."""

__all__ = ["MAX_STEPS", "OPERATIONS", "RUNS_CODE", "Blob", "Global", "Machine", "Made", "UnhashedKey"]
