"""Changes of pickles by their opcodes, and of PyTorch checkpoints by their records. Nothing is ever unpickled here."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable

Record = tuple[str, bytes]
_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"c_codecs\nencode\n",
    b"ctorch\ndevice\n", b"ctorch.storage\nUntypedStorage\n", b"cargparse\nNamespace\n", b"ctorch\nbfloat16\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"c\xff\nx\n",
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64)
_OPCODES = tuple(one.code.encode("latin-1") for one in pickletools.opcodes)


def opcodes(data: bytes) -> list[bytes]:
    """The opcodes with their arguments; from where they cannot be read on, the rest in one piece."""
    places = []
    try:
        for _, _, at in pickletools.genops(data):
            places.append(at)
    except Exception:  # whatever is wrong with it: it is an input like any other
        pass
    ends = [at for at in places if at is not None]
    begins = ends or [0]
    return [data[begin:end] for begin, end in zip(begins, [*begins[1:], len(data)], strict=True)]


def mutated_pickle(data: bytes, rng: random.Random) -> bytes:
    """One to four opcodes changed, moved, left out or put in."""
    found = opcodes(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(found)) if found else 0
        choice = rng.randrange(10)
        if choice == 0 and found:
            del found[at]
        elif choice == 1 and found:
            found.insert(at, rng.choice(found))
        elif choice == 2 and found:
            other = rng.randrange(len(found))
            found[at], found[other] = found[other], found[at]
        elif choice == 3:
            found.insert(at, rng.choice(_GLOBALS))
        elif choice == 4:
            found.insert(at, rng.choice(_OPCODES))
        elif choice == 5 and found:
            found[at] = rng.choice(found)
        elif choice == 6:
            end = min(len(found), at + rng.randrange(1, 12))
            found[at:at] = found[at:end] * rng.choice((1, 2, 30))
        else:
            _reword(found, rng)
    return b"".join(found)


def _reword(found: list[bytes], rng: random.Random) -> None:
    """A number, a global or a text of an opcode becomes another one."""
    wanted = rng.choice((b"KMJ\x8aI", b"KMJ\x8aI", b"c", b"X\x8cU", b"hjqr"))
    places = [at for at, one in enumerate(found) if one[:1] and one[:1] in wanted]
    if not places:
        return
    at = rng.choice(places)
    if found[at][:1] == b"c":
        found[at] = rng.choice(_GLOBALS)
    elif found[at][:1] in b"X\x8cU":
        text = rng.choice((b"", b"0", b"cpu", b"storage", b"a.b", b"..", b"\xff", b"\x1b[2J", b"n" * 300, b"weight"))
        found[at] = b"X" + struct.pack("<I", len(text)) + text
    elif found[at][:1] in b"hjqr":
        found[at] = rng.choice((b"h", b"q")) + bytes([rng.randrange(256)])
    else:
        found[at] = _number(rng.choice(_NUMBERS))


def _number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def records(data: bytes) -> list[Record] | None:
    """The records of a zip file; None if Python's reader does not take it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # damaged in one of a hundred ways
        return None


def archive(found: list[Record], rng: random.Random | None = None) -> bytes:
    """A zip file of these records; `rng`: sometimes compressed, and with names twice."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng is not None and rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as made:
        warnings.simplefilter("ignore")  # a name twice is what we want
        for name, content in found:
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            made.writestr(info, content)
    return out.getvalue()


def mutated_checkpoint(data: bytes, rng: random.Random, n_most: int, bytewise: Callable[[bytes], bytes]) -> bytes:
    """A checkpoint of any layout with its pickles, its records, or just its bytes changed."""
    if rng.random() < 0.12:
        return bytewise(data)[:n_most]
    found = records(data)
    if found is None:
        return _mutated_legacy(data, rng)[:n_most]
    at = rng.randrange(len(found)) if found else 0
    pickles = [place for place, (name, _) in enumerate(found) if name.endswith(".pkl")]
    choice = rng.random()
    if choice < 0.7 and pickles:
        at = rng.choice(pickles)
        found[at] = (found[at][0], mutated_pickle(found[at][1], rng))
    elif choice < 0.78 and found:
        del found[at]
    elif choice < 0.84 and found:
        name = rng.choice(
            ("archive/data.pkl", "../up", "archive/data/0", "archive/byteorder", "/abs", "a" * 300, "é\n")
        )
        found[at] = (name, found[at][1])
    elif choice < 0.92 and found:
        content = found[at][1]
        found[at] = (found[at][0], rng.choice((content[:-1], content + b"\0", content * 2, b"", b"big", b"little")))
    elif found:
        found.append(rng.choice(found))
    return archive(found, rng)[:n_most]


def _mutated_legacy(data: bytes, rng: random.Random) -> bytes:
    """The pickles of the layout before 1.6 follow each other; behind the last one lie the storages."""
    pieces: list[bytes] = []
    rest = data
    while rest and len(pieces) < 5:
        ops = opcodes(rest)
        n_bytes = sum(map(len, ops[:-1])) + 1 if ops[-1][:1] == b"." else 0
        if not n_bytes:
            break
        pieces.append(rest[:n_bytes])
        rest = rest[n_bytes:]
    pieces.append(rest)
    at = rng.randrange(len(pieces))
    if at == len(pieces) - 1:
        pieces[at] = rng.choice(
            (rest[:-1], rest[1:], rest * 2, b"", struct.pack("<q", rng.choice(_NUMBERS[:15])) + rest[8:])
        )
    else:
        pieces[at] = mutated_pickle(pieces[at], rng)
    return b"".join(pieces)
