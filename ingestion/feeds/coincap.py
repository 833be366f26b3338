"""CoinCap: prices, without times, quantities or numbers.

A frame is a part of the price list: `{"bitcoin":"16538.73","ethereum":"1234.94"}`. A price's time is its receipt's.
The assets are in the address, so that another choice takes another connection. The v3 address wants a key; the seed
address (v2's, wss://ws.coincap.io/prices, as the setting `url`) is used without one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from conf.text import brief
from ingestion import fields
from ingestion.feeds.venue import Venue
from ingestion.instruments import Instrument, of_table
from ingestion.rest import Rest, RestBusy
from ingestion.ticks import DIGITS, Control, Event, Ignored, Reject, Tick, is_price

URL = "wss://wss.coincap.io/prices"
REST_URL = "https://rest.coincap.io"
ALL = "ALL"

_slug = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}").fullmatch
_refusal = re.compile(rb"\s*\W?(unauthorized|forbidden|invalid api ?key)", re.IGNORECASE).match


class CoinCap:
    """The prices of some assets, or with an instrument whose symbol is ALL of all that CoinCap knows."""

    name = "coincap"
    has_trade_ids = False
    silence_seconds = 30.0
    connection_lifetime_seconds: float | None = None
    request_seconds = 0.0
    refused: Mapping[str, str] = {}

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None, api_key: str | None = None) -> None:
        self._base = url or URL
        self._api_key = api_key
        self._instruments: dict[str, Instrument] = {instrument.symbol: instrument for instrument in instruments}

    @property
    def url(self) -> str:
        """With the key: for connecting only, never for a log."""
        assets = ALL if ALL in self._instruments else ",".join(self._instruments)
        url = f"{self._base}{'&' if '?' in self._base else '?'}assets={assets}"
        return url if self._api_key is None else f"{url}&apiKey={quote(self._api_key, safe='')}"

    def opening_frames(self) -> Sequence[str]:
        """None: the address names the assets."""
        return ()

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        self._instruments |= {instrument.symbol: instrument for instrument in instruments}
        return None

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        for instrument in instruments:
            self._instruments.pop(instrument.symbol, None)
        return None

    def ask_refused(self) -> Sequence[str]:
        return ()

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        prices = fields.message(self.name, frame, received_ns)
        if isinstance(prices, Reject):
            return [Control("refused", "CoinCap does not accept the key")] if _refusal(frame) else [prices]
        if isinstance(prices.get("error"), str):
            return [Control("error", brief(prices["error"]))]
        return [self._price(slug, price, frame, received_ns) for slug, price in prices.items()]

    def _price(self, slug: str, value: object, frame: bytes, received_ns: int) -> Event:
        instrument = self._instruments.get(slug)
        if instrument is None:
            if ALL not in self._instruments:
                return Ignored("an asset not asked for")
            if not _slug(slug):
                return Reject(received_ns, self.name, f"{brief(slug)} is no name of an asset", frame)
            instrument = Instrument(slug, slug, "USD")
        price = fields.digits(value)
        if not is_price(price):
            reason = f"price of {instrument.symbol} is {brief(price)}: not above 0 with at most {DIGITS}"
            return Reject(received_ns, self.name, reason, frame, instrument.symbol)
        return Tick(received_ns, instrument.asset, price, instrument.quote, self.name, instrument.symbol)


async def largest_assets(rest: Rest, count: int) -> list[tuple[str, str]]:
    """Names and tickers of the `count` assets that are largest by market capitalisation, largest first."""
    answer = await rest.get("/v3/assets", {"limit": count})
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise RestBusy("/v3/assets: the answer has no list of assets")
    assets = [(row.get("id"), row.get("symbol")) for row in rows if isinstance(row, dict)]
    return [(slug, ticker) for slug, ticker in assets if isinstance(slug, str) and isinstance(ticker, str)][:count]


VENUE = Venue(
    name=CoinCap.name,
    instruments=of_table("{asset}", "USD"),
    contiguous_ids=False,
    feed=CoinCap,
    rest_url=REST_URL,
    all_symbol=ALL,
)
