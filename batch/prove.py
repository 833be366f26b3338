"""Prove the tables: recompute silver and gold from bronze, all at once, and compare.

    ./spark-submit.sh batch/prove.py
    ./spark-submit.sh batch/prove.py --from 2026-11-22T10:00:00Z --to 2026-11-22T11:00:00Z     # gold of these times
    ./spark-submit.sh batch/prove.py --repair                                                  # rewrite wrong gold rows

In:  all tables, as of the last micro-batch that all of them have; the stream may go on meanwhile.
Out: one line per check with some of the keys that differ, and one row of quality.results.

The proof does not use the stream's code for reading records, finding repeats and updating rows. lake/silver/judge.py
judges the records one by one, Spark compares the ticks, and lake/gold/recompute.py makes gold from all ticks at once.

--from and --to limit the comparison of gold; bronze and silver are always compared as a whole. With a limit
gold.current_price is left out, since its rows have no time. --repair works on whole days. The driver holds gold's rows
of one day, and the wrong rows; the executors' disks hold a copy of bronze's ticks and gold's rows.

Where old rows were dropped (keep_days, scripts/drop-older-than), the proof compares what both sides can have, and says
what it leaves out; gold from the first whole day on.

Exit codes: 0 all holds, 1 something differs (also if it was repaired), 2 a wrong setting, 5 the tables' history
(history_minutes) passed meanwhile: start again.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import reduce
from itertools import pairwise
from uuid import uuid4

import polars as pl
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from batch import results as quality_results
from batch.comparable import Comparable, from_first
from batch.opening import OVERTAKEN, files_of_lake
from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake.contract import NOTIONAL_DECIMALS, UNREADABLE, TickRules
from lake.delta.files import Files
from lake.delta.overtaken import FileLost, Overtaken
from lake.delta.parquet import arrow_type
from lake.gold import derive
from lake.gold.recompute import ALWAYS, Expected, Period, Snapshot, expected, period_of
from lake.intervals import Interval, add_interval, add_intervals, holes, minus
from lake.rules import DECIDING, gold_rules, tick_rules
from lake.silver.gaps import Gap
from lake.silver.judge import Rejection, Tick, judge
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICES,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    Table,
)
from lake.times import to_time

logger = logging.getLogger("batch.prove")

SHOWN = 5
# Not compared: these depend on when and how the ticks came.
NOT_COMPARED = ("is_late", "updated_at", "ingested_at", "quarantined_at")


# Relative or absolute tolerance for doubles: their sums depend on the order of summation.
TOLERANCE = 1e-9

_PLACE = {"topic": "STRING", "partition": "INT", "offset": "BIGINT"}
_TICK = {
    column.name: column.type for column in SILVER_TICKS.columns if column.name not in (*NOT_COMPARED, "event_date")
}
_JUDGED = {
    **_PLACE,
    "rule": "STRING",
    **_TICK,
    "event_date": "DATE",
    "notional": "DECIMAL(38,18)",
    "ingested_at": "TIMESTAMP",
}
_JUDGED_ARROW = pa.schema([(name, arrow_type(kind)) for name, kind in _JUDGED.items()])
_INSTRUMENT = ("source", "symbol", "trade_epoch")
_NOTIONAL_UNIT = Decimal(1).scaleb(-NOTIONAL_DECIMALS)
_EXACT = Context(prec=100, rounding=ROUND_HALF_UP)


@dataclass(frozen=True)
class Check:
    """The result of a check: the number of rows or keys that break it, and a few of them in words."""

    table: Table
    name: str
    wrong: int
    examples: Sequence[str] = ()

    def __str__(self) -> str:
        verdict = "holds " if not self.wrong else "BROKEN"
        count = f": {self.wrong}" if self.wrong else ""
        more = [f"    {text}" for text in self.examples]
        more += ["    ..."] if self.wrong > len(self.examples) > 0 else []
        return "\n".join([f"{verdict} {self.table.qualified_name}: {self.name}{count}", *more])


def no_row_of(table: Table, name: str, wrong: DataFrame, *columns: str) -> Check:
    """A check that no row breaks. columns: those that an example shows."""
    count = wrong.count()
    rows = wrong.select(*columns).limit(SHOWN).collect() if count else []
    return Check(
        table, name, count, [", ".join(f"{key}={value}" for key, value in row.asDict().items()) for row in rows]
    )


def judged(bronze: DataFrame, rules: TickRules) -> DataFrame:
    """Judge each record of bronze by lake/silver/judge.py, one row per record.

    A row has the record's place in Kafka and ingested_at; of a tick also silver.ticks' columns but is_late, and
    notional; of a rejected record its rule, and source, symbol, trade_epoch and trade_id if it names a trade.
    """

    def judge_all(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            records = zip(*(batch[name].to_pylist() for name in (*_PLACE, "value", "ingested_at")), strict=True)
            rows = [
                _judged(topic, partition, offset, value, ingested_at, rules)
                for topic, partition, offset, value, ingested_at in records
            ]
            columns = {name: pa.array([row.get(name) for row in rows], arrow_type(_JUDGED[name])) for name in _JUDGED}
            yield pa.record_batch(list(columns.values()), schema=_JUDGED_ARROW)

    records = bronze.select(*_PLACE, "value", "ingested_at")
    return records.mapInArrow(judge_all, ", ".join(f"{name} {kind}" for name, kind in _JUDGED.items()))


def _judged(
    topic: str, partition: int, offset: int, value: bytes | None, ingested_at: datetime, rules: TickRules
) -> dict[str, object]:
    """A record's row of `judged`, by column; times in microseconds since 1970."""
    row: dict[str, object] = {"topic": topic, "partition": partition, "offset": offset, "ingested_at": ingested_at}
    record = judge(value, topic, partition, offset, ingested_at, rules)
    if isinstance(record, Tick):
        row |= {name: getattr(record, name) for name in (*_TICK, "event_date")}
        if record.quantity is not None:
            notional = _EXACT.multiply(record.price_usd, record.quantity)
            row["notional"] = notional.quantize(_NOTIONAL_UNIT, context=_EXACT)
    elif isinstance(record, Rejection):
        row["rule"] = record.rule
        if record.instrument_ids:
            row |= dict(zip((*_INSTRUMENT, "trade_id"), record.instrument_ids, strict=True))
    return row


def bronze_checks(bronze: DataFrame, gaps: DataFrame, comparable: Comparable) -> Iterator[Check]:
    """gaps: silver.gaps, which names the records whose loss in Kafka was accepted."""
    place = Window.partitionBy("topic", "partition").orderBy("offset")
    before = (F.lag(name).over(place).alias(alias) for name, alias in (("offset", "after"), ("kafka_timestamp", "at")))
    steps = bronze.select("topic", "partition", "offset", *before)
    missing = comparable.kept(steps.where(F.col("offset") > F.col("after") + 1), BRONZE_TICKS, "at")
    missing = missing.withColumn("first_missing", F.col("after") + 1).withColumn("last_missing", F.col("offset") - 1)
    accepted = gaps.where("source = 'kafka'").select("gap_id")
    missing = missing.withColumn("gap_id", F.concat_ws(":", F.lit("kafka"), "topic", "partition", "first_missing"))
    missing = missing.join(accepted, "gap_id", "left_anti")
    columns = ("topic", "partition", "first_missing", "last_missing")
    yield no_row_of(BRONZE_TICKS, "Kafka's offsets are contiguous in each partition", missing, *columns)
    twice = steps.where(F.col("offset") == F.col("after"))
    yield no_row_of(BRONZE_TICKS, "each Kafka record is there once", twice, "topic", "partition", "offset")


def silver_checks(
    snapshot: Snapshot, checked: DataFrame, valid: DataFrame, comparable: Comparable, ticks_topic: str
) -> Iterator[Check]:
    place = ["topic", "partition", "offset"]
    same = [*place, "rule"]
    bronze = snapshot.read(BRONZE_TICKS)
    bad = checked.where(F.col("rule").isNotNull())
    quarantine = snapshot.read(SILVER_QUARANTINE).where(F.col("rule") != UNREADABLE).select(*same)
    absent = comparable.kept(bad, SILVER_QUARANTINE, "ingested_at").join(quarantine, same, "left_anti")
    of_bronze = comparable.recomputable(quarantine, bronze, F.col("topic"), "partition", "offset")
    other = of_bronze.join(bad.select(*same), same, "left_anti")
    twice = quarantine.groupBy(*place).count().where("count > 1")
    yield no_row_of(SILVER_QUARANTINE, "each record that breaks a rule is there, with the rule", absent, *same)
    yield no_row_of(SILVER_QUARANTINE, "nothing else is there", other, *same)
    yield no_row_of(SILVER_QUARANTINE, "each record is there once", twice, *place, "count")

    silver = snapshot.read(SILVER_TICKS)
    names = ["event_id", "kafka_partition", "kafka_offset"]
    of_bronze = comparable.recomputable(silver, bronze, F.lit(ticks_topic), "kafka_partition", "kafka_offset")
    absent = comparable.kept(valid, SILVER_TICKS, "event_time").join(silver, "event_id", "left_anti")
    other = of_bronze.join(valid, "event_id", "left_anti")
    twice = silver.groupBy("event_id").count().where("count > 1")
    yield no_row_of(SILVER_TICKS, "the tick of each valid record is there", absent, *names)
    yield no_row_of(SILVER_TICKS, "nothing else is there", other, *names)
    yield no_row_of(SILVER_TICKS, "each tick is there once", twice, "event_id", "count")
    columns = [name for name in SILVER_TICKS.column_names if name not in NOT_COMPARED]
    delivered = first_deliveries(valid).select("event_id", F.struct(*columns).alias("delivered"))
    pairs = of_bronze.select("event_id", F.struct(*columns).alias("stored")).join(delivered, "event_id")
    differing = (
        F.when(~F.col(f"stored.{name}").eqNullSafe(F.col(f"delivered.{name}")), F.lit(name)) for name in columns
    )
    changed = pairs.withColumn("columns", F.array_compact(F.array(*differing))).where(F.size("columns") > 0)
    yield no_row_of(SILVER_TICKS, "each tick is as its first delivery says", changed, "event_id", "columns")
    versions = F.size(F.collect_set(F.struct("price_usd", "quantity")))
    disagree = valid.groupBy("event_id").agg(versions.alias("versions")).where("versions > 1")
    yield no_row_of(BRONZE_TICKS, "repeats of a tick agree in price and quantity", disagree, "event_id", "versions")


def first_deliveries(valid: DataFrame) -> DataFrame:
    """The first delivery of each tick: the one with the lowest offset."""
    first = Window.partitionBy("event_id").orderBy("kafka_partition", "kafka_offset")
    return valid.withColumn("delivery", F.row_number().over(first)).where("delivery = 1").drop("delivery")


def gap_checks(snapshot: Snapshot, checked: DataFrame, ticks: DataFrame, comparable: Comparable) -> Iterator[Check]:
    """Each hole in bronze's trade ids is in one open or unfillable row; the ids of filled rows are in bronze."""
    seen, rejected = runs(ticks), runs(checked.where(F.col("rule").isNotNull()))
    rows = [Gap(**row.asDict()) for row in snapshot.read(SILVER_GAPS).select(*SILVER_GAPS.column_names).collect()]
    first_ids = comparable.first_ids(ticks)
    missing = {key: from_first(holes(ids, rejected.get(key, ())), first_ids, key) for key, ids in seen.items()}
    listed: dict[tuple[str, str, int], list[Interval]] = defaultdict(list)
    unlisted, false, twice, absent = [], [], [], []
    for gap in rows:
        if gap.interval and gap.status != "filled":
            listed[gap.instrument] += from_first([gap.interval], first_ids, gap.instrument)
        elif gap.interval:
            # An id that came later may be a tick's, or a record's in quarantine.
            came = add_intervals(seen.get(gap.instrument, ()), rejected.get(gap.instrument, ()))
            filled = from_first([gap.interval], first_ids, gap.instrument)
            absent += [f"{gap.gap_id}: {part}" for part in minus(filled, came)]
    for key in missing.keys() | listed.keys():
        intervals = sorted(listed.get(key, []))
        union: tuple[Interval, ...] = reduce(add_interval, intervals, ())
        name = ":".join(map(str, key))
        twice += [f"{name}: {right}" for left, right in pairwise(intervals) if left[1] >= right[0]]
        unlisted += [f"{name}: {part}" for part in minus(missing.get(key, []), union)]
        false += [f"{name}: {part}" for part in minus(union, missing.get(key, []))]
    for text, wrong in (
        ("each missing trade id is in an open or unfillable row", unlisted),
        ("only missing trade ids are", false),
        ("each is in one row", twice),
        ("the ids of filled rows have come", absent),
    ):
        yield Check(SILVER_GAPS, text, len(wrong), wrong[:SHOWN])


def runs(numbered: DataFrame) -> dict[tuple[str, str, int], tuple[Interval, ...]]:
    """The trade ids of each source, symbol and trade_epoch, as intervals (lake.intervals)."""
    by_id = Window.partitionBy(*_INSTRUMENT).orderBy("trade_id")
    rows = (
        numbered.where(F.col("trade_id").isNotNull())
        .withColumn("run", F.col("trade_id") - F.dense_rank().over(by_id))
        .groupBy(*_INSTRUMENT, "run")
        .agg(F.min("trade_id").alias("first"), F.max("trade_id").alias("last"))
    )
    intervals: dict[tuple[str, str, int], list[Interval]] = defaultdict(list)
    for row in rows.toLocalIterator():
        intervals[row["source"], row["symbol"], row["trade_epoch"]].append((row["first"], row["last"]))
    return {instrument: add_intervals((), ids) for instrument, ids in intervals.items()}


@dataclass
class GoldDifferences:
    """The differences of a gold table from its recomputation: their number, examples, and their spans."""

    table: Table
    wrong: int = 0
    examples: list[str] = field(default_factory=list)
    spans: set[int] = field(default_factory=set)
    # The recomputed rows of those spans.
    rows: list[pl.DataFrame] = field(default_factory=list)

    @property
    def check(self) -> Check:
        return Check(self.table, "it is what all ticks together give", self.wrong, self.examples)

    def add(self, stored: pl.DataFrame, recomputed: pl.DataFrame) -> None:
        """Compare all stored and all recomputed rows of one period, key by key."""
        both = compared(self.table, stored, recomputed)
        self.wrong += both.height
        for row in both.head(SHOWN - len(self.examples)).iter_rows(named=True):
            key = ", ".join(_text(row[name]) for name in self.table.key)
            self.examples.append(f"{key}: {_problem(row)}")
        if both.height:
            spans = _spans(self.table, both)
            self.spans |= spans
            self.rows.append(recomputed.filter(_span_of(self.table, self.table.file_time).is_in(list(spans))))


def compared(table: Table, stored: pl.DataFrame, recomputed: pl.DataFrame) -> pl.DataFrame:
    """The rows that differ, by key: each column as stored and, under NAME_recomputed, as recomputed.

    Further columns: `copy` (0 for a key's first stored row, null if no row is stored), `is_recomputed`, and `differing`
    (the columns in which a key's first row differs).
    """
    key, columns = list(table.key), _compared_columns(table)
    numbered = stored.select(*key, *columns, pl.int_range(pl.len(), dtype=pl.Int64).over(key).alias("copy"))
    renamed = recomputed.select(
        *key, *(pl.col(name).alias(f"{name}_recomputed") for name in columns), pl.lit(True).alias("is_recomputed")
    )
    both = numbered.join(renamed, on=key, how="full", coalesce=True).sort(key)
    differing = [
        pl.when(~_same(column.name, column.type)).then(pl.lit(column.name))
        for column in table.columns
        if column.name in columns
    ]
    both = both.with_columns(differing=pl.concat_list(differing).list.drop_nulls())
    changed = pl.col("differing").list.len() > 0
    return both.filter(pl.col("copy").is_null() | (pl.col("copy") > 0) | pl.col("is_recomputed").is_null() | changed)


def _compared_columns(table: Table) -> list[str]:
    return [
        column.name
        for column in table.columns
        if column.name not in (*NOT_COMPARED, *table.key) and not column.type.startswith("STRUCT")
    ]


def _same(name: str, kind: str) -> pl.Expr:
    stored, recomputed = pl.col(name), pl.col(f"{name}_recomputed")
    if kind != "DOUBLE":
        return stored.eq_missing(recomputed)
    limit = pl.max_horizontal(TOLERANCE * stored.abs(), TOLERANCE * recomputed.abs(), TOLERANCE)
    return stored.eq_missing(recomputed) | ((stored - recomputed).abs() <= limit).fill_null(False)


def _problem(row: dict[str, object]) -> str:
    if row["copy"] is None:
        return "is missing"
    if row["copy"]:
        return "is there more than once"
    if not row["is_recomputed"]:
        return "should not be there"
    names = row["differing"]
    assert isinstance(names, list)
    return "; ".join(f"{name} is {_text(row[name])}, should be {_text(row[f'{name}_recomputed'])}" for name in names)


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _span_of(table: Table, column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Int64) // table.span_micros if table.file_span else pl.lit(0, pl.Int64)


def _spans(table: Table, both: pl.DataFrame) -> set[int]:
    """The spans of wrong rows, as stored and as recomputed."""
    if not table.file_span:
        return {0}
    names = [name for name in (table.file_time, f"{table.file_time}_recomputed") if name in both.columns]
    return {span for name in names for span in both.select(_span_of(table, name)).to_series().drop_nulls()}


def stored_rows(snapshot: Snapshot, table: Table, period: Period) -> pl.DataFrame:
    """A gold table's rows whose file_time lies in the period, in the driver's memory."""
    rows = snapshot.read(table)
    if table.file_time:
        if period.begin > ALWAYS.begin:
            rows = rows.where(F.col(table.file_time) >= F.timestamp_micros(F.lit(period.begin)))
        if period.end < ALWAYS.end:
            rows = rows.where(F.col(table.file_time) < F.timestamp_micros(F.lit(period.end)))
    frame = pl.from_arrow(rows.select(*table.key, *_compared_columns(table)).toArrow())
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(derive.volume_sum()) if table in GOLD_PRICES else frame


def gold_differences(
    snapshot: Snapshot, table: Table, gold: Expected, period: Period, comparable: Comparable
) -> GoldDifferences:
    """Compare a gold table's rows of a period, day by day if its rows have a time."""
    differences = GoldDifferences(table)

    def compare(part: Period, recomputed: pl.DataFrame) -> None:
        stored = stored_rows(snapshot, table, part)
        differences.add(comparable.of_gold(table, stored), comparable.of_gold(table, recomputed))

    if table in (GOLD_ALERTS, GOLD_CURRENT_PRICE):
        compare(period, gold.rows(table))
        return differences
    # On the first day also windows that begin before the period and reach into it.
    before = table.window_micros - 1 if table.window else 0
    days = gold.days or [period.begin]
    cuts = [period.begin - before, *days[1:], period.end]
    for day, part in zip(days, pairwise(cuts), strict=True):
        compare(Period(*part), gold.rows(table, day))
    return differences


def prove(
    spark: SparkSession, files: Files, settings: Settings, period: Period, *, repair: bool = False
) -> list[Check]:
    """Run all checks, and print each as soon as it is done. Raises Overtaken, FileLost."""
    snapshot = Snapshot.newest(spark, settings.lake_root, files)
    print(f"{settings.lake_root} as of micro-batch {snapshot.batch}", flush=True)
    comparable = Comparable.of(snapshot)
    for words in comparable.words():
        print(f"left out {words}", flush=True)
    checks: list[Check] = []
    with snapshot.reading():
        for check in _checks(snapshot, settings, period, comparable, repair=repair):
            checks.append(check)
            print(check, flush=True)
    return checks


def _checks(
    snapshot: Snapshot, settings: Settings, period: Period, comparable: Comparable, *, repair: bool
) -> Iterator[Check]:
    bronze = snapshot.read(BRONZE_TICKS)
    # What the stream could not read the proof cannot read either.
    unreadable = snapshot.read(SILVER_QUARANTINE).where(F.col("rule") == UNREADABLE).select(*_PLACE)
    if count := unreadable.count():
        print(f"not compared: {count} records that could not be read (rule {UNREADABLE} in silver.quarantine)")
    readable = bronze.join(unreadable, list(_PLACE), "left_anti") if count else bronze
    checked = judged(readable, tick_rules(settings)).persist(StorageLevel.DISK_ONLY)
    valid = checked.where(F.col("event_id").isNotNull())
    ticks = first_deliveries(valid).persist(StorageLevel.DISK_ONLY)
    yield from bronze_checks(bronze, snapshot.read(SILVER_GAPS), comparable)
    yield from silver_checks(snapshot, checked, valid, comparable, settings.ticks_topic)
    yield from gap_checks(snapshot, checked, ticks, comparable)

    gold = expected(ticks, gold_rules(settings), period, datetime.now(UTC))
    for table in GOLD:
        if table == GOLD_CURRENT_PRICE and period != ALWAYS:
            continue
        differences = gold_differences(snapshot, table, gold, period, comparable)
        yield differences.check
        if repair and differences.spans:
            print(f"repaired {table.qualified_name}: {_repaired(snapshot, differences)}", flush=True)
    gold.forget()
    for cached in (ticks, checked):
        cached.unpersist()


def _repaired(snapshot: Snapshot, differences: GoldDifferences) -> str:
    spans = differences.spans
    left = snapshot.rewrite(differences.table, spans, pl.concat(differences.rows))
    rewritten = f"{len(spans) - len(left)} spans of rows rewritten"
    if not left:
        return rewritten
    return f"{rewritten}, {len(left)} left, since the stream has written them meanwhile: run this again"


def results(checks: Sequence[Check], period: Period, checked_at: datetime) -> list[tuple[object, ...]]:
    """Rows of quality.results."""
    run_id = uuid4().hex
    part = "all" if period == ALWAYS else f"{to_time(period.begin).isoformat()} to {to_time(period.end).isoformat()}"
    return [
        (
            *(run_id, checked_at, check.table.qualified_name, part, "proof", check.name, "", "error"),
            *(not check.wrong, "; ".join(check.examples) or None, check.wrong),
        )
        for check in checks
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("lake_root", "webhdfs_url", "ticks_topic", "rejects_topic", "gaps_topic", *DECIDING),
    )
    parser.add_argument("--from", dest="begin", type=datetime.fromisoformat, metavar="TIME", help="begin, as ISO 8601")
    parser.add_argument("--to", dest="end", type=datetime.fromisoformat, metavar="TIME", help="end, exclusive")
    parser.add_argument("--repair", action="store_true", help="rewrite gold's files in which a row is wrong")
    settings, own = from_command_line(parser, argv)
    period = period_of(own.begin, own.end)
    if own.repair and period != ALWAYS:
        period = period.days()
    if period.begin >= period.end:
        print(f"{parser.prog}: --from is not before --to", file=sys.stderr)
        return USAGE_ERROR
    files = files_of_lake(parser, settings)
    checked_at = datetime.now(UTC)
    spark = SparkSession.builder.appName("tickhouse prove").getOrCreate()
    try:
        checks = prove(spark, files, settings, period, repair=own.repair)
        quality_results.append(spark, files, settings.lake_root, results(checks, period, checked_at))
    except Overtaken as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return OVERTAKEN
    except FileLost as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:
        spark.stop()
    broken = sum(1 for check in checks if check.wrong)
    print(f"{len(checks)} checks, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    sys.exit(main())
