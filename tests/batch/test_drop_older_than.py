"""Old rows are dropped as shown and not otherwise; the proof, a repair and a rebuild know what is no longer there."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from batch import drop_older_than
from batch.drop_older_than import planned
from batch.prove import Check, prove
from batch.recompute import is_whole
from conf.settings import Settings
from lake.delta.drop import DROPPED_BEFORE
from lake.delta.files import LocalDisk
from lake.delta.log import TableLog
from lake.gold.recompute import ALWAYS, Period, Snapshot
from lake.reader import read
from lake.tables import BRONZE_TICKS, GOLD_PRICE_1M, SILVER_QUARANTINE, SILVER_TICKS, Table
from lake.times import DAY, to_micros
from streaming.rebuild import RowsDropped, check_complete
from tests.batch.neglected import maintain
from tests.lakes import rows_of
from tests.micro_batches import lake_in, opened, write, write_one
from tests.oracle import Record

FIRST = datetime(2024, 8, 5, 10, tzinfo=UTC)
DAYS = 4


def event_time(row: Mapping[str, object]) -> datetime:
    time = row["event_time"]
    assert isinstance(time, datetime)
    return time


def records_of_days(chance: random.Random) -> list[list[Record]]:
    """A micro-batch for each half of a day: ticks with holes and late ones, and a record that is none."""
    batches: list[list[Record]] = []
    offset, trade_id = 0, 0
    held: list[tuple[datetime, int]] = []
    for half in range(2 * DAYS):
        begin, batch = FIRST + timedelta(hours=12 * half), list[Record]()
        ticks = [(begin + timedelta(seconds=7 * n), trade_id + n) for n in range(1, 60)]
        trade_id += 60
        # The hole of one id in sixty; every tenth tick comes with the next micro-batch.
        late = set(chance.sample(range(len(ticks)), 6))
        ordered = held + [tick for n, tick in enumerate(ticks) if n not in late]
        held = [tick for n, tick in enumerate(ticks) if n in late]
        for time, number in ordered:
            value = {
                "timestamp": time.isoformat(timespec="microseconds"),
                "event_time": time.isoformat(timespec="microseconds"),
                "asset": "x",
                "source": "a",
                "symbol": "X",
                "producer": "p",
                "quantity": "1",
                "price_usd": f"{100 + number % 7}",
                "trade_id": number,
                "sequence": number,
            }
            arrived = max(time, begin) + timedelta(seconds=0.5)
            batch.append(Record("ticks", 0, offset, None, json.dumps(value).encode(), arrived))
            offset += 1
        batch.append(Record("ticks", 0, offset, None, b"{", begin + timedelta(seconds=500)))
        offset += 1
        batches.append(batch)
    return batches


@pytest.fixture
def lake(tmp_path: Path) -> Settings:
    settings = lake_in(tmp_path)
    write(None, settings, records_of_days(random.Random(1)))
    return settings


def asked(settings: Settings, *arguments: str) -> int:
    return drop_older_than.main([*arguments, "--lake-root", settings.lake_root])


def test_a_dry_run_says_what_would_go(lake: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted from the rows themselves."""
    cut = FIRST + timedelta(days=2, minutes=3)
    before = rows_of(lake.lake_root, SILVER_TICKS)
    assert asked(lake, "silver.ticks", "--before", cut.isoformat()) == 0
    said = capsys.readouterr().out
    counts = re.search(r"files: ([\d,]+), rows: ([\d,]+), bytes", said)
    stay = re.search(r"younger rows: ([\d,]+)", said)
    assert counts
    assert stay
    old = sum(event_time(row) < cut for row in before.values())
    assert int(counts[2]) + int(stay[1]) == old
    assert int(counts[2]) > 0
    assert int(stay[1]) > 0
    assert rows_of(lake.lake_root, SILVER_TICKS) == before


def test_exactly_what_was_shown_is_dropped(lake: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    cut = FIRST + timedelta(days=2)
    arguments = ("silver.ticks", "--before", cut.isoformat())
    before = rows_of(lake.lake_root, SILVER_TICKS)
    drop = planned(LocalDisk(), lake.lake_root, SILVER_TICKS, cut)
    assert asked(lake, *arguments, "--execute", "0123456789abcdef") == 1
    assert "look again" in capsys.readouterr().err
    assert rows_of(lake.lake_root, SILVER_TICKS) == before
    # Another program joins files: then the list is another one.
    maintain(lake, tables=[SILVER_TICKS])
    assert asked(lake, *arguments, "--execute", drop.checksum) == 1
    assert rows_of(lake.lake_root, SILVER_TICKS) == before
    drop = planned(LocalDisk(), lake.lake_root, SILVER_TICKS, cut)
    assert asked(lake, *arguments, "--execute", drop.checksum) == 0
    after = rows_of(lake.lake_root, SILVER_TICKS)
    assert len(before) - len(after) == sum(file.rows for file in drop.files) > 0
    assert all(event_time(before[key]) < cut for key in before.keys() - after.keys())
    properties = TableLog(LocalDisk(), SILVER_TICKS.path(lake.lake_root)).state().configuration
    assert properties["delta.appendOnly"] == "false"
    assert datetime.fromisoformat(properties[DROPPED_BEFORE]) == cut


def test_the_stream_goes_on_beside_a_drop(tmp_path: Path) -> None:
    """The driver does not know of it. A late tick of a dropped minute makes that minute anew, of itself alone."""
    settings, batches = lake_in(tmp_path), records_of_days(random.Random(2))
    house = opened(settings)
    for number, batch in enumerate(batches[:6]):
        write_one(house, batch, number)
    cut = FIRST + timedelta(days=2)
    for table in (SILVER_TICKS, GOLD_PRICE_1M):
        drop = planned(LocalDisk(), settings.lake_root, table, cut)
        assert drop_older_than.execute(LocalDisk(), settings.lake_root, drop) is None
    for number, batch in enumerate(batches[6:], 6):
        write_one(house, batch, number)
    house.finish()
    trade_ids = [row["trade_id"] for row in rows_of(settings.lake_root, SILVER_TICKS).values()]
    assert len(trade_ids) == len(set(trade_ids))
    newer = {
        json.loads(record.value or b"")["trade_id"] for batch in batches[6:] for record in batch if record.value != b"{"
    }
    assert newer <= {int(str(trade_id)) for trade_id in trade_ids}


@pytest.mark.parametrize(
    "arguments",
    [("gold.current_price", "3"), ("silver.ticks",), ("silver.ticks", "3", "--before", "2024-08-09"), ("x", "-1")],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        drop_older_than.main([*arguments, "--lake-root", f"file:{tmp_path}"])


def dropped(settings: Settings, table: Table, days: float) -> None:
    drop = planned(LocalDisk(), settings.lake_root, table, FIRST + timedelta(days=days))
    assert drop.files
    assert drop_older_than.execute(LocalDisk(), settings.lake_root, drop) is None


def broken(checks: list[Check]) -> list[str]:
    return [str(check) for check in checks if check.wrong]


def test_the_proof_compares_what_both_sides_can_have(
    spark: SparkSession, lake: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of bronze, of silver and of gold were dropped; a wrong row of the days that are left is still told."""
    files = LocalDisk()
    dropped(lake, GOLD_PRICE_1M, 1)
    dropped(lake, SILVER_TICKS, 1.5)
    dropped(lake, BRONZE_TICKS, 1.2)
    checks = prove(spark, files, lake, ALWAYS)
    assert broken(checks) == []
    said = capsys.readouterr().out
    assert f"left out bronze.ticks: rows from before {(FIRST + timedelta(days=1.2)).isoformat()} were dropped" in said
    # The last day can be compared.
    name = f"delta.`{GOLD_PRICE_1M.path(lake.lake_root)}`"
    spark.sql(f"UPDATE {name} SET close = close + 1 WHERE window_start >= TIMESTAMP'2024-08-08 00:00:00'")
    name = f"delta.`{SILVER_TICKS.path(lake.lake_root)}`"
    spark.sql(f"DELETE FROM {name} WHERE event_time >= TIMESTAMP'2024-08-08 00:00:00' AND trade_id % 50 = 0")
    wrong = " ".join(broken(prove(spark, files, lake, ALWAYS)))
    assert "gold.price_1m: it is what all ticks together give" in wrong
    assert "silver.ticks: the tick of each valid record is there" in wrong


def test_days_without_all_their_ticks_are_not_rebuilt(spark: SparkSession, lake: Settings) -> None:
    dropped(lake, SILVER_TICKS, 2)
    snapshot = Snapshot.newest(spark, lake.lake_root, LocalDisk())
    begin = to_micros(FIRST) // DAY * DAY
    whole = [is_whole(snapshot, Period(begin + n * DAY, begin + (n + 1) * DAY)) for n in range(5)]
    assert whole == [False, False, False, True, True]


def test_a_rebuild_without_all_records_is_refused(lake: Settings) -> None:
    dropped(lake, BRONZE_TICKS, 1)
    properties = TableLog(LocalDisk(), BRONZE_TICKS.path(lake.lake_root)).state().configuration
    with pytest.raises(RowsDropped, match=r"dropped from bronze\.ticks"):
        check_complete(properties[DROPPED_BEFORE], BRONZE_TICKS.path(lake.lake_root))
    check_complete(None, BRONZE_TICKS.path(lake.lake_root))


def test_quarantine_is_dropped_by_its_own_time(lake: Settings) -> None:
    """It was written just now."""
    drop = planned(LocalDisk(), lake.lake_root, SILVER_QUARANTINE, datetime.now(UTC) - timedelta(days=1))
    assert drop.files == []
    assert read(lake.lake_root, SILVER_QUARANTINE).num_rows == 2 * DAYS
