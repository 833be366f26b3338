"""The proof: it holds for what the stream wrote, names each kind of damage, and repairs what bronze allows."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Hashable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from batch.prove import Check, prove
from batch.recompute import recompute
from conf.settings import Settings
from lake.contract import TickRules
from lake.delta.files import files_of
from lake.delta.log import TableLog
from lake.delta.overtaken import FileLost, Overtaken
from lake.gold.recompute import ALWAYS, Period, Snapshot, fill_price_5s
from lake.rules import gold_rules
from lake.silver import stage
from lake.silver.read import Contents, read
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1H,
    GOLD_PRICE_1M,
    GOLD_PRICE_5S,
    GOLD_ROLLING_PRICE,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    Table,
)
from lake.times import DAY, to_micros
from tests.batch.neglected import maintain
from tests.lakes import rows_of
from tests.micro_batches import START, in_kafka, lake_in, market, write
from tests.oracle import Record, lake_of
from tests.ticks import TICK, compact

FILES = files_of("file:", "")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = lake_in(tmp_path_factory.mktemp("proof"))
    values = market(random.Random(3))
    # One trade in a hundred never comes, and one record in a hundred is no tick.
    kept = [value for at, value in enumerate(values) if at % 100 != 50]
    values = [b"{" if at % 100 == 70 else value for at, value in enumerate(kept)]
    half = len(values) // 2
    values[half:half] = values[half - 20 : half]
    records = [Record("ticks", 0, number, None, value) for number, value in enumerate(values)]
    assert lake_of(records).alerts
    write(None, settings, [records[:half], records[half:]])
    return settings


def broken(checks: list[Check]) -> dict[tuple[str, str], Check]:
    return {(check.table.qualified_name, check.name): check for check in checks if check.wrong}


def test_what_the_stream_wrote_holds(spark: SparkSession, lake: Settings) -> None:
    checks = prove(spark, FILES, lake, ALWAYS)
    assert broken(checks) == {}
    assert len(checks) > 15


def test_a_record_that_was_not_read_is_left_out_and_one_quote_of_a_venue_counts(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stream could not read it, so the proof does not ask for its tick."""

    def read_some(records: pa.Table, rules: TickRules) -> Contents:
        if any(b"unlucky" in value for value in records["value"].to_pylist()):
            raise ValueError("a defect")
        return read(records, rules)

    monkeypatch.setattr(stage, "read", read_some)
    settings = lake_in(tmp_path)
    values: list[bytes | None] = []
    for number in range(40):
        quote = ("USD", "USDT")[number % 2]
        fields = {**TICK, "source": "kraken", "symbol": f"BTC/{quote}", "quote": quote, "trade_id": number}
        values.append(compact({**fields, "price_usd": str(100 + 4 * (number % 2)), "producer": f"p{number}"}))
    values.insert(20, compact({**TICK, "producer": "unlucky"}))
    write(None, settings, [in_kafka(values)])
    assert broken(prove(spark, FILES, settings, ALWAYS)) == {}
    assert "not compared: 1 records" in capsys.readouterr().out
    assert [row["tick_count"] for row in rows_of(settings.lake_root, GOLD_PRICE_1M).values()] == [20]


def change(spark: SparkSession, settings: Settings, table: Table, sql: str) -> None:
    """Run a statement on a table, {} in which is its name."""
    name = f"delta.`{table.path(settings.lake_root)}`"
    if table.properties.get("delta.appendOnly"):
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.appendOnly' = 'false')")
    spark.sql(sql.replace("{}", name))


def test_a_day_is_rebuilt_from_silver(spark: SparkSession, lake: Settings) -> None:
    """The tables of one day emptied, and rebuilt as they were; the stream's next micro-batch finds them changed."""
    tables = [table for table in GOLD if table != GOLD_CURRENT_PRICE]
    before = {table.name: rows_of(lake.lake_root, table) for table in tables}
    for table in tables:
        change(spark, lake, table, "DELETE FROM {}")
    begin = to_micros(START) // DAY * DAY
    for day in (begin, begin + DAY):
        snapshot = Snapshot.newest(spark, lake.lake_root, FILES)
        for table, left in recompute(snapshot, gold_rules(lake), Period(day, day + DAY)):
            assert left == [], table.qualified_name
    for table in tables:
        after = rows_of(lake.lake_root, table)
        assert changed(before[table.name], after) == [], table.qualified_name
        assert len(after) > 1


def changed(before: dict[Hashable, dict[str, object]], after: dict[Hashable, dict[str, object]]) -> list[str]:
    """What is another value but for updated_at; a sum of doubles depends on its order, in the last digits."""
    assert before.keys() == after.keys()
    return [
        f"{key} {name}: {value!r} is {after[key][name]!r} now"
        for key, row in before.items()
        for name, value in row.items()
        if name != "updated_at" and not _same(value, after[key][name])
    ]


def _same(one: object, other: object) -> bool:
    """Doubles to a tenth of what promise 3 allows."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-10, abs_tol=1e-12)
    return one == other


def last(spark: SparkSession, settings: Settings, table: Table, column: str) -> str:
    """The highest value of a column, as a literal of SQL."""
    row = spark.read.format("delta").load(table.path(settings.lake_root)).agg({column: "max"}).first()
    assert row is not None
    return f"TIMESTAMP'{row[0]}'" if isinstance(row[0], datetime) else str(row[0])


def test_one_wrong_bucket_among_many_in_a_file_is_repaired_and_no_other_row_is_touched(
    spark: SparkSession, lake: Settings
) -> None:
    path = GOLD_PRICE_5S.path(lake.lake_root)
    before = rows_of(lake.lake_root, GOLD_PRICE_5S)
    in_order = sorted(before, key=lambda key: str(before[key]["window_start"]))
    wrong = in_order[len(in_order) // 2]
    row = before[wrong]
    key = f"source = '{row['source']}' AND asset = '{row['asset']}' AND window_start = TIMESTAMP'{row['window_start']}'"
    change(spark, lake, GOLD_PRICE_5S, f"UPDATE {{}} SET close = close * 2 WHERE {key}")
    files = len(spark.read.format("delta").load(path).inputFiles())
    assert len(before) > 10 * files, "a file has many buckets"

    hour = 3_600_000_000
    begin = to_micros(START) // hour * hour
    (check,) = broken(prove(spark, FILES, lake, Period(begin, begin + hour), repair=True)).values()
    assert check.table == GOLD_PRICE_5S
    assert check.wrong == 1
    assert "close is" in str(check)
    after = rows_of(lake.lake_root, GOLD_PRICE_5S)
    assert changed(before, after) == []
    same_span = {key for key in before if before[key]["window_start"] == row["window_start"]}
    assert {key for key in before if before[key] != after[key]} <= same_span
    assert len(spark.read.format("delta").load(path).inputFiles()) <= files


DAY_BEFORE = datetime(2024, 8, 9, tzinfo=UTC)


def tick(seconds: int, trade_id: int, price: str) -> bytes:
    """A tick of pair a/x, so many seconds after DAY_BEFORE began."""
    time = (DAY_BEFORE + timedelta(seconds=seconds)).isoformat(timespec="microseconds")
    named = {"asset": "x", "source": "a", "symbol": "X", "producer": "p", "sequence": trade_id, "quantity": "1"}
    return json.dumps(
        {**named, "timestamp": time, "event_time": time, "price_usd": price, "trade_id": trade_id}
    ).encode()


@pytest.fixture(scope="module")
def quiet_lake(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An episode opens before midnight and ends three hours after it; trade 2 comes late, and is no tick."""
    settings = lake_in(tmp_path_factory.mktemp("quiet"))
    values = [tick(86_000, 1, "100"), tick(86_005, 3, "103"), tick(97_000, 4, "103"), tick(97_001, 2, "0")]
    write(None, settings, [in_kafka(values[:3]), in_kafka(values[3:], first=3)])
    return settings


def test_an_episode_across_midnight_is_proven(spark: SparkSession, quiet_lake: Settings) -> None:
    (alert,) = rows_of(quiet_lake.lake_root, GOLD_ALERTS).values()
    assert (alert["opened_at"], alert["closed_at"]) == tuple(
        DAY_BEFORE + timedelta(seconds=s) for s in (86_005, 97_000)
    )
    assert broken(prove(spark, FILES, quiet_lake, ALWAYS)) == {}
    change(spark, quiet_lake, GOLD_ALERTS, "UPDATE {} SET closed_at = NULL")
    (check,) = broken(prove(spark, FILES, quiet_lake, ALWAYS, repair=True)).values()
    assert "closed_at is None, should be 2024-08-10T02:56:40+00:00" in str(check)
    (repaired,) = rows_of(quiet_lake.lake_root, GOLD_ALERTS).values()
    assert {**repaired, "updated_at": None} == {**alert, "updated_at": None}


def test_a_day_is_proven_alone_however_long_the_silence_after_it(spark: SparkSession, quiet_lake: Settings) -> None:
    """Of rolling prices those exist that the pair's next tick, hours later, lies after."""
    begin = to_micros(DAY_BEFORE)
    assert broken(prove(spark, FILES, quiet_lake, Period(begin, begin + DAY))) == {}


def test_a_gap_is_filled_by_a_record_in_quarantine_too(spark: SparkSession, quiet_lake: Settings) -> None:
    (gap,) = rows_of(quiet_lake.lake_root, SILVER_GAPS).values()
    assert (gap["status"], gap["first_missing"], gap["last_missing"]) == ("filled", 2, 2)
    change(spark, quiet_lake, SILVER_GAPS, "UPDATE {} SET last_missing = 9")
    (check,) = broken(prove(spark, FILES, quiet_lake, ALWAYS)).values()
    assert check.name == "the ids of filled rows have come"
    assert check.examples == ["a:X:0:2: (5, 9)"]


def test_the_five_seconds_of_a_lake_without_any_are_those_of_its_ticks(spark: SparkSession, lake: Settings) -> None:
    before = rows_of(lake.lake_root, GOLD_PRICE_5S)
    change(spark, lake, GOLD_PRICE_5S, "DELETE FROM {}")
    filled = dict(fill_price_5s(spark, lake.lake_root, FILES, gold_rules(lake), datetime.now(UTC)))
    assert sum(filled.values()) == len(before)
    assert changed(before, rows_of(lake.lake_root, GOLD_PRICE_5S)) == []


def test_a_proof_that_is_overtaken_says_so_and_a_lost_file_is_damage(spark: SparkSession, tmp_path: Path) -> None:
    """The files of its version are replaced, and deleted after the history, while it reads."""
    settings = lake_in(tmp_path, history_minutes=30)
    values = market(random.Random(5))[:301]
    write(None, settings, [in_kafka(values[:200]), in_kafka(values[200:300], first=200)])
    snapshot = Snapshot.newest(spark, settings.lake_root, FILES)
    write(None, settings, [in_kafka(values[300:], first=300)], first=2)
    for minutes in (0, 40):
        maintain(settings, ahead=timedelta(minutes=minutes, seconds=1))
    with pytest.raises(Overtaken, match=r"history is 30 minutes \(setting history_minutes\)"), snapshot.reading():
        snapshot.read(BRONZE_TICKS).collect()
    snapshot = Snapshot.newest(spark, settings.lake_root, FILES)
    with snapshot.reading():
        assert len(snapshot.read(BRONZE_TICKS).collect()) == 301
    file = TableLog(FILES, BRONZE_TICKS.path(settings.lake_root)).files()[0]
    FILES.delete(file.path)
    with pytest.raises(FileLost, match=Path(file.path).name), snapshot.reading():
        snapshot.read(BRONZE_TICKS).collect()


def test_each_kind_of_damage_is_named_and_repaired_where_bronze_allows_it(spark: SparkSession, lake: Settings) -> None:
    path = SILVER_TICKS.path(lake.lake_root)
    silver = spark.read.format("delta").load(path).orderBy("kafka_offset").limit(60).collect()
    lost, doubled = silver[10]["event_id"], silver[20]["event_id"]
    change(spark, lake, BRONZE_TICKS, "DELETE FROM {} WHERE offset = 40")
    change(spark, lake, SILVER_TICKS, f"DELETE FROM {{}} WHERE event_id = '{lost}'")
    change(spark, lake, SILVER_TICKS, f"INSERT INTO {{}} SELECT * FROM {{}} WHERE event_id = '{doubled}'")
    change(
        spark,
        lake,
        SILVER_QUARANTINE,
        f"DELETE FROM {{}} WHERE offset = {last(spark, lake, SILVER_QUARANTINE, 'offset')}",
    )
    minutes = spark.read.format("delta").load(GOLD_PRICE_1M.path(lake.lake_root)).orderBy("window_start").collect()
    keys = [
        f"source = '{row['source']}' AND asset = '{row['asset']}' AND window_start = TIMESTAMP'{row['window_start']}'"
        for row in minutes[-6:]
    ]
    change(spark, lake, GOLD_PRICE_1M, f"UPDATE {{}} SET average = average + 0.000000000001 WHERE {keys[0]}")
    change(spark, lake, GOLD_PRICE_1M, f"UPDATE {{}} SET open = open * 2 WHERE {keys[1]}")
    change(spark, lake, GOLD_PRICE_1M, f"DELETE FROM {{}} WHERE {keys[2]}")
    shifted = "last_event_time = last_event_time + INTERVAL 1 MICROSECOND"
    change(spark, lake, GOLD_PRICE_1M, f"UPDATE {{}} SET {shifted} WHERE {keys[3]}")
    change(
        spark,
        lake,
        GOLD_PRICE_5S,
        f"DELETE FROM {{}} WHERE window_start = {last(spark, lake, GOLD_PRICE_5S, 'window_start')}",
    )
    change(spark, lake, GOLD_PRICE_1H, "UPDATE {} SET tick_count = tick_count + 1")
    change(
        spark,
        lake,
        GOLD_ROLLING_PRICE,
        f"DELETE FROM {{}} WHERE as_of = {last(spark, lake, GOLD_ROLLING_PRICE, 'as_of')}",
    )
    change(
        spark, lake, GOLD_ALERTS, f"DELETE FROM {{}} WHERE opened_at = {last(spark, lake, GOLD_ALERTS, 'opened_at')}"
    )
    change(
        *(spark, lake, SILVER_GAPS),
        "INSERT INTO {} VALUES ('a:X:0:5', 'a', 'X', 0, 5, 6, NULL, now(), 'open', 'false', NULL, NULL)",
    )

    found = broken(prove(spark, FILES, lake, ALWAYS, repair=True))
    everything = "it is what all ticks together give"
    assert found["bronze.ticks", "Kafka's offsets are contiguous in each partition"].examples == [
        "topic=ticks, partition=0, first_missing=40, last_missing=40"
    ]
    assert lost in str(found["silver.ticks", "the tick of each valid record is there"])
    assert doubled in str(found["silver.ticks", "each tick is there once"])
    assert found["silver.quarantine", "each record that breaks a rule is there, with the rule"].wrong == 1
    wrong_minutes = str(found["gold.price_1m", everything])
    assert found["gold.price_1m", everything].wrong >= 4
    for part in ("average is", "open is", "is missing", "last_event_time is"):
        assert part in wrong_minutes
    assert "is missing" in str(found["gold.price_5s", everything])
    assert "tick_count is" in str(found["gold.price_1h", everything])
    assert found["gold.rolling_price", everything].wrong >= 1
    assert "is missing" in str(found["gold.alerts", everything])
    assert "a:X:0: (5, 6)" in str(found["silver.gaps", "only missing trade ids are"])

    again = broken(prove(spark, FILES, lake, ALWAYS))
    assert {table for table, _ in again} == {"bronze.ticks", "silver.ticks", "silver.quarantine", "silver.gaps"}
