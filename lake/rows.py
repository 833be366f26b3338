"""Gold's tables as rows on the driver: read by spans of time, changed, and committed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from pyspark.sql import Column, Row, SparkSession
from pyspark.sql import functions as F

from lake.alerts import Alert
from lake.metrics import (
    GoldRules,
    Newest,
    Window,
    WindowKey,
    alert_row,
    current_row,
    price_row,
)
from lake.sinks import Sink
from lake.summaries import (
    Summary,
    stored_order,
    to_time,
)
from lake.tables import (
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_ROLLING_PRICE,
    Table,
)
from lake.writer import Changed, LakeWriter

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class Batch(NamedTuple):
    """A micro-batch: the query, its number, and when it began."""

    query: str
    number: int
    at: datetime


class Rows(Generic[Value]):
    """A gold table: its rows of the spans in use, as values by key, on the driver."""

    def __init__(
        self,
        spark: SparkSession,
        writer: LakeWriter,
        table: Table,
        columns: Sequence[Column],
        parse: Callable[[Row], tuple[Any, Value]],
        time: Callable[[Any, Value], int],
        row: Callable[[Any, Value], tuple[object, ...]],
        sink: Sink | None = None,
        kept: int = 8,
    ) -> None:
        """columns, parse: how a stored row becomes key and value; row: the way back; time: what its span goes by."""
        self.table = table
        self._spark, self._writer = spark, writer
        self._columns, self._parse, self._time, self._row = columns, parse, time, row
        self._sink, self._kept = sink, kept
        self._spans: OrderedDict[int, dict[Any, Value]] = OrderedDict()

    def span(self, micros: int) -> int:
        """The number of the span of a time."""
        return self.table.span(micros)

    def load(self, numbers: Iterable[int]) -> dict[int, dict[Any, Value]]:
        """The rows of these spans, and of those that share files with them."""
        wanted = set(numbers)
        if missing := wanted - self._spans.keys():
            spans, stored = self._writer.stored(self._spark, self.table, missing)
            wanted.update(spans)
            for number in spans:
                self._spans[number] = {}
            for row in stored.select(*self._columns).collect() if stored is not None else ():
                key, value = self._parse(row)
                self._spans[self.span(self._time(key, value))][key] = value
        for number in wanted:
            self._spans.move_to_end(number)
        return {number: self._spans[number] for number in wanted}

    def refresh(self) -> None:
        """Forget rows that maintenance may have changed since they were read."""
        if self._writer.was_changed(self.table):
            self._spans.clear()

    def written(self, batch: Batch) -> bool:
        return batch.number <= self._writer.batch(self.table)

    def update(
        self, batch: Batch, numbers: Iterable[int], change: Callable[[int, dict[Any, Value]], None], **metadata: Any
    ) -> None:
        """Change the rows of spans, each given to `change`, and commit them. Raises Fenced."""
        numbers = set(numbers)
        if not numbers or self.written(batch):
            return
        for _ in range(10):
            try:
                before = self.load(numbers)
                after = {number: dict(rows) for number, rows in before.items()}
                for number in numbers:
                    change(number, after[number])
                rows = {
                    number: [self._row(key, value) for key, value in span.items()] for number, span in after.items()
                }
                told = {"query": batch.query, "batch": batch.number, **metadata}
                self._writer.replace(self.table, rows, **told)
            except Changed as error:
                logger.info("%s: its rows are read again", error)
                self._spans.clear()
                continue
            self._spans.update(after)
            while len(self._spans) > max(self._kept, len(after)):
                self._spans.popitem(last=False)
            if self._sink:
                changed = [
                    self._row(key, value)
                    for number, span in after.items()
                    for key, value in span.items()
                    if before[number].get(key) != value
                ]
                self._sink.changed(self.table, rows, changed)
            return
        raise Changed(f"{self.table.qualified_name} is changed by somebody else again and again")


def price_rows(spark: SparkSession, writer: LakeWriter, table: Table, sink: Sink | None) -> Rows[Window]:
    """gold.price_1m and its like, by source, asset and window_start."""
    return Rows(
        *(spark, writer, table, _window_columns(), _window), lambda key, _: key[2], partial(price_row, table), sink
    )


def rolling_rows(spark: SparkSession, writer: LakeWriter, sink: Sink | None) -> Rows[tuple[object, ...]]:
    """gold.rolling_price by source, asset and as_of."""
    return Rows(
        *(spark, writer, GOLD_ROLLING_PRICE, _rolling_columns(), _rolling),
        lambda key, _: key[2],
        lambda _, row: row,
        sink,
    )


def current_rows(
    spark: SparkSession, writer: LakeWriter, rules: GoldRules, sink: Sink | None
) -> Rows[tuple[Newest, float | None, datetime]]:
    """gold.current_price by asset: the tick, its change within a minute, and updated_at."""
    return Rows(
        *(spark, writer, GOLD_CURRENT_PRICE, _current_columns()),
        lambda row: _current(row, rules.future_tolerance_seconds),
        lambda *_: 0,
        lambda asset, value: current_row(asset, *value),
        sink,
    )


def alert_rows(
    spark: SparkSession, writer: LakeWriter, rules: GoldRules, sink: Sink | None
) -> Rows[tuple[Alert, datetime]]:
    """gold.alerts by alert_id: the episode, and updated_at."""
    return Rows(
        *(spark, writer, GOLD_ALERTS, _alert_columns(), _alert),
        lambda _, value: value[0].opened_at,
        lambda _, value: alert_row(value[0], rules.alerts, value[1]),
        sink,
    )


def _micros(name: str) -> Column:
    return F.unix_micros(name).alias(name)


def _window_columns() -> tuple[Column, ...]:
    return (
        *(F.col(name) for name in ("source", "asset", "tick_count", "price_sum", "price_m2", "high", "low")),
        *(
            F.col("open"),
            stored_order("open_order").alias("first"),
            F.col("close"),
            stored_order("close_order").alias("last"),
        ),
        *(F.col("volume"), F.col("notional"), _micros("window_start"), _micros("updated_at")),
    )


def _window(row: Row) -> tuple[WindowKey, Window]:
    told = row.asDict()
    key = (told.pop("source"), told.pop("asset"), told.pop("window_start"))
    updated_at = to_time(told.pop("updated_at"))
    first, last = tuple(told.pop("first")), tuple(told.pop("last"))
    return key, Window(Summary(**told, open_order=first, close_order=last), updated_at)


def _rolling_columns() -> tuple[Column, ...]:
    names = ("source", "asset", "average_1m", "volatility_pct", "low", "high", "tick_count")
    return (*(F.col(name) for name in names), _micros("as_of"), _micros("updated_at"))


def _rolling(row: Row) -> tuple[WindowKey, tuple[object, ...]]:
    source, asset, *values, as_of, updated_at = row
    return (source, asset, as_of), (source, asset, to_time(as_of), *values, to_time(updated_at))


def _current_columns() -> tuple[Column, ...]:
    order = "current_order"
    rest = (F.col(f"{order}.{name}") for name in ("source", "trade_id", "producer", "sequence", "event_id"))
    newness = F.struct(F.unix_micros(f"{order}.known_at"), F.unix_micros(f"{order}.event_time"), *rest)
    return (F.col("asset"), F.col("price_usd"), newness.alias("newness"), F.col("change_pct_1m"), _micros("updated_at"))


def _current(row: Row, future_tolerance: float) -> tuple[str, tuple[Newest, float | None, datetime]]:
    newness = tuple(row["newness"])
    known_at, event_time = newness[:2]
    # As in is_future: a venue's time too far ahead of the receipt is not believed.
    time = known_at if event_time - known_at > future_tolerance * 1_000_000 else event_time
    newest = Newest(newness, row["price_usd"], time)
    return row["asset"], (newest, row["change_pct_1m"], to_time(row["updated_at"]))


def _alert_columns() -> tuple[Column, ...]:
    names = ("alert_id", "source", "asset", "direction", "reference_price", "trigger_price", "peak_change_pct")
    times = ("opened_at", "reference_time", "closed_at", "updated_at")
    return (*(F.col(name) for name in names), *(_micros(name) for name in times))


def _alert(row: Row) -> tuple[str, tuple[Alert, datetime]]:
    told = row.asDict()
    updated_at = to_time(told.pop("updated_at"))
    return told["alert_id"], (Alert(**told), updated_at)
