"""Venues' REST: their past trades.

Each reads the trades of one instrument whose numbers are `first` to `last`, page by page, as the same ticks with the
same ids that the feed would have made. A page may hold other trades too; what it does not hold, the venue does not
have.

    binance   /api/v3/historicalTrades from an id up (never aggTrades, which have other ids); weight 25 of 6,000 a
              minute
    coinbase  /products/ID/trades before a cursor, which is a trade id, newest first; 10 requests a second
    kraken    /0/public/Trades since a time in nanoseconds, oldest first; about one request a second
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ingestion.feeds import fields
from ingestion.instruments import Instrument
from ingestion.rest import Rest, RestBusy, RestRefused
from ingestion.ticks import Reject, Tick

PAGE = 1000
# Kraken's REST has its own names of two currencies.
KRAKEN_NAMES = {"BTC": "XBT", "DOGE": "XDG"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Trades `first` to `last` of an instrument; the trade before was made at `before_ns`, if that is known."""

    instrument: Instrument
    first: int
    last: int
    before_ns: int | None
    epoch: int = 0


Pages = Callable[[Rest, Wanted, Callable[[], int]], AsyncIterator[list[Tick | Reject]]]


@dataclass(frozen=True, slots=True)
class Venue:
    """Where a venue's REST is, how often it may be asked, and how its past trades are read."""

    url: str
    least_seconds: float
    pages: Pages


async def binance_pages(rest: Rest, wanted: Wanted, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    at = wanted.first
    while at <= wanted.last:
        limit = min(PAGE, wanted.last - at + 1)
        query: dict[str, str | int] = {"symbol": wanted.instrument.symbol, "fromId": at, "limit": limit}
        page = _rows(await rest.get("/api/v3/historicalTrades", query))
        ticks = []
        for row in page:
            made_at = row.get("time")
            event_ns = made_at * 1_000_000 if type(made_at) is int else None
            ticks.append(_trade("binance", wanted, row, ("id", "price", "qty", "time"), event_ns, now_ns()))
        if not ticks:
            return
        yield ticks
        at = max(at, max(tick.trade_id or 0 for tick in ticks)) + 1


async def coinbase_pages(rest: Rest, wanted: Wanted, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    cursor = wanted.last + 1
    while cursor > wanted.first:
        query = {"limit": min(PAGE, cursor - wanted.first), "after": cursor}
        page = _rows(await rest.get(f"/products/{wanted.instrument.symbol}/trades", query))
        ticks = []
        for row in page:
            event_ns = fields.utc_ns(row.get("time"))
            ticks.append(_trade("coinbase", wanted, row, ("trade_id", "price", "size", "time"), event_ns, now_ns()))
        lowest = min((tick.trade_id or 0 for tick in ticks), default=0)
        if not ticks or lowest >= cursor:
            return
        # Oldest first, like a feed.
        yield ticks[::-1]
        cursor = lowest


async def kraken_pages(rest: Rest, wanted: Wanted, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    if wanted.before_ns is None:
        raise RestRefused("Kraken is asked by time, and the time of the trade before the gap is not known")
    base, _, quote = wanted.instrument.symbol.partition("/")
    pair = f"{KRAKEN_NAMES.get(base, base)}{quote}"
    since = wanted.before_ns - 1
    while True:
        answer = await rest.get("/0/public/Trades", {"pair": pair, "since": since, "count": PAGE})
        page, last = _kraken_result(answer)
        names = ("id", "price", "volume", "time")
        ticks = [_trade("kraken", wanted, row, names, event_ns, now_ns()) for row, event_ns in page]
        if ticks:
            yield ticks
        if not ticks or last <= since or max(tick.trade_id or 0 for tick in ticks) >= wanted.last:
            return
        since = last


def _kraken_result(answer: object) -> tuple[list[tuple[dict[str, object], int | None]], int]:
    """The trades of an answer with their times, and from where to go on."""
    if not isinstance(answer, dict):
        raise RestBusy("the answer is not an object")
    errors = answer.get("error")
    if isinstance(errors, list) and errors:
        text = ", ".join(map(str, errors))[:200]
        if any(str(one).startswith(("EGeneral:Too many", "EAPI:Rate", "EService")) for one in errors):
            raise RestBusy(text)
        raise RestRefused(text)
    result = answer.get("result")
    if not isinstance(result, dict) or not str(result.get("last", "")).isdecimal():
        raise RestBusy("the answer has no trades")
    trades = next((rows for name, rows in result.items() if name != "last" and isinstance(rows, list)), [])
    rows: list[tuple[dict[str, object], int | None]] = []
    for trade in trades:
        if not isinstance(trade, list) or len(trade) < 7:
            raise RestBusy("a trade of the answer has not seven fields")
        row = {"price": trade[0], "volume": trade[1], "time": trade[2], "id": trade[6]}
        rows.append((row, fields.epoch_ns(trade[2])))
    return rows, int(str(result["last"]))


def _rows(answer: object) -> list[dict[str, object]]:
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise RestBusy("the answer is not a list of trades")
    return answer


def _trade(
    source: str,
    wanted: Wanted,
    row: dict[str, object],
    names: tuple[str, str, str, str],
    event_ns: int | None,
    received_ns: int,
) -> Tick | Reject:
    raw = json.dumps(row).encode()
    return fields.trade(source, wanted.instrument, row, names, event_ns, raw, received_ns, wanted.epoch)


VENUES = {
    "binance": Venue("https://api.binance.com", 0.5, binance_pages),
    "coinbase": Venue("https://api.exchange.coinbase.com", 0.2, coinbase_pages),
    "kraken": Venue("https://api.kraken.com", 1.0, kraken_pages),
}
