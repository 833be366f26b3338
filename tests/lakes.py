"""What a lake's tables hold, for tests."""

from __future__ import annotations

from collections.abc import Hashable

from lake.reader import read
from lake.tables import Table


def rows_of(root: str, table: Table) -> dict[Hashable, dict[str, object]]:
    """The table's rows by their key; two rows of one key fail."""
    rows = read(root, table).to_pylist()
    keyed: dict[Hashable, dict[str, object]] = {}
    for row in rows:
        key = tuple(row[name] for name in table.key)
        keyed[key if len(key) > 1 else key[0]] = row
    assert len(rows) == len(keyed), f"{table.qualified_name} has keys twice"
    return keyed
