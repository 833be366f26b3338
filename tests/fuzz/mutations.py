"""Odd copies of good bytes, for tests that nothing from outside stops anything."""

from __future__ import annotations

import random
from collections.abc import Sequence

ODD = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"-1", b"0", b"-0", b"1e999", b"1E-400", b"9" * 400, b"0." + b"0" * 400),
    *(b"9223372036854775808", b"999999999999999999", b"1.0", b"NaN", b"Infinity", b'"\\ud800"', b'"\\u0000"', b"\xff"),
    *(b'"0001-01-01T00:00:00Z"', b'"9999-12-31T23:59:59-12:00"', b'"2024-02-30T00:00:00Z"', b'"2024-08-09T00:00:00"'),
    *(b'"' + b"1" * 5_000 + b'x"', b"[" * 200, b'"\x1b[31m\r\n"', "\u0661".encode(), b"'", b"\\", b",", b":", b"\0"),
)


def mutated(good: Sequence[bytes], chance: random.Random) -> bytes:
    """A copy of one of these with up to three changes."""
    value = bytearray(chance.choice(good))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        at = chance.randrange(len(value) + 1)
        end = min(len(value), at + chance.choice([1, 1, 2, 5, 20, 100]))
        kind = chance.randrange(8)
        if kind == 0 and at < len(value):
            value[at] = chance.randrange(256)
        elif kind == 1:
            del value[at:end]
        elif kind == 2:
            value[at:at] = value[at:end]
        elif kind == 3:
            value[at:at] = chance.choice(ODD)
        elif kind == 4:
            value[at:end] = chance.randbytes(end - at)
        elif kind == 5:
            other = chance.choice(good)
            value[at:] = other[chance.randrange(len(other) + 1) :]
        else:
            _replace_a_field(value, chance)
    return bytes(value)


def _replace_a_field(value: bytearray, chance: random.Random) -> None:
    """Give one field of a flat JSON object an odd value."""
    colons = [at for at, byte in enumerate(value) if byte == ord(":") and value[at - 1 : at] == b'"']
    if colons:
        begin = chance.choice(colons) + 1
        ends = [at for at in (value.find(b",", begin), value.find(b"}", begin)) if at >= 0]
        value[begin : min(ends, default=len(value))] = chance.choice(ODD)
