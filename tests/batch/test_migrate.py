"""A lake knows its version: one that an earlier suite wrote is refused, taken forward in place, and proven then."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Hashable, Mapping
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from batch import check_quality, migrate, prove, recompute
from conf.settings import Settings
from lake.delta.files import files_of
from lake.delta.log import TableLog
from lake.delta.version import OtherVersion, version_of
from lake.gold.recompute import ALWAYS
from lake.reader import read
from lake.tables import BRONZE_TICKS, GOLD, GOLD_PRICE_5S, SILVER_QUARANTINE, SILVER_TICKS, VERSION
from streaming.lakehouse import resume
from tests.lakes import rows_of
from tests.micro_batches import market, write
from tests.oracle import Lake, Record, Row, differences, lake_of

# Written by the suite before gold.price_5s: three micro-batches of tests.micro_batches.market(random.Random(7)), with
# late ticks, repeats, holes, records in another layout and records that are no ticks.
JOB_ARGUMENTS = {
    "batch.prove": [],
    "batch.recompute": ["--from", "2024-08-09", "--to", "2024-08-10"],
    "batch.check_quality": ["--date", "2024-08-09"],
}
VERSION_1 = Path(__file__).parent / "lake-version-1.tar.gz"


@pytest.fixture
def old_lake(tmp_path: Path) -> Settings:
    with tarfile.open(VERSION_1) as archive:
        archive.extractall(tmp_path, filter="data")
    return Settings(lake_root=f"file:{tmp_path / 'lake'}", checkpoint=f"file:{tmp_path / 'checkpoint'}")


def records_of(settings: Settings) -> list[Record]:
    """Those that bronze has."""
    rows = read(settings.lake_root.removeprefix("file:"), BRONZE_TICKS).to_pylist()
    return [Record(row["topic"], row["partition"], row["offset"], row["key"], row["value"]) for row in rows]


def compare(settings: Settings, expected: Lake) -> None:
    tables: list[Mapping[Hashable, Row]] = [
        *(expected.silver, expected.quarantine, expected.price_5s),
        *(expected.price_1m, expected.price_5m, expected.price_1h, expected.price_1d),
        *(expected.rolling_price, expected.current_price, expected.alerts),
    ]
    for table, rows in zip((SILVER_TICKS, SILVER_QUARANTINE, *GOLD), tables, strict=True):
        assert differences(rows, rows_of(settings.lake_root, table)) == [], table.qualified_name


def test_a_lake_of_the_first_version_is_taken_forward(
    spark: SparkSession, old_lake: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused until then; nothing is done without --execute; then the stream goes on, and the proof holds."""
    files = files_of(old_lake.lake_root, "")
    with pytest.raises(OtherVersion, match=r"version 1 .* batch/migrate\.py"):
        resume(spark, old_lake)
    for job in (prove.main, recompute.main, check_quality.main):
        with pytest.raises(SystemExit, match="2"):
            job([*JOB_ARGUMENTS[job.__module__], "--lake-root", old_lake.lake_root])
        assert "batch/migrate.py" in capsys.readouterr().err
    assert not migrate.migrate(spark, files, old_lake, execute=False)
    dry_run = capsys.readouterr().out
    assert "gold.price_5s: create it" in dry_run
    assert "gold.price_1m: add column volume_sum DECIMAL(38,12)" in dry_run
    assert version_of(files, old_lake.lake_root, GOLD_PRICE_5S) is None
    assert version_of(files, old_lake.lake_root, SILVER_TICKS) == 1

    assert not migrate.migrate(spark, files, old_lake, execute=True)
    assert version_of(files, old_lake.lake_root, SILVER_TICKS) == VERSION
    assert list(migrate.steps(files, old_lake)) == []
    before = records_of(old_lake)
    compare(old_lake, lake_of(before))

    # What follows: the last tick again, late ticks of old minutes, and new ones.
    known = {record.value for record in before}
    values = [value for value in market(random.Random(7)) if value not in known]
    others = (value.replace(b'"producer":"p', b'"producer":"q') for value in market(random.Random(8))[-50:])
    values += [value.replace(b'"trade_epoch":0', b'"trade_epoch":1') for value in others]
    values.append(before[-1].value or b"")
    first = len(before)
    more = [Record("ticks", 0, first + number, None, value) for number, value in enumerate(values)]
    write(None, old_lake, [more], first=3)
    compare(old_lake, lake_of([*before, *more]))
    checks = prove.prove(spark, files, old_lake, ALWAYS)
    assert [str(check) for check in checks if check.wrong] == []


def test_a_lake_whose_silver_breaks_the_rules_of_today_needs_a_rebuild(
    spark: SparkSession, old_lake: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tick of the year 1960, which the first version took."""
    log = TableLog(files_of(old_lake.lake_root, ""), BRONZE_TICKS.path(old_lake.lake_root))
    first = next(record for record in records_of(old_lake) if record.offset == 0)
    message = json.loads(first.value or b"")
    rows = spark.read.format("delta").load(log.path).where("offset = 0")
    forged = json.dumps({**message, "event_time": "1960-01-01T00:00:00Z", "trade_id": 10**6}).encode()
    changed = [(None, bytearray(forged), "ticks", 0, 10_000, *row[5:]) for row in rows.collect()]
    spark.createDataFrame(changed, rows.schema).write.format("delta").mode("append").save(log.path)
    silver = f"delta.`{SILVER_TICKS.path(old_lake.lake_root)}`"
    spark.sql(
        f"INSERT INTO {silver} SELECT 'a:X:0:1000000', source, symbol, asset, quote, price_usd, quantity, 1000000, 0, "
        "TIMESTAMP '1960-01-01 00:00:00', received_at, producer, sequence, 0, 10000, false, false, DATE '1960-01-01' "
        f"FROM {silver} WHERE kafka_offset = 0"
    )
    files = files_of(old_lake.lake_root, "")
    assert migrate.migrate(spark, files, old_lake, execute=True)
    assert "--rebuild" in capsys.readouterr().out
    with pytest.raises(OtherVersion):
        resume(spark, old_lake)
    assert version_of(files, old_lake.lake_root, GOLD_PRICE_5S) == VERSION
