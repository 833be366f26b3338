"""The version of a table's columns and rules (lake.tables.VERSION)."""

from __future__ import annotations

from lake.delta.files import Files
from lake.delta.log import TableLog
from lake.tables import VERSION, Table

PROPERTY = "tickhouse.version"
"""The table property with the version. Tables of version 1 lack it."""


class OtherVersion(RuntimeError):
    """Another version of the suite made a table."""


def check_version(files: Files, root: str, table: Table) -> None:
    """Raises OtherVersion if the table exists and has another version than this suite."""
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
    """A table's version; None if there is no table."""
    log = TableLog(files, table.path(root))
    return None if log.newest() < 0 else int(log.property(PROPERTY) or 1)
