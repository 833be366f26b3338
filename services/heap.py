"""The heap of a Java process that runs as the same user, from the figures that it keeps in a file mapped into memory.

No request is made: the figures of a process that hangs can be read too.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import psutil

# Java always writes below /tmp, whatever java.io.tmpdir says.
_FIGURES = Path("/tmp")
_MAGIC = bytes.fromhex("cafec0c0")
_LONG = ord("J")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True)
class Heap:
    """Bytes. used: with what is garbage already; limit: -Xmx."""

    used: int
    limit: int


def heap(process: psutil.Process) -> Heap:
    """Raises OSError or ValueError where the process has no such figures, as at the start of its life."""
    path = _FIGURES / f"hsperfdata_{process.username()}" / str(process.pid)
    try:
        figures = _longs(path.read_bytes())
    except struct.error as error:
        raise ValueError(f"{path} is cut short") from error
    used = [value for name, value in figures.items() if re.fullmatch(r"sun\.gc\.generation\.\d\.space\.\d\.used", name)]
    limits = [match for word in process.cmdline() if (match := re.fullmatch(r"-Xmx(\d+)([kmgKMG]?)", word))]
    if not used or not limits:
        raise ValueError(f"process {process.pid} does not say how large its heap is")
    return Heap(sum(used), int(limits[-1][1]) * _UNITS[limits[-1][2].lower()])


def _longs(content: bytes) -> dict[str, int]:
    """The whole numbers of the file, by name. Its layout: a header; entries, each with a header, a name and a value."""
    if content[:4] != _MAGIC:
        raise ValueError("these are not the figures of a Java process")
    order = "<" if content[4] else ">"
    at, entries = struct.unpack_from(f"{order}ii", content, 24)
    longs = {}
    for _ in range(entries):
        length, name_at, elements, kind, _, _, _, value_at = struct.unpack_from(f"{order}iiibbbbi", content, at)
        if kind == _LONG and elements == 0:
            name = content[at + name_at : content.index(b"\0", at + name_at)].decode()
            longs[name] = struct.unpack_from(f"{order}q", content, at + value_at)[0]
        if length <= 0:
            raise ValueError("an entry without a length")
        at += length
    return longs
