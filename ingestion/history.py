"""Venues' REST: their past trades.

Each venue reads the trades of one instrument whose numbers are `first` to `last`, page by page, as the same ticks with
the same ids that the feed would have made. A page may hold other trades too; what it does not hold, the venue does not
have.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ingestion import fields
from ingestion.instruments import Instrument
from ingestion.rest import Rest, RestBusy
from ingestion.ticks import Reject, Tick

PAGE = 1000


@dataclass(frozen=True, slots=True)
class Trades:
    """Trades `first` to `last` of an instrument; the trade before was made at `before_ns`, if that is known."""

    instrument: Instrument
    first: int
    last: int
    before_ns: int | None
    epoch: int = 0


Pages = Callable[[Rest, Trades, Callable[[], int]], AsyncIterator[list[Tick | Reject]]]


@dataclass(frozen=True, slots=True)
class History:
    """How often a venue's REST may be asked for past trades, and how they are read."""

    least_seconds: float
    pages: Pages


def rows(answer: object) -> list[dict[str, object]]:
    """The objects of an answer that is a list of trades. Raises RestBusy if it is none."""
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise RestBusy("the answer is not a list of trades")
    return answer


def trade(
    source: str,
    trades: Trades,
    row: dict[str, object],
    names: tuple[str, str, str, str],
    event_ns: int | None,
    received_ns: int,
) -> Tick | Reject:
    """A past trade, as `fields.trade` reads one of a frame."""
    raw = json.dumps(row).encode()
    return fields.trade(source, trades.instrument, row, names, event_ns, raw, received_ns, trades.epoch)
