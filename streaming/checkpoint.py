"""Spark's checkpoint of the streaming query: which query it belongs to, and where the query is in Kafka.

Spark writes it and reads it itself. We read it before Spark does, to say what is wrong and what to do about it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from lake.delta.files import Files

Offsets = dict[str, dict[int, int]]
"""Per topic and partition."""

REMEDY = (
    "Give back the lake's checkpoint (setting checkpoint); or, where it is lost, let --rebuild make silver and gold "
    "anew from bronze and go on from there; or use another lake_root."
)


class CheckpointError(RuntimeError):
    """The checkpoint is damaged, or not the one that belongs to the lake's tables."""


@dataclass(frozen=True)
class Position:
    """The last micro-batch that is complete in all tables (-1: none), and the offsets after it."""

    batch: int
    offsets: Offsets


def checkpoint_query(files: Files, location: str) -> str | None:
    """The id of the query whose checkpoint is at location, or None if there is none. Raises CheckpointError."""
    try:
        return str(json.loads(_content(files, f"{location}/metadata"))["id"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise _damaged(f"{location}/metadata") from None


def position_of(files: Files, location: str) -> Position | None:
    """Where the query is; None if it has not begun. Raises CheckpointError if one of the files in use is damaged."""
    planned, complete = (_numbers(files, f"{location}/{folder}") for folder in ("offsets", "commits"))
    if complete:
        _lines(files, f"{location}/commits/{complete[-1]}")
    # Spark reads the last two.
    offsets = {number: _offsets(files, f"{location}/offsets/{number}") for number in planned[-2:]}
    if complete and complete[-1] in offsets:
        return Position(complete[-1], offsets[complete[-1]])
    if complete:
        raise _damaged(f"{location}/offsets/{complete[-1]}")
    try:
        return Position(-1, _offsets(files, f"{location}/sources/0/0"))
    except FileNotFoundError:
        return None


def put_aside(files: Files, location: str) -> None:
    """Rename a checkpoint, if there is one."""
    if files.exists(location):
        files.rename(location, f"{location}.before-{datetime.now(UTC):%Y%m%dT%H%M%S}")


def _numbers(files: Files, folder: str) -> list[int]:
    return sorted(int(status.name) for status in files.list(folder) if status.name.isdigit())


def _offsets(files: Files, url: str) -> Offsets:
    try:
        topics = json.loads(_lines(files, url)[-1])
        return {topic: {int(number): int(at) for number, at in parts.items()} for topic, parts in topics.items()}
    except (ValueError, AttributeError, TypeError):
        raise _damaged(url) from None


def _lines(files: Files, url: str) -> list[str]:
    """The lines of one of Spark's files after the first, which has the format's version. Raises CheckpointError."""
    try:
        version, *lines = _content(files, url).decode().split("\n")
    except ValueError:
        raise _damaged(url) from None
    # Spark's Kafka source writes a zero byte first.
    if not version.strip("\0").startswith("v") or not lines or not lines[-1].endswith("}"):
        raise _damaged(url)
    return lines


def _content(files: Files, url: str) -> bytes:
    content = files.read(url)
    if not content:
        raise _damaged(url)
    return content


def _damaged(url: str) -> CheckpointError:
    return CheckpointError(f"{url} is missing, empty or cut short, as after a power cut. {REMEDY}")
