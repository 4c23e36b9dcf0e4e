"""Changes to JSON that know what a token is, and to the safetensors files whose header is JSON."""

from __future__ import annotations

import random
import re

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|-?\d[\d.eE+-]*|[A-Za-z]+|\s+|.', re.DOTALL)
NUMBERS = (
    *(b"0", b"-0", b"1", b"-1", b"1.0", b"1e0", b"1E400", b"-1e-400", b"00", b"01", b"1.", b".5", b"+1", b"4294967296"),
    *(b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"9" * 30, b"9" * 5000, b"0x10"),
)
OTHERS = (
    b"null",
    b"true",
    b"false",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"[]",
    b"{}",
    b'""',
    b"[[]]",
    b"nul",
    b'{"a":1}',
)
WORDS = (
    *(
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"__metadata__"',
        b'"F32"',
        b'"U8"',
        b'"BF16"',
        b'"F4"',
        b'"F6_E2M3"',
    ),
    *(b'"weight_map"', b'"metadata"', b'"total_size"', b'"model_type"', b'"architectures"', b'"tie_word_embeddings"'),
    *(b'"quantization_config"', b'"text_config"', b'"GPT2LMHeadModel"', b'"T5ForConditionalGeneration"', b'"gpt2"'),
    *(
        b'"../model.safetensors"',
        b'"/etc/passwd"',
        b'"."',
        b'".."',
        b'""',
        b'"a\\u0000b"',
        b'"C:\\\\x"',
        b'"model.safetensors"',
    ),
    *(b'"lm_head.weight"', b'"transformer.wte.weight"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u202e"', b'"\x1b[2J"'),
    *(b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"\\/"', b'"\\x"', b'"\n"', b'"' + b"n" * 500 + b'"'),
)


def tokens(text: bytes) -> list[bytes]:
    """The tokens of a JSON text, white space included; joined they are the text."""
    return _TOKEN.findall(text)


def boundaries(text: bytes) -> list[int]:
    """Every offset between two tokens."""
    found = [0]
    for token in tokens(text):
        found.append(found[-1] + len(token))
    return found


def mutated_json(text: bytes, rng: random.Random, n_most: int) -> bytes:
    """`text` with one to four changes of its tokens."""
    found = tokens(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        _change(found, rng)
    return b"".join(found)[:n_most]


def _change(found: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(found) + 1)
    here = min(at, len(found) - 1)
    choice = rng.randrange(12)
    if not found or choice == 0:
        found.insert(
            at, rng.choice((*NUMBERS, *OTHERS, *WORDS, b",", b":", b"{", b"}", b"[", b"]", b" ", b"\xef\xbb\xbf"))
        )
    elif choice == 1:
        del found[here]
    elif choice == 2:
        found.insert(at, found[rng.randrange(len(found))])
    elif choice == 3:
        other = rng.randrange(len(found))
        found[here], found[other] = found[other], found[here]
    elif choice in (4, 5):
        numbers = [index for index, token in enumerate(found) if token[:1].isdigit() or token[:1] == b"-"]
        if numbers:
            found[rng.choice(numbers)] = rng.choice((*NUMBERS, *OTHERS, str(rng.randrange(300)).encode()))
    elif choice in (6, 7):
        strings = [index for index, token in enumerate(found) if token[:1] == b'"']
        if strings:
            at = rng.choice(strings)
            known = found[rng.choice(strings)]
            found[at] = rng.choice((rng.choice(WORDS), known, _respelt(found[at], rng), rng.choice(OTHERS)))
    elif choice in (8, 9):  # a whole piece again, somewhere else: names that come twice, entries with a field too many
        end = rng.randrange(here, min(here + 30, len(found))) + 1
        target = rng.randrange(len(found) + 1)
        found[target:target] = found[here:end]
    elif choice == 10:
        depth = rng.choice((1, 2, 60, 126, 127, 128, 129, 2000))
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        found[here] = opening * depth + found[here] + closing * depth
    else:
        end = rng.randrange(here, min(here + 30, len(found))) + 1
        del found[here:end]


def _respelt(token: bytes, rng: random.Random) -> bytes:
    """The same string with one character written as an escape: another text, the same name."""
    if len(token) < 3 or not token.isascii() or b"\\" in token:
        return token
    at = rng.randrange(1, len(token) - 1)
    return token[:at] + f"\\u{token[at]:04x}".encode() + token[at + 1 :]


def mutated_safetensors(data: bytes, rng: random.Random, n_most: int) -> bytes:
    """A safetensors file with its header changed, and mostly with the length that belongs to it."""
    if len(data) < 8:
        return data + rng.randbytes(8)
    n_header = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header, body = data[8 : 8 + n_header], data[8 + n_header :]
    choice = rng.random()
    if choice < 0.75:
        header = mutated_json(header, rng, n_most)
        if rng.random() < 0.5:
            header += b" " * (-len(header) % 8)
    elif choice < 0.9:
        body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.5 else body + rng.randbytes(rng.randrange(9))
    else:
        header = header + rng.choice((b" ", b"\0", b"\n", b"}", b"{}", b"\x20" * 8))
    length = len(header)
    if rng.random() < 0.08:
        length = rng.choice(
            (0, 1, length - 1, length + 1, length + len(body), 100_000_000, 100_000_001, 2**62, 2**64 - 1)
        )
    return (max(length, 0).to_bytes(8, "little") + header + body)[:n_most]
