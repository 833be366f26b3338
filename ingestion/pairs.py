"""Venues' REST: the pairs that they trade now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ingestion.rest import Rest, RestBusy

Pair = tuple[str, str, str]
"""A venue's symbol, and its base and quote currency as tickers."""

Pairs = Callable[[Rest], Awaitable[list[Pair]]]


def rows_with(rows: object, *names: str) -> list[dict[str, object]]:
    """The rows that are objects with these fields as text. Raises RestBusy where there is no list."""
    if not isinstance(rows, list):
        raise RestBusy("the answer has no list of pairs")
    return [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)]
