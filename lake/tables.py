"""Every table of the lake: its columns with type, meaning and nullability, its key, its partitions.

Column types are defined only here. Tables are Delta tables at ROOT/DATABASE/NAME; times are UTC
with microseconds; prices and quantities are DECIMAL(28,12) in the quote currency, where USDT counts as USD.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

# The version of the columns, their meaning, and the rules that make rows. batch/migrate.py upgrades an older lake.
# 1: the first. 2: gold.price_5s, volume_sum; ids, times and receipts in stated ranges (lake.contract).
VERSION = 2
PRICE = "DECIMAL(28,12)"
_MICROSECOND = timedelta(microseconds=1)
# By gold time, then by the venue's and the ingester's numbers: a total order of one instrument's ticks.
TICK_ORDER = (
    "STRUCT<gold_time: TIMESTAMP, trade_epoch: BIGINT, trade_id: BIGINT, producer: STRING, sequence: BIGINT, "
    "event_id: STRING>"
)
# Orders an asset's ticks over all venues; the last is the newest.
CURRENT_ORDER = (
    "STRUCT<known_at: TIMESTAMP, event_time: TIMESTAMP, source: STRING, trade_id: BIGINT, producer: STRING, "
    "sequence: BIGINT, event_id: STRING>"
)


@dataclass(frozen=True)
class Column:
    """A column: Spark SQL type, meaning with unit, and whether it may be null."""

    name: str
    type: str
    comment: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """A Delta table: what a row is, its columns in order, and the columns that identify a row."""

    database: str
    name: str
    comment: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    partitioned_by: tuple[str, ...] = ()
    # Columns with file statistics, which prune reads and merges. Statistics of more columns would slow each write.
    statistics: tuple[str, ...] = ()
    # The program that writes it. `streamed`: the lake's one writer does, with each micro-batch.
    owner: str = "streaming/ticks.py"
    kind: Literal["streamed", "batch"] = "streamed"
    # For rows that change: a span of `file_time` lies in one file, and a file has whole spans. None: one span has all.
    file_time: str = ""
    file_span: timedelta | None = None
    # The length of a row's window, if it is fixed.
    window: timedelta | None = None
    # Of rows that are only appended: the time by which files are joined, which grows with each micro-batch.
    arrival_time: str = ""
    # The time that makes a row old enough to be dropped (setting keep_days; by default rows stay for ever).
    # Empty: rows are never dropped.
    age_time: str = ""
    # The order of rows within a file of days that no longer change (batch/maintain.py); empty: as they came.
    settled_order: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.qualified_name)

    @property
    def qualified_name(self) -> str:
        return f"{self.database}.{self.name}"

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def schema(self) -> str:
        """The columns as a schema in SQL."""
        return self.schema_of(self.column_names)

    def schema_of(self, names: Collection[str]) -> str:
        """These columns, in the table's order, as a schema in SQL."""
        return ", ".join(f"{column.name} {column.type}" for column in self.columns if column.name in names)

    def span(self, micros: int) -> int:
        """The number of the span of a row with this time, in microseconds since 1970."""
        return 0 if self.file_span is None else micros // self.span_micros

    @property
    def span_micros(self) -> int:
        """The length of a span, in microseconds."""
        assert self.file_span is not None, f"{self.qualified_name} is one span"
        return self.file_span // _MICROSECOND

    @property
    def window_micros(self) -> int:
        """The length of a row's window, in microseconds."""
        assert self.window is not None, f"{self.qualified_name} has no windows"
        return self.window // _MICROSECOND

    def path(self, root: str) -> str:
        """The table's URL in the lake at root."""
        return f"{root}/{self.database}/{self.name}"


BRONZE_TICKS = Table(
    "bronze",
    "ticks",
    "A Kafka record as delivered, of the topics ticks and rejects",
    key=("topic", "partition", "offset"),
    columns=(
        Column("key", "BINARY", "Kafka key: source:symbol", nullable=True),
        Column("value", "BINARY", "Kafka value: a tick as JSON", nullable=True),
        Column("topic", "STRING", "Kafka topic"),
        Column("partition", "INT", "Kafka partition, plus 1,000,000 for each time that the topic was made anew"),
        Column("offset", "BIGINT", "Kafka offset"),
        Column("kafka_timestamp", "TIMESTAMP", "Kafka's time of the record, from 1900 to 9999"),
        Column("ingested_at", "TIMESTAMP", "when the micro-batch that wrote the row began"),
        Column("ingest_date", "DATE", "date of ingested_at"),
    ),
    partitioned_by=("ingest_date",),
    statistics=("topic", "partition", "offset", "kafka_timestamp"),
    arrival_time="kafka_timestamp",
    age_time="kafka_timestamp",
    properties={"delta.appendOnly": "true"},
)

SILVER_TICKS = Table(
    "silver",
    "ticks",
    "A distinct valid tick",
    key=("event_id",),
    columns=(
        Column(
            "event_id",
            "STRING",
            "source:symbol:trade_epoch:trade_id, else producer:sequence, else topic:partition:offset",
        ),
        Column("source", "STRING", "venue"),
        Column("symbol", "STRING", "the venue's name of the instrument"),
        Column("asset", "STRING", "canonical name: bitcoin, ethereum, ..."),
        Column("quote", "STRING", "currency that the price is really in"),
        Column("price_usd", PRICE, "price of one unit of the asset"),
        Column("quantity", PRICE, "traded size in units of the asset", nullable=True),
        Column("trade_id", "BIGINT", "the venue's number of the trade", nullable=True),
        Column("trade_epoch", "BIGINT", "raised when a venue starts its numbers again"),
        Column("event_time", "TIMESTAMP", "the venue's time, else received_at"),
        Column("received_at", "TIMESTAMP", "when the ingester received the frame"),
        Column("producer", "STRING", "the ingester's identity", nullable=True),
        Column("sequence", "BIGINT", "the ingester's number of the tick", nullable=True),
        Column("kafka_partition", "INT", "Kafka partition of the first delivery"),
        Column("kafka_offset", "BIGINT", "Kafka offset of the first delivery"),
        Column("is_late", "BOOLEAN", "a later minute of this source and asset was in gold before this tick came"),
        Column("is_future", "BOOLEAN", "event_time is too far ahead of received_at to be believed"),
        Column("event_date", "DATE", "date of event_time"),
    ),
    partitioned_by=("event_date",),
    statistics=(
        *("source", "symbol", "asset", "trade_id", "event_time", "received_at"),
        *("kafka_partition", "kafka_offset"),
    ),
    arrival_time="received_at",
    age_time="event_time",
    settled_order=("asset", "event_time"),
    properties={"delta.appendOnly": "true"},
)

SILVER_QUARANTINE = Table(
    "silver",
    "quarantine",
    "A record that is not a valid tick",
    key=("topic", "partition", "offset"),
    columns=(
        Column("value", "BINARY", "Kafka value as delivered", nullable=True),
        Column("rule", "STRING", "the rule that the record breaks"),
        Column("reason", "STRING", "what is wrong with it"),
        Column("topic", "STRING", "Kafka topic"),
        Column("partition", "INT", "Kafka partition"),
        Column("offset", "BIGINT", "Kafka offset"),
        Column("quarantined_at", "TIMESTAMP", "when the micro-batch that wrote the row began"),
    ),
    statistics=("topic", "partition", "offset", "quarantined_at"),
    arrival_time="quarantined_at",
    age_time="quarantined_at",
    properties={"delta.appendOnly": "true"},
)

SILVER_GAPS = Table(
    "silver",
    "gaps",
    "A run of ticks known to be missing",
    key=("gap_id",),
    columns=(
        Column("gap_id", "STRING", "source:symbol:trade_epoch:first_missing; without numbers the ingester's"),
        Column("source", "STRING", "venue"),
        Column("symbol", "STRING", "the venue's name of the instrument"),
        Column("trade_epoch", "BIGINT", "raised when a venue starts its numbers again"),
        Column("first_missing", "BIGINT", "first trade id; null where the venue has no numbers", nullable=True),
        Column("last_missing", "BIGINT", "last trade id; null where the venue has no numbers", nullable=True),
        Column("disconnected_at", "TIMESTAMP", "when the connection was lost, if it was", nullable=True),
        Column("detected_at", "TIMESTAMP", "when it was found"),
        Column("status", "STRING", "open, filled or unfillable"),
        Column("reason", "STRING", "why they are missing, or cannot be had", nullable=True),
        Column("filled_at", "TIMESTAMP", "when the ticks had come", nullable=True),
        Column("filled_by", "STRING", "what brought them", nullable=True),
    ),
    statistics=("gap_id", "source", "symbol", "detected_at"),
    file_time="detected_at",
    file_span=timedelta(hours=1),
    age_time="detected_at",
)


def _prices(name: str, period: str, window: timedelta) -> Table:
    """gold.price_1m, or the same table for another window."""
    return Table(
        "gold",
        name,
        f"An asset's {period} at a venue",
        key=("source", "asset", "window_start"),
        columns=(
            Column("source", "STRING", "venue"),
            Column("asset", "STRING", "canonical name"),
            Column("window_start", "TIMESTAMP", f"first instant of the {period}, by gold time"),
            Column("window_end", "TIMESTAMP", f"first instant after the {period}"),
            Column("open", PRICE, "price of the first tick"),
            Column("high", PRICE, "highest price"),
            Column("low", PRICE, "lowest price"),
            Column("close", PRICE, "price of the last tick"),
            Column("average", PRICE, "sum of prices / tick_count, half up"),
            Column(
                "volatility_pct", "DOUBLE", "100 * sample standard deviation / mean of prices; null below 2 ticks", True
            ),
            Column("volume", PRICE, "sum of quantities; null if no tick has one", nullable=True),
            Column("vwap", PRICE, "sum of price * quantity / volume, half up; null without volume", nullable=True),
            Column("tick_count", "BIGINT", "number of ticks"),
            Column("first_event_time", "TIMESTAMP", "earliest gold time"),
            Column("last_event_time", "TIMESTAMP", "latest gold time"),
            Column("updated_at", "TIMESTAMP", "when the micro-batch that last changed the row began"),
            Column("window_date", "DATE", "date of window_start"),
            Column("price_sum", "DECIMAL(38,12)", "for merging: sum of prices"),
            Column("price_m2", "DOUBLE", "for merging: sum of squared differences from the mean"),
            Column(
                "notional",
                "DECIMAL(38,18)",
                "for merging: sum of price * quantity; null if no tick has one",
                nullable=True,
            ),
            Column("open_order", TICK_ORDER, "for merging: place of the first tick"),
            Column("close_order", TICK_ORDER, "for merging: place of the last tick"),
            Column(
                "volume_sum",
                "DECIMAL(38,12)",
                "for merging: sum of quantities, also where volume has no room for it; null if no tick has one, and in "
                "rows of a lake's first version, where volume holds it",
                nullable=True,
            ),
        ),
        partitioned_by=("window_date",),
        statistics=("source", "asset", "window_start", "updated_at"),
        file_time="window_start",
        file_span=window,
        age_time="window_start",
        window=window,
    )


# The mergeable state of gold: all other prices are derived from these rows.
GOLD_PRICE_5S = _prices("price_5s", "five seconds", timedelta(seconds=5))
GOLD_PRICE_1M = _prices("price_1m", "minute", timedelta(minutes=1))
GOLD_PRICE_5M = _prices("price_5m", "five minutes", timedelta(minutes=5))
GOLD_PRICE_1H = _prices("price_1h", "hour", timedelta(hours=1))
GOLD_PRICE_1D = _prices("price_1d", "day", timedelta(days=1))
# Each is derived from the one before it; those after the minute follow seconds after the micro-batch.
GOLD_PRICES = (GOLD_PRICE_5S, GOLD_PRICE_1M, GOLD_PRICE_5M, GOLD_PRICE_1H, GOLD_PRICE_1D)

GOLD_ROLLING_PRICE = Table(
    "gold",
    "rolling_price",
    "The last minute of an asset at a venue, seen from every fifth second",
    key=("source", "asset", "as_of"),
    columns=(
        Column("source", "STRING", "venue"),
        Column("asset", "STRING", "canonical name"),
        Column("as_of", "TIMESTAMP", "the minute before it is looked at; a multiple of 5 s, by gold time"),
        Column("average_1m", PRICE, "sum of prices / tick_count, half up"),
        Column(
            "volatility_pct",
            "DOUBLE",
            "100 * sample standard deviation / mean of the prices of the last volatility_seconds; null below 2 ticks",
            nullable=True,
        ),
        Column("low", PRICE, "lowest price"),
        Column("high", PRICE, "highest price"),
        Column("tick_count", "BIGINT", "number of ticks"),
        Column("updated_at", "TIMESTAMP", "when the micro-batch that last changed the row began"),
    ),
    statistics=("source", "asset", "as_of"),
    file_time="as_of",
    file_span=timedelta(seconds=5),
    age_time="as_of",
)

GOLD_CURRENT_PRICE = Table(
    "gold",
    "current_price",
    "An asset's newest price over all venues",
    key=("asset",),
    columns=(
        Column("asset", "STRING", "canonical name"),
        Column("price_usd", PRICE, "newest price"),
        Column("source", "STRING", "venue of that price"),
        Column("event_time", "TIMESTAMP", "the venue's time of that price"),
        Column("event_id", "STRING", "the tick in silver.ticks"),
        Column("change_pct_1m", "DOUBLE", "change against the same source's price a minute earlier", nullable=True),
        Column("updated_at", "TIMESTAMP", "when the micro-batch that last changed the row began"),
        Column("current_order", CURRENT_ORDER, "for merging: place of that tick"),
    ),
    statistics=("asset",),
)

GOLD_ALERTS = Table(
    "gold",
    "alerts",
    "An episode in which an asset's price changed much within seconds",
    key=("alert_id",),
    columns=(
        Column("alert_id", "STRING", "source:asset:direction:event_id of the tick that opened it"),
        Column("source", "STRING", "venue"),
        Column("asset", "STRING", "canonical name"),
        Column("direction", "STRING", "up or down"),
        Column("threshold_pct", "DOUBLE", "the change that opens an episode is above it"),
        Column("window_seconds", "INT", "a tick is compared with the ticks of so many seconds before it"),
        Column("opened_at", "TIMESTAMP", "gold time of the tick that opened it"),
        Column("reference_price", PRICE, "lowest (up) or highest (down) price of the seconds before that tick"),
        Column("reference_time", "TIMESTAMP", "gold time of the first tick with that price"),
        Column("trigger_price", PRICE, "price of the tick that opened it"),
        Column("peak_change_pct", "DOUBLE", "largest change of the episode's ticks, in either direction, above 0"),
        Column("closed_at", "TIMESTAMP", "gold time of the tick that closed it; null while it is open", nullable=True),
        Column("updated_at", "TIMESTAMP", "when the micro-batch that last changed the row began"),
    ),
    statistics=("source", "asset", "opened_at", "closed_at"),
    file_time="opened_at",
    file_span=timedelta(hours=1),
    age_time="opened_at",
)

QUALITY_RESULTS = Table(
    "quality",
    "results",
    "A check's verdict",
    key=("run_id", "expectation", "column_name"),
    owner="batch/check_quality.py and batch/prove.py",
    kind="batch",
    age_time="checked_at",
    columns=(
        Column("run_id", "STRING", "one run of a check"),
        Column("checked_at", "TIMESTAMP", "when the run began"),
        Column("table_name", "STRING", "database.name of the table"),
        Column("slice", "STRING", "which part of the table"),
        Column("suite", "STRING", "name of the set of expectations"),
        Column("expectation", "STRING", "what was expected"),
        Column("column_name", "STRING", "column, or columns with commas; empty for the whole table"),
        Column("severity", "STRING", "error fails a run, warning does not"),
        Column("success", "BOOLEAN", "whether it held"),
        Column("observed", "STRING", "what was seen", nullable=True),
        Column("unexpected_count", "BIGINT", "rows that break it", nullable=True),
    ),
)

# gold.top_movers, a view: each minute's assets, ranked by price change. {} stands for gold.price_1m.
GOLD_TOP_MOVERS = "gold.top_movers"
TOP_MOVERS = """
SELECT window_start,
       CAST(row_number() OVER (PARTITION BY window_start ORDER BY abs(change_pct) DESC, source, asset) AS INT) AS rank,
       source, asset, change_pct
FROM (
    SELECT window_start, source, asset, 100 * (CAST(close AS DOUBLE) / CAST(open AS DOUBLE) - 1) AS change_pct FROM {}
)
"""
GOLD = (*GOLD_PRICES, GOLD_ROLLING_PRICE, GOLD_CURRENT_PRICE, GOLD_ALERTS)
TABLES = (
    BRONZE_TICKS,
    SILVER_TICKS,
    SILVER_QUARANTINE,
    SILVER_GAPS,
    *GOLD,
    QUALITY_RESULTS,
)
STREAMED = tuple(table for table in TABLES if table.kind == "streamed")
