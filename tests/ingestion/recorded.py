"""Real trades as their recording tells them, read by a plain pattern: nothing of the suite's is used."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

_TRADE = re.compile(
    rb'(\d+) \{"stream":"\w+@trade","data":\{"e":"trade","E":\d+,'
    rb'"s":"(\w+)","t":(\d+),"p":"([\d.]+)","q":"([\d.]+)","T":(\d+),'
)


@dataclass(frozen=True)
class RecordedTrade:
    received_ns: int
    symbol: str
    trade_id: int
    price: str
    quantity: str
    made_at_ms: int


def trades(file: Path) -> list[RecordedTrade]:
    found = []
    with gzip.open(file) as lines:
        for line in lines:
            if match := _TRADE.match(line):
                received, symbol, trade_id, price, quantity, made_at = (group.decode() for group in match.groups())
                found.append(RecordedTrade(int(received), symbol, int(trade_id), price, quantity, int(made_at)))
    return found


def frames(file: Path) -> list[tuple[int, bytes]]:
    """Every line: when it was received, and the frame."""
    with gzip.open(file) as lines:
        return [(int(received), frame.strip()) for received, _, frame in (line.partition(b" ") for line in lines)]
