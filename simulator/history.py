"""What a simulated venue remembers of its trades, for its REST."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from simulator.market import Trade

KEPT = 50_000


@dataclass(frozen=True, slots=True)
class Execution:
    """A trade, and when it was made, in milliseconds since 1970."""

    trade: Trade
    at_ms: int


class History:
    """The latest trades of each asset, in the order of their ids."""

    def __init__(self) -> None:
        self._executions: defaultdict[str, list[Execution]] = defaultdict(list)

    def add(self, trade: Trade, at_ms: int) -> None:
        executions = self._executions[trade.asset]
        if executions and executions[-1].trade.trade_id >= trade.trade_id:
            # The venue has started its numbers again.
            executions.clear()
        executions.append(Execution(trade, at_ms))
        if len(executions) > 2 * KEPT:
            del executions[:KEPT]

    def latest(self, asset: str, count: int) -> Sequence[Execution]:
        return self._executions[asset][-count:]

    def from_id(self, asset: str, trade_id: int, count: int) -> Sequence[Execution]:
        """Trades from this id up, oldest first."""
        executions = self._executions[asset]
        at = bisect_left(executions, trade_id, key=lambda one: one.trade.trade_id)
        return executions[at : at + count]

    def before_id(self, asset: str, trade_id: int, count: int) -> Sequence[Execution]:
        """The latest trades below this id, oldest first."""
        executions = self._executions[asset]
        at = bisect_left(executions, trade_id, key=lambda one: one.trade.trade_id)
        return executions[max(0, at - count) : at]

    def since(self, asset: str, at_ns: int, count: int) -> Sequence[Execution]:
        """Trades made after this time, oldest first."""
        executions = self._executions[asset]
        at = bisect_right(executions, at_ns, key=lambda one: one.at_ms * 1_000_000)
        return executions[at : at + count]
