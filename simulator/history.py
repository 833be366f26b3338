"""What a simulated venue remembers of its trades, for its REST."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from simulator.market import Trade

KEPT = 50_000


@dataclass(frozen=True, slots=True)
class Made:
    """A trade, and when it was made, in milliseconds since 1970."""

    trade: Trade
    at_ms: int


class History:
    """The latest trades of each asset, in the order of their ids."""

    def __init__(self) -> None:
        self._made: defaultdict[str, list[Made]] = defaultdict(list)

    def add(self, trade: Trade, at_ms: int) -> None:
        made = self._made[trade.asset]
        if made and made[-1].trade.trade_id >= trade.trade_id:
            # The venue has started its numbers again.
            made.clear()
        made.append(Made(trade, at_ms))
        if len(made) > 2 * KEPT:
            del made[:KEPT]

    def latest(self, asset: str, count: int) -> Sequence[Made]:
        return self._made[asset][-count:]

    def from_id(self, asset: str, trade_id: int, count: int) -> Sequence[Made]:
        """Trades from this id up, oldest first."""
        made = self._made[asset]
        at = bisect_left(made, trade_id, key=lambda one: one.trade.trade_id)
        return made[at : at + count]

    def before_id(self, asset: str, trade_id: int, count: int) -> Sequence[Made]:
        """The latest trades below this id, oldest first."""
        made = self._made[asset]
        at = bisect_left(made, trade_id, key=lambda one: one.trade.trade_id)
        return made[max(0, at - count) : at]

    def since(self, asset: str, at_ns: int, count: int) -> Sequence[Made]:
        """Trades made after this time, oldest first."""
        made = self._made[asset]
        at = bisect_right(made, at_ns, key=lambda one: one.at_ms * 1_000_000)
        return made[at : at + count]
