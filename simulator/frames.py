"""What a simulated venue sends, and when: made up by the market, or read from recordings.

A source is an iterator of frames in the order of time. A fault is a function from a source to a source.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ingestion.instruments import INSTRUMENTS
from simulator.market import Trade


@dataclass(frozen=True, slots=True)
class Frame:
    """A WebSocket message, due `at_ns` nanoseconds after the source began, for those subscribed to `stream`."""

    at_ns: int
    stream: str
    text: str


def binance_trades(trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
    """Binance's combined trade stream, with times as of a market that opened at `opened_ms`."""
    symbols = {asset: instrument.symbol for asset, instrument in INSTRUMENTS["binance"].items()}
    for trade in trades:
        symbol, at = symbols[trade.asset], opened_ms + trade.at_ms
        stream = f"{symbol.lower()}@trade"
        maker = "true" if trade.buyer_is_maker else "false"
        yield Frame(
            trade.at_ms * 1_000_000,
            stream,
            f'{{"stream":"{stream}","data":{{"e":"trade","E":{at},"s":"{symbol}","t":{trade.trade_id},'
            f'"p":"{trade.price}","q":"{trade.quantity}","T":{at},"m":{maker},"M":true}}}}',
        )


def recorded(files: Sequence[Path]) -> Iterator[Frame]:
    """The frames of recordings, merged by the time of their receipt.

    A recording has lines `receive_ns JSON`, and may be compressed by gzip. Raises ValueError for any other line.
    """
    first_ns: int | None = None
    for received_ns, stream, text in heapq.merge(*map(_lines, files), key=lambda line: line[0]):
        first_ns = received_ns if first_ns is None else first_ns
        yield Frame(received_ns - first_ns, stream, text)


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            received, _, text = line.rstrip("\n").partition(" ")
            try:
                yield int(received), json.loads(text)["stream"], text
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not `receive_ns JSON` of a combined stream: {error!r}") from error
