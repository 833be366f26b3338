"""Prove the tables: compute silver and gold once more from bronze, all at once, and compare.

    ./spark-submit.sh batch/prove.py
    ./spark-submit.sh batch/prove.py --from 2026-11-22T10:00:00Z --to 2026-11-22T11:00:00Z     # gold of these times
    ./spark-submit.sh batch/prove.py --repair                                                  # rewrite wrong gold rows

In:  all tables, as of the last micro-batch that all of them have; the stream may go on meanwhile.
Out: a line a check, and a few of the keys that differ; a row of quality.results each.

--from and --to limit what is compared of gold, and so the memory that it takes (its rows, and the five-second summaries
of one pair); bronze and silver are looked at as a whole. gold.current_price, which is of no time, is left out then.
--repair works on whole days.

Exit codes: 0 all holds, 1 something differs (also if it was repaired), 2 a wrong setting.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial, reduce
from itertools import pairwise
from typing import Any
from uuid import uuid4

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake import writer
from lake.gaps import Gap
from lake.intervals import Interval, add_interval, holes, minus
from lake.recomputation import ALWAYS, Period, Snapshot, by_span, gold_rows, period_of, stored_rows
from lake.rules import DECIDING, gold_rules
from lake.seen import runs
from lake.silver import Silver
from lake.summaries import to_micros, to_time
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    GOLD_CURRENT_PRICE,
    QUALITY_RESULTS,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    Table,
)
from lake.ticks import judged, valid_ticks

logger = logging.getLogger("batch.prove")

SHOWN = 5
# Not compared: they depend on when and how the ticks came.
NOT_COMPARED = ("is_late", "updated_at", "ingested_at", "quarantined_at")


@dataclass(frozen=True)
class Check:
    """What a check found: how many rows or keys break it, and a few of them in words."""

    table: Table
    name: str
    wrong: int
    told: Sequence[str] = ()

    def __str__(self) -> str:
        verdict = "holds " if not self.wrong else "BROKEN"
        count = f": {self.wrong}" if self.wrong else ""
        more = [f"    {text}" for text in self.told] + (["    ..."] if self.wrong > len(self.told) > 0 else [])
        return "\n".join([f"{verdict} {self.table.qualified_name}: {self.name}{count}", *more])


def found(table: Table, name: str, wrong: DataFrame, *shown: str) -> Check:
    """A check that no row breaks; shown: columns of those that do."""
    count = wrong.count()
    rows = wrong.select(*shown).limit(SHOWN).collect() if count else []
    return Check(
        table, name, count, [", ".join(f"{key}={value}" for key, value in row.asDict().items()) for row in rows]
    )


def bronze_checks(bronze: DataFrame) -> Iterator[Check]:
    place = Window.partitionBy("topic", "partition").orderBy("offset")
    steps = bronze.select("topic", "partition", "offset", F.lag("offset").over(place).alias("after"))
    missing = steps.where(F.col("offset") > F.col("after") + 1)
    missing = missing.withColumn("first_missing", F.col("after") + 1).withColumn("last_missing", F.col("offset") - 1)
    named = ("topic", "partition", "first_missing", "last_missing")
    yield found(BRONZE_TICKS, "Kafka's offsets are contiguous in each partition", missing, *named)
    twice = steps.where(F.col("offset") == F.col("after"))
    yield found(BRONZE_TICKS, "each Kafka record is there once", twice, "topic", "partition", "offset")


def silver_checks(snapshot: Snapshot, checked: DataFrame, valid: DataFrame) -> Iterator[Check]:
    place = ["topic", "partition", "offset"]
    same = [*place, "rule"]
    bad = checked.where(F.col("rule").isNotNull()).select(*same)
    quarantine = snapshot.read(SILVER_QUARANTINE).select(*same)
    absent, other = bad.join(quarantine, same, "left_anti"), quarantine.join(bad, same, "left_anti")
    twice = quarantine.groupBy(*place).count().where("count > 1")
    yield found(SILVER_QUARANTINE, "each record that breaks a rule is there, with the rule", absent, *same)
    yield found(SILVER_QUARANTINE, "nothing else is there", other, *same)
    yield found(SILVER_QUARANTINE, "each record is there once", twice, *place, "count")

    silver = snapshot.read(SILVER_TICKS)
    known = ["event_id", "kafka_partition", "kafka_offset"]
    absent, other = valid.join(silver, "event_id", "left_anti"), silver.join(valid, "event_id", "left_anti")
    twice = silver.groupBy("event_id").count().where("count > 1")
    yield found(SILVER_TICKS, "the tick of each valid record is there", absent, *known)
    yield found(SILVER_TICKS, "nothing else is there", other, *known)
    yield found(SILVER_TICKS, "each tick is there once", twice, "event_id", "count")
    columns = [name for name in SILVER_TICKS.column_names if name not in NOT_COMPARED]
    expected = first_deliveries(valid).select("event_id", F.struct(*columns).alias("expected"))
    both = silver.select("event_id", F.struct(*columns).alias("there")).join(expected, "event_id")
    differing = (F.when(~F.col(f"there.{name}").eqNullSafe(F.col(f"expected.{name}")), F.lit(name)) for name in columns)
    changed = both.withColumn("columns", F.array_compact(F.array(*differing))).where(F.size("columns") > 0)
    yield found(SILVER_TICKS, "each tick is as its first delivery says", changed, "event_id", "columns")
    versions = F.size(F.collect_set(F.struct("price_usd", "quantity")))
    disagree = valid.groupBy("event_id").agg(versions.alias("versions")).where("versions > 1")
    yield found(BRONZE_TICKS, "repeats of a tick agree in price and quantity", disagree, "event_id", "versions")


def first_deliveries(valid: DataFrame) -> DataFrame:
    """Each tick once, by its lowest offset."""
    first = Window.partitionBy("event_id").orderBy("kafka_partition", "kafka_offset")
    return valid.withColumn("delivery", F.row_number().over(first)).where("delivery = 1").drop("delivery")


def gap_checks(snapshot: Snapshot, checked: DataFrame, silver: DataFrame) -> Iterator[Check]:
    """Each hole in bronze's trade ids is in one open or unfillable row; the ids of filled rows are there."""
    numbered = {"run": silver, "rejected": checked.where(F.col("rule").isNotNull())}
    known: dict[str, dict[tuple[str, str, int], tuple[Interval, ...]]] = {}
    for kind, ticks in numbered.items():
        intervals: dict[tuple[str, str, int], tuple[Interval, ...]] = defaultdict(tuple)
        named = ticks.where("source IS NOT NULL AND symbol IS NOT NULL").withColumn(
            "trade_epoch", F.coalesce("trade_epoch", F.lit(0).cast("bigint"))
        )
        for row in runs(named).toLocalIterator():
            key = (row["source"], row["symbol"], row["trade_epoch"])
            intervals[key] = add_interval(intervals[key], (row["first"], row["last"]))
        known[kind] = intervals
    rows = [Gap(*row) for row in snapshot.read(SILVER_GAPS).select(*SILVER_GAPS.column_names).collect()]
    missing = {key: holes(there, known["rejected"].get(key, ())) for key, there in known["run"].items()}
    named_rows: dict[tuple[str, str, int], list[Interval]] = defaultdict(list)
    unnamed, false, twice, absent = [], [], [], []
    for gap in rows:
        if gap.interval and gap.status != "filled":
            named_rows[gap.instrument].append(gap.interval)
        elif gap.interval:
            absent += [f"{gap.gap_id}: {part}" for part in minus([gap.interval], known["run"].get(gap.instrument, ()))]
    for key in missing.keys() | named_rows.keys():
        listed = sorted(named_rows.get(key, []))
        union: tuple[Interval, ...] = reduce(add_interval, listed, ())
        twice += [f"{':'.join(map(str, key))}: {right}" for left, right in pairwise(listed) if left[1] >= right[0]]
        unnamed += [f"{':'.join(map(str, key))}: {part}" for part in minus(missing.get(key, []), union)]
        false += [f"{':'.join(map(str, key))}: {part}" for part in minus(union, missing.get(key, []))]
    for name, wrong in (
        ("each missing trade id is in an open or unfillable row", unnamed),
        ("only missing trade ids are", false),
        ("each is in one row", twice),
        ("the ids of filled rows have come", absent),
    ):
        yield Check(SILVER_GAPS, name, len(wrong), wrong[:SHOWN])


Values = tuple[object, ...]


@dataclass
class GoldDifferences:
    """What differs between a gold table and its recomputation, and the recomputed rows of the wrong spans."""

    check: Check
    spans: dict[int, list[Values]]


def gold_check(snapshot: Snapshot, table: Table, expected: list[Values], period: Period) -> GoldDifferences:
    """Compare a table's rows with the recomputed ones, key by key."""
    compared = [
        column.name
        for column in table.columns
        if column.name not in NOT_COMPARED and not column.type.startswith("STRUCT")
    ]
    wanted = {_key(table, row): row for row in map(partial(_named, table), expected)}
    told: list[str] = []
    spans: set[int] = set()
    wrong = 0
    seen: set[Values] = set()
    for stored in stored_rows(snapshot, table, period).toLocalIterator():
        there = stored.asDict()
        key = _key(table, there)
        problem = ""
        if key in seen:
            problem = "is there more than once"
        elif key not in wanted:
            problem = "should not be there"
        else:
            differing = [name for name in compared if not _same(there[name], wanted[key][name])]
            if differing:
                parts = (f"{name} is {there[name]}, should be {wanted[key][name]}" for name in differing)
                problem = "; ".join(parts)
        seen.add(key)
        if problem:
            wrong += 1
            told.append(f"{_told(table, key)}: {problem}")
            spans |= _spans(table, there, wanted.get(key))
    for key in wanted.keys() - seen:
        wrong += 1
        told.append(f"{_told(table, key)}: is missing")
        spans |= _spans(table, wanted[key])
    check = Check(table, "it is what all ticks together give", wrong, told[:SHOWN])
    return GoldDifferences(check, by_span(table, expected, spans))


def _named(table: Table, row: Values) -> dict[str, Any]:
    """By column, times in microseconds since 1970."""
    return {
        name: to_micros(value) if isinstance(value, datetime) else value
        for name, value in zip(table.column_names, row, strict=True)
    }


def _key(table: Table, row: dict[str, Any]) -> Values:
    return tuple(row[name] for name in table.key)


def _told(table: Table, key: Values) -> str:
    times = {column.name for column in table.columns if column.type == "TIMESTAMP"}
    return ", ".join(
        to_time(value).isoformat() if name in times and isinstance(value, int) else str(value)
        for name, value in zip(table.key, key, strict=True)
    )


def _spans(table: Table, *rows: dict[str, Any] | None) -> set[int]:
    return {table.span(row[table.file_time] if table.file_time else 0) for row in rows if row}


def _same(there: object, wanted: object) -> bool:
    if isinstance(there, float) and isinstance(wanted, float):
        return math.isclose(there, wanted, rel_tol=1e-9, abs_tol=1e-9)
    return there == wanted


def prove(spark: SparkSession, settings: Settings, period: Period, *, repair: bool = False) -> list[Check]:
    """All checks, each printed as soon as it is done."""
    snapshot = Snapshot.newest(spark, settings.lake_root)
    print(f"{settings.lake_root} as of micro-batch {snapshot.batch}", flush=True)
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        print(check, flush=True)

    bronze = snapshot.read(BRONZE_TICKS)
    checked = judged(bronze, settings.rejects_topic, settings.gaps_topic).drop("key", "kafka_timestamp")
    checked = checked.persist(StorageLevel.DISK_ONLY)
    valid = valid_ticks(checked, settings.gaps_topic, settings.future_tolerance_seconds)
    ticks = first_deliveries(valid).withColumn("is_late", F.lit(False)).persist(StorageLevel.DISK_ONLY)
    for check in bronze_checks(bronze):
        note(check)
    for check in silver_checks(snapshot, checked, valid):
        note(check)
    for check in gap_checks(snapshot, checked, ticks):
        note(check)

    rules = gold_rules(settings)
    rows: dict[str, list[Values]] = defaultdict(list)
    for table, row in gold_rows(Silver(lambda: ticks, rules), rules, period, datetime.now(UTC)):
        rows[table.qualified_name].append(row)
    for table in GOLD:
        if table == GOLD_CURRENT_PRICE and period != ALWAYS:
            continue
        differences = gold_check(snapshot, table, rows[table.qualified_name], period)
        note(differences.check)
        if repair and differences.spans:
            print(f"repaired {table.qualified_name}: {_repaired(snapshot, table, differences.spans)}", flush=True)
    for cached in (ticks, checked):
        cached.unpersist()
    return checks


def _repaired(snapshot: Snapshot, table: Table, spans: dict[int, list[Values]]) -> str:
    left = snapshot.rewrite(table, spans)
    told = f"{len(spans) - len(left)} spans of rows rewritten"
    return f"{told}, {len(left)} left, since the stream has written them meanwhile: run this again" if left else told


def results(checks: Sequence[Check], period: Period, checked_at: datetime) -> list[Values]:
    """Rows of quality.results."""
    run_id = uuid4().hex
    part = "all" if period == ALWAYS else f"{to_time(period.begin).isoformat()} to {to_time(period.end).isoformat()}"
    return [
        (
            *(run_id, checked_at, check.table.qualified_name, part, "proof", check.name, "", "error"),
            *(not check.wrong, "; ".join(check.told) or None, check.wrong),
        )
        for check in checks
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("lake_root", "rejects_topic", "gaps_topic", *DECIDING),
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
    checked_at = datetime.now(UTC)
    spark = SparkSession.builder.appName("tickhouse prove").getOrCreate()
    try:
        checks = prove(spark, settings, period, repair=own.repair)
        made = spark.createDataFrame(results(checks, period, checked_at), QUALITY_RESULTS.schema)
        writer.create_table(spark, QUALITY_RESULTS, settings.lake_root)
        writer.append(made, QUALITY_RESULTS, settings.lake_root)
    finally:
        spark.stop()
    broken = sum(1 for check in checks if check.wrong)
    print(f"{len(checks)} checks, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    sys.exit(main())
