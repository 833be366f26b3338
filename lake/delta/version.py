"""Which version of the suite has made a table: its columns, their meaning, and the rules by which its rows are made."""

from __future__ import annotations

from lake.delta.files import Files
from lake.delta.log import TableLog
from lake.tables import VERSION, Table

PROPERTY = "tickhouse.version"
"""The property of a table that says its version. Tables of the first version have none."""


class OtherVersion(RuntimeError):
    """A table was made by another version of the suite."""


def check_version(files: Files, root: str, table: Table) -> None:
    """Raises OtherVersion if the table, where it exists, is of another version than this suite's."""
    version = version_of(files, root, table)
    if version is None or version == VERSION:
        return
    remedy = (
        "./spark-submit.sh batch/migrate.py says what is to be done, and does it with --execute."
        if version < VERSION
        else "run the newer suite."
    )
    raise OtherVersion(
        f"{table.path(root)} is of version {version} of the lake, and this suite's is {VERSION}: {remedy}"
    )


def version_of(files: Files, root: str, table: Table) -> int | None:
    """The version that has made a table; None if there is no table."""
    log = TableLog(files, table.path(root))
    return None if log.newest() < 0 else int(log.property(PROPERTY) or 1)
