"""Why a data file is missing: the reader was too slow for the table's history, or the lake is damaged."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lake.delta.checkpoint import RETENTION_OF_TOMBSTONES, expired_before

_DATA_FILE = re.compile(r"[^/\\'\"\s]+\.parquet")


class Overtaken(RuntimeError):
    """Files of the version that is being read were deleted, since the table's history has passed."""


class FileLost(RuntimeError):
    """A file of the table's newest version is missing."""


def overtaken(table: str, version: int, configuration: Mapping[str, str]) -> Overtaken:
    """The error for a reader of this version. configuration: the table's properties."""
    minutes = -expired_before(configuration, RETENTION_OF_TOMBSTONES, 0) / 60_000
    return Overtaken(
        f"{table}: files of version {version} were deleted while they were being read. The table's history is "
        f"{minutes:g} minutes (setting history_minutes). Start again; if that is too short for a read, make it longer"
    )


def explained(
    text: str, table: str, version: int, read: Collection[str], live: Collection[str], configuration: Mapping[str, str]
) -> Overtaken | FileLost | None:
    """The error that a failure to read is about; None if it names no data file of this table.

    text: of the failure. read, live: the paths of the files of the version that was read, and of the newest version.
    """
    missing = set(_DATA_FILE.findall(text)) & {_name(path) for path in read}
    if not missing:
        return None
    if lost := missing & {_name(path) for path in live}:
        return FileLost(
            f"{table}: {min(lost)} is a file of the newest version and cannot be read: the lake is damaged. "
            "batch/prove.py says what is missing; --repair mends gold, --rebuild makes silver and gold anew from bronze"
        )
    return overtaken(table, version, configuration)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
