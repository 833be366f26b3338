"""Which ticks are known to be missing: silver.gaps.

The ingester reports (topic `gaps`), silver decides: a number is missing if it lies between two trade ids that silver
has seen, and neither silver nor quarantine has it. So what a report says of a range (why, since when, that it cannot be
filled) counts for the numbers of it that are missing, and a hole that nobody reported is a row all the same. A row of
which some numbers have come is split. A venue that does not number its trades has only the reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import Column, Row
from pyspark.sql import functions as F

from lake.intervals import Instrument, Interval, common, minus
from lake.tables import SILVER_GAPS

UNREPORTED = "no tick with these ids has come"
LATER_DELIVERY = "a later delivery"
STATUSES = ("open", "filled", "unfillable")
_REPORT = ", ".join(f"{column.name} {column.type}" for column in SILVER_GAPS.columns)


@dataclass(frozen=True)
class Gap:
    """A row of silver.gaps; ids and times as there."""

    gap_id: str
    source: str
    symbol: str
    trade_epoch: int
    first_missing: int | None
    last_missing: int | None
    disconnected_at: datetime | None
    detected_at: datetime
    status: str
    reason: str | None
    filled_at: datetime | None = None
    filled_by: str | None = None

    @property
    def instrument(self) -> Instrument:
        return (self.source, self.symbol, self.trade_epoch)

    @property
    def interval(self) -> Interval | None:
        if self.first_missing is None or self.last_missing is None:
            return None
        return (self.first_missing, self.last_missing)

    def to_json(self) -> dict[str, Any]:
        times = {name: value.isoformat() for name, value in asdict(self).items() if isinstance(value, datetime)}
        return {**asdict(self), **times}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Gap:
        times = ("disconnected_at", "detected_at", "filled_at")
        return cls(**{**row, **{name: datetime.fromisoformat(row[name]) for name in times if row[name]}})

    def of(self, interval: Interval) -> Gap:
        """What this row says, of an interval of the same instrument."""
        first, last = interval
        gap_id = f"{self.source}:{self.symbol}:{self.trade_epoch}:{first}"
        return replace(self, gap_id=gap_id, first_missing=first, last_missing=last)


def reconciled(
    rows: Mapping[str, Gap], missing: Mapping[Instrument, Sequence[Interval]], reports: Iterable[Gap], at: datetime
) -> list[Gap]:
    """The rows of silver.gaps that change.

    rows: those that are not filled, by gap_id. missing: all holes of each instrument that changed. reports: what the
    ingester said, oldest first.
    """
    reports = list(reports)
    after: dict[str, Gap] = {gap.gap_id: gap for gap in reports if gap.interval is None}
    for instrument, intervals in missing.items():
        said = [gap for gap in (*rows.values(), *reports) if gap.instrument == instrument and gap.interval]
        # No piece of a hole crosses the beginning of a row that there is: that row would be left behind.
        known = [row.interval for row in rows.values() if row.instrument == instrument and row.interval]
        pieces = _cut(intervals, sorted(first for first, _ in known))
        for gap in _missing_rows(instrument, pieces, [gap for gap in said if gap.status != "filled"], at):
            after[gap.gap_id] = gap
        filled_by = [gap for gap in said if gap.status == "filled"]
        for row in rows.values():
            if row.instrument == instrument and row.interval:
                for gap in _filled_rows(row, minus([row.interval], intervals), filled_by, at):
                    after[gap.gap_id] = gap
    return [gap for gap_id, gap in after.items() if rows.get(gap_id) != gap]


def _cut(intervals: Iterable[Interval], beginnings: Sequence[int]) -> list[Interval]:
    pieces: list[Interval] = []
    for first, last in intervals:
        for beginning in beginnings:
            if first < beginning <= last:
                pieces.append((first, beginning - 1))
                first = beginning
        pieces.append((first, last))
    return pieces


def _missing_rows(
    instrument: Instrument, intervals: Sequence[Interval], said: Sequence[Gap], at: datetime
) -> Iterator[Gap]:
    """A row for each part of the holes of which the same was said last; for the rest, one that nobody reported."""
    left = list(intervals)
    for gap in reversed(said):
        assert gap.interval is not None
        for part in common(left, [gap.interval]):
            yield gap.of(part)
        left = minus(left, [gap.interval])
    for part in left:
        yield Gap("", *instrument, None, None, None, at, "open", UNREPORTED).of(part)


def _filled_rows(row: Gap, parts: Sequence[Interval], said: Sequence[Gap], at: datetime) -> Iterator[Gap]:
    for part in parts:
        by = next((gap for gap in reversed(said) if gap.interval and common([part], [gap.interval])), None)
        yield replace(
            row.of(part),
            status="filled",
            filled_at=by.filled_at if by else at,
            filled_by=by.filled_by if by else LATER_DELIVERY,
        )


def unfilled(gaps: Iterable[Gap]) -> dict[str, Gap]:
    """By gap_id the last of each, without those that are filled."""
    return {gap_id: gap for gap_id, gap in {gap.gap_id: gap for gap in gaps}.items() if gap.status != "filled"}


def report(value: Column) -> Column:
    """The row of silver.gaps that a record's value holds, as a STRUCT; fields that it lacks are null."""
    return F.from_json(value.cast("string"), _REPORT)


def is_report(value: Column) -> Column:
    """Whether a record's value is a row of silver.gaps."""
    gap = report(value)
    complete = gap["status"].isin(*STATUSES)
    for column in SILVER_GAPS.columns:
        if not column.nullable:
            complete = complete & gap[column.name].isNotNull()
    return F.coalesce(complete, F.lit(False))


def reported(rows: Iterable[Row]) -> list[Gap]:
    """The gaps of rows with partition, offset and `report`, in order of delivery."""
    in_order = sorted(rows, key=lambda row: (row["partition"], row["offset"]))
    # Spark gives times in this machine's zone, without saying so.
    return [Gap(*(_in_utc(value) for value in row["report"])) for row in in_order]


def _in_utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value
