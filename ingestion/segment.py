"""A segment of the spool: a file with a head, and records one after the other, each with its checksum."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

# Checksum of the rest; ticks numbered up to and with this record; lengths of topic, key and value, which follow.
_RECORD = struct.Struct("<IQHHI")
# Magic, position before the first record, ticks numbered before it, the file's inode, producer, checksum of all that.
_HEAD = struct.Struct("<8sQQQ16sI")
_MAGIC = b"TICKS-1\n"
HEAD_BYTES = _HEAD.size


class Record(NamedTuple):
    """A message on its way to Kafka."""

    topic: str
    key: bytes
    value: bytes


class Head(NamedTuple):
    base: int
    """Position before the first record."""
    sequence: int
    """Ticks numbered before it."""
    producer: str
    inode: int = 0
    """That of the file for which it was made: a copy has another."""


@dataclass(slots=True)
class Segment:
    """What is known of the file."""

    path: Path
    base: int
    """Position before its first record."""
    end: int
    """Position of its last durable record."""
    size: int
    """Bytes that are durable."""


def new_segment(folder: Path, head: Head) -> tuple[int, Segment]:
    """A file with a head, both durable. Raises OSError; what it began is then gone, or found at the next start."""
    path = folder / f"{head.base:020d}.log"
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        inode = os.fstat(file).st_ino
        packed = _HEAD.pack(_MAGIC, head.base, head.sequence, inode, head.producer.encode(), 0)[:-4]
        _write(file, packed + crc32c(packed).to_bytes(4, "little"), 0)
        os.fsync(file)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        os.close(file)
        path.unlink()
        raise
    return file, Segment(path, head.base, head.base, HEAD_BYTES)


def read_head(path: Path) -> Head | None:
    """None if it was never finished, or is damaged."""
    with path.open("rb") as file:
        read = file.read(HEAD_BYTES)
    if len(read) < HEAD_BYTES:
        return None
    magic, base, sequence, inode, producer, checksum = _HEAD.unpack(read)
    if magic != _MAGIC or checksum != crc32c(read[:-4]):
        return None
    return Head(base, sequence, producer.decode(), inode)


def encode(sequence: int, topic: str, key: bytes, value: bytes) -> bytes:
    """A record's bytes; `sequence` is that of the last tick numbered."""
    name = topic.encode()
    body = _RECORD.pack(0, sequence, len(name), len(key), len(value))[4:] + name + key + value
    return crc32c(body).to_bytes(4, "little") + body


def parse(data: bytes, at_most: int | None = None) -> tuple[list[Record], int, int]:
    """The whole records at the start of `data`, their length in bytes, and the last one's sequence."""
    records: list[Record] = []
    view = memoryview(data)
    size, start, last = len(data), 0, 0
    head, unpack = _RECORD.size, _RECORD.unpack_from
    while start + head <= size and (at_most is None or len(records) < at_most):
        checksum, sequence, topic_length, key_length, value_length = unpack(data, start)
        topic = start + head
        key = topic + topic_length
        value = key + key_length
        end = value + value_length
        if end > size or crc32c(view[start + 4 : end]) != checksum:
            break
        records.append(Record(str(view[topic:key], "utf-8"), data[key:value], data[value:end]))
        start, last = end, sequence
    return records, start, last


def _write(file: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def write_durably(file: int, data: bytes | bytearray, offset: int) -> None:
    _write(file, data, offset)
    os.fdatasync(file)
