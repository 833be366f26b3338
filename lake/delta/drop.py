"""Old rows: which files can be dropped because of their rows' age, and the property that records a drop.

Rows go by whole files: a file is dropped when all its rows are older than the setting keep_days.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from lake.delta.log import DataFile
from lake.tables import TABLES, Table

DROPPED_BEFORE = "tickhouse.dropped_before"
"""A property of a table: rows from before this time (of Table.age_time; ISO 8601) may have been dropped."""


class UnknownTable(ValueError):
    """There is no such table, or its rows cannot be dropped."""


def table_with_age(name: str) -> Table:
    """The table of this qualified name, whose rows may be dropped. Raises UnknownTable."""
    tables = {table.qualified_name: table for table in TABLES if table.age_time}
    if name not in tables:
        raise UnknownTable(f"rows of {name!r} are never dropped; choose of {', '.join(sorted(tables))}")
    return tables[name]


def kept_for(keep_days: Mapping[str, float]) -> dict[str, timedelta]:
    """How long rows stay, by the table's qualified name, where the setting keep_days says so. Raises UnknownTable."""
    try:
        tables = [table_with_age(name) for name in keep_days]
    except UnknownTable as error:
        raise UnknownTable(f"keep_days: {error}") from None
    for table in tables:
        if table.kind != "streamed":
            raise UnknownTable(f"keep_days: {table.qualified_name} is no table of the stream: scripts/drop-older-than")
    return {table.qualified_name: timedelta(days=keep_days[table.qualified_name]) for table in tables}


def is_older(file: DataFile, table: Table, before: datetime) -> bool:
    """Whether all rows of a file are from before a time."""
    return file.ends_before(table.age_time, before)


def dropped(configuration: Mapping[str, str], before: datetime) -> dict[str, str]:
    """The property that records a drop, of a table with these properties."""
    earlier = dropped_before(configuration)
    return {DROPPED_BEFORE: max(before, earlier or before).isoformat()}


def dropped_before(configuration: Mapping[str, str]) -> datetime | None:
    """The time before which rows may have been dropped; None if none were."""
    text = configuration.get(DROPPED_BEFORE)
    return datetime.fromisoformat(text) if text else None
