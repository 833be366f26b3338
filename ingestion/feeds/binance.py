"""Binance: the combined trade stream.

A frame is
`{"stream":"btcusdt@trade","data":{"e":"trade","E":ms,"s":"BTCUSDT","t":id,"p":"price","q":"quantity","T":ms,"m":true}}`.
Trade ids (t) have no holes per symbol. E is when the event was sent, T when the trade was made: T is the tick's time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ingestion.instruments import Instrument
from ingestion.ticks import DIGITS, END_OF_TIME_NS, Event, Ignored, Reject, Tick, is_price, is_quantity

# The market-data-only address: keyless, and open where the trading address is not.
URL = "wss://data-stream.binance.vision/stream"

# Streams that are no trades, as Binance documents them: harmless if a server sends them unasked.
_OTHER_STREAM = re.compile(
    r"[a-z0-9]+@(aggTrade|avgPrice|bookTicker|miniTicker|ticker(_\w+)?|kline_\w+|depth\d*(@\d+ms)?)|!\w+@arr(@\d+ms)?"
)


def _no_number(text: str) -> str:
    raise ValueError(f"{text} is not JSON")


# Numbers with a point stay text, so that no digit passes through a float.
_decode = json.JSONDecoder(parse_float=str, parse_constant=_no_number).decode


class Binance:
    """The trades of some instruments, on one connection."""

    name = "binance"

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self._by_stream = {f"{instrument.symbol.lower()}@trade": instrument for instrument in instruments}
        base = url or URL
        self.url = f"{base}{'&' if '?' in base else '?'}streams={'/'.join(self._by_stream)}"

    def opening_frames(self) -> Sequence[str]:
        """None: the address names the streams."""
        return ()

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        try:
            message = _decode(str(frame, "utf-8"))
        except (ValueError, RecursionError) as error:
            return [Reject(received_ns, self.name, f"not JSON: {error}"[:200], frame)]
        if not isinstance(message, dict):
            return [Reject(received_ns, self.name, "not a JSON object", frame)]
        stream, trade = message.get("stream"), message.get("data")
        if not isinstance(stream, str) or not isinstance(trade, dict):
            if "result" in message and "id" in message:
                return [Ignored("reply")]
            return [Reject(received_ns, self.name, "neither a stream with data nor a reply", frame)]
        instrument = self._by_stream.get(stream)
        if instrument is None:
            if _OTHER_STREAM.fullmatch(stream):
                return [Ignored(stream.partition("@")[2])]
            return [Reject(received_ns, self.name, f"unknown stream {stream[:80]!r}", frame)]
        return [self._trade(instrument, trade, frame, received_ns)]

    def _trade(self, instrument: Instrument, trade: dict[str, object], frame: bytes, received_ns: int) -> Tick | Reject:
        trade_id = trade.get("t")
        if trade.get("e") != "trade":
            return Reject(received_ns, self.name, f"event {_shown(trade.get('e'))} on a trade stream", frame)
        if trade.get("s") != instrument.symbol:
            reason = f"unknown symbol {_shown(trade.get('s'))} on the stream of {instrument.symbol}"
            return Reject(received_ns, self.name, reason, frame)
        if type(trade_id) is not int or not 0 <= trade_id < 2**63:
            return Reject(received_ns, self.name, f"trade id t is {_shown(trade_id)}", frame, instrument.symbol)

        price, quantity, made_at = _digits(trade.get("p")), _digits(trade.get("q")), trade.get("T")
        if not is_price(price):
            reason = f"price p is {_shown(price)}: not above 0 with at most {DIGITS}"
        elif not is_quantity(quantity):
            reason = f"quantity q is {_shown(quantity)}: not 0 or more with at most {DIGITS}"
        elif type(made_at) is not int or not 0 < made_at * 1_000_000 < END_OF_TIME_NS:
            reason = f"trade time T is {_shown(made_at)}: not milliseconds since 1970"
        else:
            return Tick(
                received_ns=received_ns,
                asset=instrument.asset,
                price_usd=price,
                quote=instrument.quote,
                source=self.name,
                symbol=instrument.symbol,
                event_ns=made_at * 1_000_000,
                quantity=quantity,
                trade_id=trade_id,
            )
        return Reject(received_ns, self.name, reason, frame, instrument.symbol, trade_id)


def _digits(value: object) -> object:
    """A number without a point arrives as an int; its digits are its text."""
    return str(value) if type(value) is int else value


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]
