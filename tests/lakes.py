"""What a lake's tables hold, and where that is not what they must hold, for tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from lake.reader import read
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    Table,
)
from tests.oracle import Lake, Row, differences, missing_ids


def rows_of(root: str, table: Table) -> dict[Hashable, dict[str, Any]]:
    """The table's rows by their key; two rows of one key fail."""
    rows = read(root, table).to_pylist()
    keyed: dict[Hashable, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in table.key)
        keyed[key if len(key) > 1 else key[0]] = row
    assert len(rows) == len(keyed), f"{table.qualified_name} has keys twice"
    return keyed


def wrong_rows(root: str, expected: Lake) -> dict[str, list[str]]:
    """By table where its rows are not as the oracle says, in words; silver.gaps apart."""
    rows: list[Mapping[Hashable, Row]] = [
        *(expected.bronze, expected.silver, expected.quarantine),
        *(expected.price_5s, expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    tables = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, *GOLD)
    told = {
        table.qualified_name: differences(wanted, rows_of(root, table))
        for table, wanted in zip(tables, rows, strict=True)
    }
    return {name: words for name, words in told.items() if words}


def wrong_gaps(root: str, expected: Lake) -> list[str]:
    """Where silver.gaps does not name exactly the missing ids, each in one row that is not filled."""
    named: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    rows: Iterable[Any] = rows_of(root, SILVER_GAPS).values()
    for row in rows:
        if row["status"] != "filled" and row["first_missing"] is not None:
            instrument = (row["source"], row["symbol"], row["trade_epoch"])
            named[instrument] += range(row["first_missing"], row["last_missing"] + 1)
    missing = {instrument: sorted(ids) for instrument, ids in missing_ids(expected).items() if ids}
    return [
        f"{instrument}: missing are {missing.get(instrument, [])}, named are {sorted(named.get(instrument, []))}"
        for instrument in missing.keys() | named.keys()
        if missing.get(instrument, []) != sorted(named.get(instrument, []))
    ]
