"""Which trades are missing.

A venue that numbers its trades numbers them without holes, per symbol. The tracker follows the numbers across
disconnections and restarts. A number that is left out makes a hole; one that is not filled within a second (trades of
two overlapping connections mix) is reported as a gap. A gap is filled by ticks, from wherever they come; what is filled
of it in part is split off. A venue that does not number its prices has gaps too: from a disconnection to the next
price.

A message on the topic `gaps` is a row of silver.gaps as one JSON object; a later row replaces an earlier one of the
same gap_id:

    gap_id, source, symbol, trade_epoch, first_missing, last_missing, disconnected_at, detected_at, status, reason,
    filled_at, filled_by

Times in memory are integer nanoseconds since 1970 in UTC.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Literal

from ingestion.ticks import Reject, Tick, utc

Status = Literal["open", "filled", "unfillable"]

SETTLE_NS = 1_000_000_000
# A heartbeat may overtake the trade that it tells of.
MENTION_NS = 2_000_000_000
# How far ahead a number is believed that comes without its trade. The next trade tells of more.
MENTION_AHEAD = 1_000_000
# A repeated trade is not younger than the newest one. A trade that is, and has a lower number, tells that the venue has
# started its numbers again; those made within a moment of each other are told apart only by a long way back.
AGAIN_NS, AGAIN_IDS = 1_000_000_000, 10_000
# How far ahead the number of a broken trade is believed.
REJECT_AHEAD = 1_000
MOST_ABANDONED = 64


@dataclass(frozen=True, slots=True)
class Gap:
    """A row of silver.gaps."""

    gap_id: str
    source: str
    symbol: str
    trade_epoch: int
    first_missing: int | None
    last_missing: int | None
    disconnected_at: int | None
    detected_at: int
    status: Status = "open"
    reason: str | None = None
    filled_at: int | None = None
    filled_by: str | None = None

    @property
    def key(self) -> bytes:
        return f"{self.source}:{self.symbol}".encode()

    @property
    def count(self) -> int:
        """How many trades; 0 where the venue does not number them."""
        if self.first_missing is None or self.last_missing is None:
            return 0
        return self.last_missing - self.first_missing + 1

    def to_json(self) -> bytes:
        row = asdict(self)
        for name in ("disconnected_at", "detected_at", "filled_at"):
            row[name] = None if row[name] is None else utc(row[name])
        return json.dumps(row, separators=(",", ":")).encode()


@dataclass(slots=True)
class _Hole:
    """Numbers not seen, `first` to `last`."""

    epoch: int
    first: int
    last: int
    found_ns: int
    disconnected_ns: int | None
    before_ns: int | None
    """The venue's time of the last trade before it."""
    reported: bool = False


@dataclass(slots=True)
class _Line:
    """What is known of one symbol of one source."""

    epoch: int = 0
    numbered: bool = False
    highest: int | None = None
    """The highest number that is known to exist, with or without its trade."""
    first: int | None = None
    """The number from which on all trades up to the highest have come, but for those in holes and abandoned ones."""
    abandoned: list[tuple[int, int, int]] = field(default_factory=list)
    """(epoch, first, last) of holes that were given up lately: what still comes of them has not come before."""
    newest: int | None = None
    """The highest number of a trade that has come, and"""
    event_ns: int | None = None
    """the venue's time of that trade. A number above it was only mentioned, or came broken: its time is not known."""
    received_ns: int = 0
    disconnected_ns: int | None = None
    mentioned: tuple[int, int] | None = None
    """A trade's number that was told without the trade, and when."""
    holes: list[_Hole] = field(default_factory=list)
    """In the order of their epochs and numbers, as they are found."""
    touched: bool = False
    """Whether a hole was filled, in part at least, since the last report."""
    rows: dict[str, Gap] = field(default_factory=dict)
    """The gaps as they were reported, while they are open."""
    changed: list[Gap] = field(default_factory=list)
    """To be reported."""
    backfilled: list[tuple[int, int, int]] = field(default_factory=list)
    """(epoch, first, last) that a backfill has brought, since the last report."""


class GapTracker:
    """Follows every symbol of every source. Does no input or output, and asks no clock."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], _Line] = {}

    def observe(self, tick: Tick) -> Tick:
        """Take note of a feed's tick; the tick itself, with the epoch that it belongs to."""
        line = self._line(tick.source, tick.symbol)
        trade_id = tick.trade_id
        if trade_id is None:
            self._price(line, tick)
            return tick
        highest = line.highest
        if highest is None or trade_id > highest:
            if highest is not None and trade_id != highest + 1:
                self._leave_out(line, trade_id, tick.received_ns)
            line.numbered = True
            line.highest = trade_id
            if line.first is None:
                line.first = trade_id
            _note_newest(line, tick)
            line.received_ns = tick.received_ns
            line.disconnected_ns = None
        elif _numbers_began_again(line, trade_id, tick.event_ns):
            line.epoch += 1
            line.first = line.highest = line.newest = trade_id
            line.event_ns = tick.event_ns
            line.received_ns = tick.received_ns
            line.disconnected_ns = line.mentioned = None
        else:
            _note_newest(line, tick)
            if line.holes:
                _fill(line, line.epoch, trade_id)
        return tick if line.epoch == tick.trade_epoch else replace(tick, trade_epoch=line.epoch)

    def has(self, trade: Tick | Reject) -> bool:
        """Whether this trade of a feed has come before, by its id."""
        if trade.trade_id is None or trade.symbol is None:
            return False
        line = self._lines.get((trade.source, trade.symbol))
        if line is None or line.first is None or line.highest is None:
            return False
        if not line.first <= trade.trade_id <= line.highest:
            return False
        if isinstance(trade, Tick) and _numbers_began_again(line, trade.trade_id, trade.event_ns):
            return False
        lost = any(epoch == line.epoch and low <= trade.trade_id <= high for epoch, low, high in line.abandoned)
        return not lost and _hole_of(line, line.epoch, trade.trade_id) is None

    def observe_reject(self, reject: Reject) -> None:
        """Take note of a trade that came broken: a number that still could be read is not missing."""
        if reject.trade_id is None or reject.symbol is None:
            return
        line = self._lines.get((reject.source, reject.symbol))
        if line is None or line.highest is None:
            return
        if reject.trade_id <= line.highest:
            _fill(line, line.epoch, reject.trade_id)
        elif reject.trade_id <= line.highest + REJECT_AHEAD:
            if reject.trade_id != line.highest + 1:
                self._leave_out(line, reject.trade_id, reject.received_ns)
            line.highest = reject.trade_id
            line.received_ns = reject.received_ns

    def observe_backfilled(self, trade: Tick | Reject, epoch: int) -> bool:
        """Take note of a trade from a venue's history, of the epoch that was asked for; whether it was missing."""
        if trade.trade_id is None or trade.symbol is None:
            return False
        line = self._line(trade.source, trade.symbol)
        if not _fill(line, epoch, trade.trade_id):
            return False
        if isinstance(trade, Tick) and epoch == line.epoch:
            _note_newest(line, trade)
        if line.backfilled and line.backfilled[-1][::2] == (epoch, trade.trade_id - 1):
            line.backfilled[-1] = (epoch, line.backfilled[-1][1], trade.trade_id)
        else:
            line.backfilled.append((epoch, trade.trade_id, trade.trade_id))
        return True

    def observe_again(self, tick: Tick) -> None:
        """Take note of a tick that was observed before a crash, after the state that was restored."""
        line = self._line(tick.source, tick.symbol)
        if tick.trade_id is not None and tick.trade_epoch > line.epoch:
            line.epoch, line.first, line.highest, line.mentioned = tick.trade_epoch, None, None, None
            line.newest = line.event_ns = None
        elif tick.trade_id is not None and line.highest is not None and tick.trade_id <= line.highest:
            _fill(line, tick.trade_epoch, tick.trade_id)
            if tick.trade_epoch == line.epoch:
                _note_newest(line, tick)
            return
        self.observe(tick)

    def mentioned(self, source: str, symbol: str, last_trade_id: int, at_ns: int) -> None:
        """A venue tells its latest trade's number, as a heartbeat does."""
        line = self._line(source, symbol)
        if line.highest is None:
            line.numbered = True
            line.highest = last_trade_id
            line.received_ns = at_ns
        elif line.highest < last_trade_id <= line.highest + MENTION_AHEAD and line.mentioned is None:
            line.mentioned = (last_trade_id, at_ns)

    def disconnected(self, source: str, at_ns: int, symbols: Container[str] | None = None) -> None:
        """The last connection to a source has ended; or the last one that brought these symbols."""
        for (of, symbol), line in self._lines.items():
            if of == source and (symbols is None or symbol in symbols):
                self._disconnected(source, symbol, line, at_ns)

    def observe_report(self, gap: Gap) -> None:
        """Take note of a row that was reported before a restart: it is not reported again as it was."""
        line = self._line(gap.source, gap.symbol)
        line.touched = True
        if gap.status == "open":
            line.rows[gap.gap_id] = gap
            for hole in _inside(gap, line.holes):
                hole.reported = True
            return
        before = line.rows.pop(gap.gap_id, None)
        if before is not None:
            # Where the row was split, the other parts' rows follow; should they be lost, they are reported anew.
            for hole in _inside(before, line.holes):
                hole.reported = False
        if gap.status == "unfillable":
            for hole in _inside(gap, line.holes):
                line.holes.remove(hole)

    def resumed(self) -> None:
        """After a restart: from the last tick of each symbol on, nothing was received."""
        for (source, symbol), line in self._lines.items():
            self._disconnected(source, symbol, line, line.received_ns)

    def sources(self) -> set[str]:
        """Of which anything is known."""
        return {source for source, _ in self._lines}

    def follow_anew(self, source: str, symbol: str) -> None:
        """A symbol is not wanted, or again after a time in which it was not: what is made meanwhile is not missing."""
        line = self._lines.get((source, symbol))
        if line is not None:
            line.first = line.highest = line.newest = line.event_ns = None
            line.disconnected_ns = line.mentioned = None
            line.received_ns = 0

    def follow_only(self, source: str, symbols: Container[str]) -> None:
        """After a restart: none but these symbols of a source are still wanted."""
        for of, symbol in self._lines:
            if of == source and symbol not in symbols:
                self.follow_anew(of, symbol)

    def clock_moved(self, by_ns: int) -> None:
        """The clock of receipt times was set: what waits for its time to pass goes on waiting as long as it would have.

        Times that were reported stay as they were.
        """
        for line in self._lines.values():
            if line.mentioned is not None:
                line.mentioned = line.mentioned[0], line.mentioned[1] + by_ns
            for hole in line.holes:
                if not hole.reported:
                    hole.found_ns += by_ns

    def changes(self, now_ns: int) -> list[Gap]:
        """The rows to report: new gaps, and those that were filled or filled in part since the last call."""
        rows: list[Gap] = []
        for (source, symbol), line in self._lines.items():
            if line.holes or line.rows or line.mentioned or line.changed:
                rows += self._changes(source, symbol, line, now_ns)
        return rows

    def missing(self, gap: Gap) -> int:
        """How many trades of a reported gap have not come."""
        line = self._line(gap.source, gap.symbol)
        return sum(hole.last - hole.first + 1 for hole in _inside(gap, line.holes))

    def open_gaps(self) -> list[tuple[Gap, int | None]]:
        """Reported gaps with numbers, oldest first, each with the venue's time of the last trade before it."""
        open_rows = []
        for line in self._lines.values():
            for row in line.rows.values():
                holes = _inside(row, line.holes)
                if holes:
                    open_rows.append((row, holes[0].before_ns))
        return sorted(open_rows, key=lambda pair: pair[0].detected_at)

    def give_up(self, gap: Gap, reason: str, now_ns: int) -> list[Gap]:
        """What is still missing of a gap is not to be had. The rows to report."""
        line = self._line(gap.source, gap.symbol)
        rows = self._changes(gap.source, gap.symbol, line, now_ns)
        same = line.rows.get(gap.gap_id) == gap
        for row in [gap] if same else [row for row in line.rows.values() if _overlap(row, gap)]:
            del line.rows[row.gap_id]
            for hole in _inside(row, line.holes):
                line.abandoned.append((hole.epoch, hole.first, hole.last))
                del line.abandoned[:-MOST_ABANDONED]
                del line.holes[bisect_left(line.holes, _place(hole), key=_place)]
            rows.append(replace(row, status="unfillable", reason=reason))
        return rows

    def epoch(self, source: str, symbol: str) -> int:
        """How often the venue has started this symbol's numbers again."""
        return self._line(source, symbol).epoch

    def open_gap_count(self, source: str) -> int:
        """Gaps of a source that were reported and are still open."""
        return sum(len(line.rows) for (of, _), line in tuple(self._lines.items()) if of == source)

    # State that survives a restart

    def to_json(self) -> dict[str, Any]:
        """All that is known, for `from_json`."""
        return {
            "lines": [
                {
                    "source": source,
                    "symbol": symbol,
                    "epoch": line.epoch,
                    "numbered": line.numbered,
                    "highest": line.highest,
                    "first": line.first,
                    "abandoned": line.abandoned,
                    "newest": line.newest,
                    "event_ns": line.event_ns,
                    "received_ns": line.received_ns,
                    "disconnected_ns": line.disconnected_ns,
                    "holes": [astuple(hole) for hole in line.holes],
                    "rows": [astuple(gap) for gap in line.rows.values()],
                }
                for (source, symbol), line in self._lines.items()
            ]
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> GapTracker:
        tracker = cls()
        for line in state["lines"]:
            tracker._lines[line["source"], line["symbol"]] = _Line(
                epoch=line["epoch"],
                numbered=line["numbered"],
                highest=line["highest"],
                # A state of an earlier version did not tell these.
                first=line.get("first"),
                abandoned=[(epoch, first, last) for epoch, first, last in line.get("abandoned", ())],
                newest=line.get("newest", line["highest"]),
                event_ns=line["event_ns"],
                received_ns=line["received_ns"],
                disconnected_ns=line["disconnected_ns"],
                holes=[_Hole(*hole) for hole in line["holes"]],
                # What was filled before the state was saved may not have been reported yet.
                touched=True,
                rows={gap.gap_id: gap for gap in (Gap(*row) for row in line["rows"])},
            )
        return tracker

    # Within

    def _line(self, source: str, symbol: str) -> _Line:
        line = self._lines.get((source, symbol))
        if line is None:
            line = self._lines[source, symbol] = _Line()
        return line

    def _leave_out(self, line: _Line, trade_id: int, found_ns: int) -> None:
        """The numbers between the highest and this one."""
        assert line.highest is not None
        line.holes.append(
            _Hole(line.epoch, line.highest + 1, trade_id - 1, found_ns, line.disconnected_ns, line.event_ns)
        )

    def _price(self, line: _Line, tick: Tick) -> None:
        if line.disconnected_ns is not None:
            gap = _unnumbered(tick.source, tick.symbol, line.disconnected_ns)
            line.rows.pop(gap.gap_id, None)
            reason = f"the venue does not number its prices; the next one came at {utc(tick.received_ns)}"
            line.changed.append(replace(gap, status="unfillable", reason=reason))
            line.disconnected_ns = None
        line.received_ns = tick.received_ns

    def _disconnected(self, source: str, symbol: str, line: _Line, at_ns: int) -> None:
        if line.disconnected_ns is not None or not line.received_ns:
            return
        line.disconnected_ns = at_ns
        if not line.numbered:
            gap = _unnumbered(source, symbol, at_ns)
            line.rows[gap.gap_id] = gap
            line.changed.append(gap)

    def _changes(self, source: str, symbol: str, line: _Line, now_ns: int) -> list[Gap]:
        rows, line.changed = line.changed, []
        if line.mentioned is not None and line.highest is not None:
            last, at_ns = line.mentioned
            if last <= line.highest:
                line.mentioned = None
            elif now_ns - at_ns >= MENTION_NS:
                self._leave_out(line, last + 1, at_ns)
                line.highest, line.mentioned = last, None
        for row in list(line.rows.values()) if line.touched else ():
            if row.first_missing is None or row.last_missing is None:
                continue
            pieces = list(_pieces(row, line.holes))
            if pieces == [(row.first_missing, row.last_missing, True)]:
                continue
            del line.rows[row.gap_id]
            for first, last, missing in pieces:
                gap_id = f"{source}:{symbol}:{row.trade_epoch}:{first}"
                piece = replace(row, gap_id=gap_id, first_missing=first, last_missing=last)
                if missing:
                    line.rows[gap_id] = piece
                else:
                    brought = any(
                        epoch == row.trade_epoch and low <= first <= high for epoch, low, high in line.backfilled
                    )
                    piece = replace(
                        piece, status="filled", filled_at=now_ns, filled_by="backfill" if brought else "feed"
                    )
                rows.append(piece)
        line.backfilled.clear()
        line.touched = False
        for hole in line.holes:
            if not hole.reported and now_ns - hole.found_ns >= SETTLE_NS:
                hole.reported = True
                gap = Gap(
                    gap_id=f"{source}:{symbol}:{hole.epoch}:{hole.first}",
                    source=source,
                    symbol=symbol,
                    trade_epoch=hole.epoch,
                    first_missing=hole.first,
                    last_missing=hole.last,
                    disconnected_at=hole.disconnected_ns,
                    detected_at=hole.found_ns,
                )
                line.rows[gap.gap_id] = gap
                rows.append(gap)
        return rows


def _numbers_began_again(line: _Line, trade_id: int, event_ns: int | None) -> bool:
    """Whether a trade that is not above the highest number is a new one; a number above the newest's is merely late."""
    if event_ns is None or line.event_ns is None or line.newest is None or trade_id > line.newest:
        return False
    ahead = event_ns - line.event_ns
    return ahead > AGAIN_NS or (ahead >= 0 and line.newest - trade_id >= AGAIN_IDS)


def _note_newest(line: _Line, tick: Tick) -> None:
    """Remember the time of the trade with the highest number."""
    if tick.trade_id is not None and (line.newest is None or tick.trade_id >= line.newest):
        line.newest, line.event_ns = tick.trade_id, tick.event_ns


def _hole_of(line: _Line, epoch: int, trade_id: int) -> int | None:
    """The place of the hole that has this number."""
    at = bisect_right(line.holes, (epoch, trade_id), key=_place) - 1
    if at < 0 or line.holes[at].epoch != epoch or trade_id > line.holes[at].last:
        return None
    return at


def _fill(line: _Line, epoch: int, trade_id: int) -> bool:
    """Take a number out of the holes; whether it was in one."""
    at = _hole_of(line, epoch, trade_id)
    if at is None:
        return False
    hole = line.holes[at]
    rest = []
    if hole.first < trade_id:
        rest.append(replace(hole, last=trade_id - 1))
    if trade_id < hole.last:
        rest.append(replace(hole, first=trade_id + 1))
    line.holes[at : at + 1] = rest
    line.touched = True
    return True


def _place(hole: _Hole) -> tuple[int, int]:
    return hole.epoch, hole.first


def _inside(row: Gap, holes: list[_Hole]) -> list[_Hole]:
    """What is still missing of a reported gap."""
    if row.first_missing is None or row.last_missing is None:
        return []
    low = bisect_left(holes, (row.trade_epoch, row.first_missing), key=_place)
    high = bisect_right(holes, (row.trade_epoch, row.last_missing), key=_place)
    return holes[low:high]


def _pieces(row: Gap, holes: list[_Hole]) -> Iterator[tuple[int, int, bool]]:
    """A reported gap cut into runs that are still missing (True) and runs that are not."""
    assert row.first_missing is not None
    assert row.last_missing is not None
    at = row.first_missing
    for hole in _inside(row, holes):
        if at < hole.first:
            yield at, hole.first - 1, False
        yield hole.first, hole.last, True
        at = hole.last + 1
    if at <= row.last_missing:
        yield at, row.last_missing, False


def _overlap(one: Gap, other: Gap) -> bool:
    if one.first_missing is None or one.last_missing is None or one.trade_epoch != other.trade_epoch:
        return False
    if other.first_missing is None or other.last_missing is None:
        return False
    return one.first_missing <= other.last_missing and other.first_missing <= one.last_missing


def _unnumbered(source: str, symbol: str, at_ns: int) -> Gap:
    return Gap(f"{source}:{symbol}:{utc(at_ns)}", source, symbol, 0, None, None, at_ns, at_ns)
