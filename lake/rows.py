"""Tables as rows on the driver: gold's and silver.gaps, read by spans of time, changed, and committed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from datetime import datetime
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from pyspark.sql import SparkSession

from lake.alerts import Alert
from lake.gaps import Gap
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
from lake.summaries import Newness, Order, Summary, to_micros
from lake.tables import (
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_ROLLING_PRICE,
    SILVER_GAPS,
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
    """A table: its rows of the spans in use, as values by key, on the driver."""

    def __init__(
        self,
        spark: SparkSession,
        writer: LakeWriter,
        table: Table,
        parse: Callable[[Mapping[str, Any]], tuple[Any, Value]],
        time: Callable[[Any, Value], int],
        row: Callable[[Any, Value], tuple[object, ...]],
        sink: Sink | None = None,
        kept: int = 8,
    ) -> None:
        """parse: how a stored row becomes key and value; row: the way back; time: what its span goes by."""
        self.table = table
        self._spark, self._writer = spark, writer
        self._parse, self._time, self._row = parse, time, row
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
            for row in stored:
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


def gap_rows(spark: SparkSession, writer: LakeWriter) -> Rows[Gap]:
    """silver.gaps by gap_id."""
    return Rows(
        *(spark, writer, SILVER_GAPS),
        lambda row: (row["gap_id"], Gap(**row)),
        lambda *_: 0,
        lambda _, gap: astuple(gap),
    )


def price_rows(spark: SparkSession, writer: LakeWriter, table: Table, sink: Sink | None) -> Rows[Window]:
    """gold.price_1m and its like, by source, asset and window_start."""
    return Rows(*(spark, writer, table, _window), lambda key, _: key[2], partial(price_row, table), sink)


def rolling_rows(spark: SparkSession, writer: LakeWriter, sink: Sink | None) -> Rows[tuple[object, ...]]:
    """gold.rolling_price by source, asset and as_of."""
    return Rows(*(spark, writer, GOLD_ROLLING_PRICE, _rolling), lambda key, _: key[2], lambda _, row: row, sink)


def current_rows(
    spark: SparkSession, writer: LakeWriter, rules: GoldRules, sink: Sink | None
) -> Rows[tuple[Newest, float | None, datetime]]:
    """gold.current_price by asset: the tick, its change within a minute, and updated_at."""
    return Rows(
        *(spark, writer, GOLD_CURRENT_PRICE),
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
        *(spark, writer, GOLD_ALERTS, _alert),
        lambda _, value: value[0].opened_at,
        lambda _, value: alert_row(value[0], rules.alerts, value[1]),
        sink,
    )


def _window(row: Mapping[str, Any]) -> tuple[WindowKey, Window]:
    names = ("tick_count", "price_sum", "price_m2", "high", "low", "open", "close", "volume", "notional")
    told = {name: row[name] for name in names}
    summary = Summary(**told, open_order=_order(row["open_order"]), close_order=_order(row["close_order"]))
    return (row["source"], row["asset"], to_micros(row["window_start"])), Window(summary, row["updated_at"])


def _order(told: Mapping[str, Any]) -> Order:
    rest = (told[name] for name in ("trade_epoch", "trade_id", "producer", "sequence", "event_id"))
    return cast(Order, (to_micros(told["gold_time"]), *rest))


def _rolling(row: Mapping[str, Any]) -> tuple[WindowKey, tuple[object, ...]]:
    key = (row["source"], row["asset"], to_micros(row["as_of"]))
    return key, tuple(row[name] for name in GOLD_ROLLING_PRICE.column_names)


def _current(row: Mapping[str, Any], future_tolerance: float) -> tuple[str, tuple[Newest, float | None, datetime]]:
    order = row["current_order"]
    known_at, event_time = to_micros(order["known_at"]), to_micros(order["event_time"])
    rest = (order[name] for name in ("source", "trade_id", "producer", "sequence", "event_id"))
    # As in is_future: a venue's time too far ahead of the receipt is not believed.
    time = known_at if event_time - known_at > future_tolerance * 1_000_000 else event_time
    newest = Newest(cast(Newness, (known_at, event_time, *rest)), row["price_usd"], time)
    return row["asset"], (newest, row["change_pct_1m"], row["updated_at"])


def _alert(row: Mapping[str, Any]) -> tuple[str, tuple[Alert, datetime]]:
    names = ("alert_id", "source", "asset", "direction", "reference_price", "trigger_price", "peak_change_pct")
    times = ("opened_at", "reference_time", "closed_at")
    told = {**{name: row[name] for name in names}, **{name: row[name] and to_micros(row[name]) for name in times}}
    alert = Alert(**told)
    return alert.alert_id, (alert, row["updated_at"])
