"""CoinCap: prices, without times, quantities or numbers.

A frame is a part of the price list: `{"bitcoin":"16538.73","ethereum":"1234.94"}`. A price's time is its receipt's.
The assets are in the address, so that another choice takes another connection. The v3 address wants a key; the seed
address (v2's, wss://ws.coincap.io/prices, as the setting `url`) is used without one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from ingestion.feeds import fields
from ingestion.instruments import Instrument
from ingestion.ticks import DIGITS, Control, Event, Ignored, Reject, Tick, is_price

URL = "wss://wss.coincap.io/prices"
ALL = "ALL"

_slug = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}").fullmatch
_refusal = re.compile(rb"\s*\W?(unauthorized|forbidden|invalid api ?key)", re.IGNORECASE).match


class CoinCap:
    """The prices of some assets, or with an instrument whose symbol is ALL of all that CoinCap knows."""

    name = "coincap"
    silence_seconds = 30.0
    connection_lifetime_seconds: float | None = None

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None, api_key: str | None = None) -> None:
        self._base = url or URL
        self._api_key = api_key
        self._wanted: dict[str, Instrument] = {instrument.symbol: instrument for instrument in instruments}

    @property
    def url(self) -> str:
        """With the key: for connecting only, never for a log."""
        assets = ALL if ALL in self._wanted else ",".join(self._wanted)
        url = f"{self._base}{'&' if '?' in self._base else '?'}assets={assets}"
        return url if self._api_key is None else f"{url}&apiKey={quote(self._api_key, safe='')}"

    def opening_frames(self) -> Sequence[str]:
        """None: the address names the assets."""
        return ()

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        self._wanted |= {instrument.symbol: instrument for instrument in instruments}
        return None

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        for instrument in instruments:
            self._wanted.pop(instrument.symbol, None)
        return None

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        prices = fields.message(self.name, frame, received_ns)
        if isinstance(prices, Reject):
            return [Control("refused", "CoinCap does not accept the key")] if _refusal(frame) else [prices]
        if isinstance(prices.get("error"), str):
            return [Control("error", fields.shown(prices["error"]))]
        return [self._price(slug, price, frame, received_ns) for slug, price in prices.items()]

    def _price(self, slug: str, value: object, frame: bytes, received_ns: int) -> Event:
        instrument = self._wanted.get(slug)
        if instrument is None:
            if ALL not in self._wanted:
                return Ignored("an asset not asked for")
            if not _slug(slug):
                return Reject(received_ns, self.name, f"{fields.shown(slug)} is no name of an asset", frame)
            instrument = Instrument(slug, slug, "USD")
        price = fields.digits(value)
        if not is_price(price):
            reason = f"price of {instrument.symbol} is {fields.shown(price)}: not above 0 with at most {DIGITS}"
            return Reject(received_ns, self.name, reason, frame, instrument.symbol)
        return Tick(received_ns, instrument.asset, price, instrument.quote, self.name, instrument.symbol)
