"""What a simulated venue sends, and when: made up by the market, or read from recordings.

A source is an iterator of frames in the order of time. A fault is a function from a source to a source.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simulator.history import Execution


@dataclass(frozen=True, slots=True)
class Frame:
    """A WebSocket message, due `at_ns` nanoseconds after the source began, for those subscribed to `stream`.

    The stream "" is everybody's who has subscribed to anything.
    """

    at_ns: int
    stream: str
    text: str
    executions: tuple[Execution, ...] = ()
    """The trades that it tells of, which the venue's history has from then on."""
    is_sent: bool = True


def unsent(
    source: Iterator[Frame], skipped: Sequence[tuple[int, int]], forgotten: Sequence[tuple[int, int]]
) -> Iterator[Frame]:
    """Some trades are made and not sent: with (after, count) `count` trades after the first `after`.

    Those that are forgotten are not in the venue's history either.
    """
    count_before = 0
    for frame in source:
        if frame.executions and any(after <= count_before < after + count for after, count in forgotten):
            yield replace(frame, is_sent=False, executions=())
        elif frame.executions and any(after <= count_before < after + count for after, count in skipped):
            yield replace(frame, is_sent=False)
        else:
            yield frame
        count_before += len(frame.executions)


def recorded(files: Sequence[Path]) -> Iterator[Frame]:
    """The frames of recordings, merged by the time of their receipt.

    A recording has lines `receive_ns FRAME`, and may be compressed by gzip. Raises ValueError for any other line. A
    frame of a combined stream is for its subscribers, another one for all.
    """
    first_ns: int | None = None
    for received_ns, stream, text in heapq.merge(*map(_lines, files), key=lambda line: line[0]):
        first_ns = received_ns if first_ns is None else first_ns
        yield Frame(received_ns - first_ns, stream, text)


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            received, _, text = line.rstrip("\n").partition(" ")
            if not received.isdecimal():
                raise ValueError(f"{file}:{number}: not `receive_ns FRAME`: {line[:80]!r}")
            yield int(received), _stream(text), text


def _stream(text: str) -> str:
    try:
        message = json.loads(text)
    except ValueError:
        return ""
    return str(message["stream"]) if isinstance(message, dict) and "stream" in message else ""
