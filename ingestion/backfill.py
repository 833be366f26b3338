"""Gaps: reported on their topic, and filled from the venues' past trades."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ingestion.feeds import VENUES
from ingestion.gaps import Gap, GapTracker
from ingestion.history import PAGE, History, Trades
from ingestion.instruments import Instrument
from ingestion.rest import Rest, RestBusy, RestRefused
from ingestion.ticks import Reject, Tick

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
# A venue's history may come a little behind its feed: what it does not have is asked for again after so long each.
PATIENCE_SECONDS = (1.0, 5.0)
# While a venue's REST does not answer at all, it is asked no less often than this.
LONGEST_WAIT = 60.0


class Outlet(Protocol):
    """Where reports and backfilled trades go: the same way as a feed's.

    What the tracker has noted must not be lost, so taking it is no matter of waiting: `room` is.
    """

    async def room(self) -> None:
        """Wait until more can be taken."""

    def report(self, gap: Gap) -> None:
        """Take a row of silver.gaps."""

    def backfilled(self, trade: Tick | Reject) -> None:
        """Take a trade that was missing and is not from the feed."""


@dataclass(slots=True)
class _Attempt:
    """What was tried for a gap so far."""

    count: int = 0
    not_before: float = 0.0


class Backfill:
    """Looks after the gaps of one source: reports what the tracker finds, and fills what can be filled."""

    def __init__(
        self,
        source: str,
        tracker: GapTracker,
        outlet: Outlet,
        now_ns: Callable[[], int],
        instrument_of: Callable[[str], Instrument | None],
        *,
        rest_url: str | None,
        most_trades: int,
        market_data_url: str | None = None,
        proxy: str | None = None,
    ) -> None:
        """`instrument_of` knows the source's symbols. Without `rest_url` nothing can be filled, nor are gaps of more
        than `most_trades`."""
        self._source = source
        self._tracker = tracker
        self._outlet = outlet
        self._now_ns = now_ns
        self._instrument_of = instrument_of
        self._history: History | None = VENUES[source].history if source in VENUES else None
        self._rest_url = rest_url
        self._most_trades = most_trades
        self._market_data_url = market_data_url
        self._proxy = proxy
        self._attempts: dict[str, _Attempt] = {}
        self._not_before = 0.0
        self._busy = 0
        self.filled = 0
        """Trades that were missing and came from the venue's history."""
        self.unfillable = 0
        """Trades that are missing for good."""

    async def run(self) -> None:
        """Until cancelled."""
        if self._history is None or self._rest_url is None:
            while True:
                await self.report()
                await self._due()
                await asyncio.sleep(LOOK_SECONDS)
        async with Rest(
            self._rest_url,
            self._history.least_seconds,
            proxy=self._proxy,
            market_data_url=self._market_data_url,
        ) as rest:
            filling: asyncio.Task[None] | None = None
            try:
                while True:
                    await self.report()
                    if filling is None or filling.done():
                        if filling is not None:
                            filling.result()
                        filling = asyncio.create_task(self._fill_all(rest, self._history))
                    await asyncio.sleep(LOOK_SECONDS)
            finally:
                if filling is not None:
                    filling.cancel()

    async def report(self) -> None:
        """Report what has changed since the last time."""
        await self._outlet.room()
        self._tell(self._tracker.changes(self._now_ns()))

    def _tell(self, gaps: list[Gap]) -> None:
        for gap in gaps:
            self._outlet.report(gap)
        for status, count in Counter(gap.status for gap in gaps).items():
            first = next(gap for gap in gaps if gap.status == status)
            trades = sum(gap.count for gap in gaps if gap.status == status)
            log.info(
                "%d gaps %s, %d trades; the first: %s%s",
                count,
                status,
                trades,
                first.gap_id,
                f" ({first.reason})" if first.reason else "",
            )

    async def _due(self) -> list[tuple[Gap, int | None]]:
        """The gaps to ask for now. Those that it makes no sense to ask for are given up."""
        now = asyncio.get_running_loop().time()
        gaps = [(gap, before) for gap, before in self._tracker.open_gaps() if gap.source == self._source]
        attempts = self._attempts
        self._attempts = {gap.gap_id: attempts.get(gap.gap_id, _Attempt()) for gap, _ in gaps}
        due = []
        for gap, before_ns in gaps:
            reason = self._hopeless(gap)
            if reason is not None:
                await self._give_up(gap, reason)
            elif self._attempts[gap.gap_id].not_before <= now:
                due.append((gap, before_ns))
        return due

    async def _fill_all(self, rest: Rest, history: History) -> None:
        loop = asyncio.get_running_loop()
        due = await self._due()
        if loop.time() < self._not_before:
            return
        for group in _groups(due):
            try:
                await self._fill(rest, history, group)
                self._busy = 0
            except RestBusy as busy:
                wait = max(busy.wait, min(busy.wait * 2**self._busy, LONGEST_WAIT))
                self._busy = min(self._busy + 1, 10)
                self._not_before = loop.time() + wait
                log.warning("%s: %s; asking for what is missing again in %.0f s", self._source, busy, wait)
                return
            except RestRefused as refused:
                for gap, _ in group:
                    await self._give_up(gap, str(refused))

    async def _give_up(self, gap: Gap, reason: str) -> None:
        await self._outlet.room()
        rows = self._tracker.give_up(gap, reason, self._now_ns())
        self.unfillable += sum(row.count for row in rows if row.status == "unfillable")
        self._tell(rows)

    def _hopeless(self, gap: Gap) -> str | None:
        """Why asking for this gap makes no sense; None if it does."""
        if self._rest_url is None:
            return "no REST address is set for a feed that is not at its venue's own address"
        if gap.trade_epoch != self._tracker.epoch(gap.source, gap.symbol):
            return "the venue has started its numbers again since"
        if gap.count > self._most_trades:
            return f"it is larger than backfill_max_trades ({self._most_trades})"
        if self._instrument_of(gap.symbol) is None:
            return "its symbol is not followed any more"
        return None

    async def _fill(self, rest: Rest, history: History, group: list[tuple[Gap, int | None]]) -> None:
        """Ask for gaps of one symbol that lie near each other; give up what the venue has finally shown not to have."""
        first, before_ns = group[0]
        last = group[-1][0]
        instrument = self._instrument_of(first.symbol)
        assert instrument is not None
        assert first.first_missing is not None
        assert last.last_missing is not None
        trades = Trades(instrument, first.first_missing, last.last_missing, before_ns, first.trade_epoch)
        async for page in history.pages(rest, trades, self._now_ns):
            for trade in page:
                await self._outlet.room()
                if self._tracker.observe_backfilled(trade, first.trade_epoch):
                    self._outlet.backfilled(trade)
                    self.filled += 1
            # Others have their turn.
            await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        for gap, _ in group:
            attempt = self._attempts[gap.gap_id]
            if not self._tracker.missing(gap):
                continue
            if attempt.count < len(PATIENCE_SECONDS):
                attempt.not_before = now + PATIENCE_SECONDS[attempt.count]
                attempt.count += 1
            else:
                await self._give_up(gap, "the venue's history does not have it")


def _groups(gaps: list[tuple[Gap, int | None]]) -> Iterator[list[tuple[Gap, int | None]]]:
    """Gaps of one symbol that one page can hold, together."""

    def place(pair: tuple[Gap, int | None]) -> tuple[str, int, int]:
        return pair[0].symbol, pair[0].trade_epoch, pair[0].first_missing or 0

    for _, alike in itertools.groupby(sorted(gaps, key=place), lambda pair: place(pair)[:2]):
        group: list[tuple[Gap, int | None]] = []
        for pair in alike:
            if group and (pair[0].last_missing or 0) - (group[0][0].first_missing or 0) >= PAGE:
                yield group
                group = []
            group.append(pair)
        yield group
