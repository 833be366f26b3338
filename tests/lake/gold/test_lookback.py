"""Ticks looked back into: those that silver has in a stretch of time, in tick order, however its files are read."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from conf.settings import Settings
from lake.contract import Pair
from lake.delta.files import LocalDisk, files_of
from lake.delta.log import DataFile, TableLog
from lake.delta.writer import LakeWriter
from lake.gold.lookback import Lookback
from lake.gold.update import feeding
from lake.rules import GoldRules
from lake.tables import SILVER_TICKS
from lake.times import Range, to_micros
from tests.lakes import wrong_rows
from tests.micro_batches import START, in_kafka, lake_in, market, opened, write, write_one
from tests.oracle import Lake, Tick, lake_of
from tests.oracle_gold import instruments
from tests.ticks import compact

BEGIN = to_micros(START)
SECOND = 1_000_000


def seconds(first: float, last: float) -> Range:
    """From so many seconds after the start to before so many."""
    return (BEGIN + round(first * SECOND), BEGIN + round(last * SECOND))


def silver_files(settings: Settings) -> list[DataFile]:
    return TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).files()


def in_row_groups(file: DataFile, rows: int) -> DataFile:
    """The file, written again with row groups of so many rows."""
    path = Path(file.path.removeprefix("file:"))
    pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=rows)
    return replace(file, add={**file.add, "size": path.stat().st_size})


def lookback(files: Iterable[DataFile], symbols: dict[str, str] | None = None) -> Lookback:
    everything = list(files)
    return Lookback(LocalDisk(), lambda _: everything, lambda rows: feeding(rows, GoldRules(symbols or {})))


def looked_up(by: Lookback, pairs: Sequence[Pair], ranges: Sequence[Range]) -> list[tuple[str, str, str]]:
    """source, asset and event_id of each tick found."""
    rows = by.ticks(ranges, pl.DataFrame(pairs, schema=["source", "asset"], orient="row"))
    return rows.select("source", "asset", "event_id").rows()


def expected(lake: Lake, pairs: Sequence[Pair], ranges: Sequence[Range]) -> list[Tick]:
    """Of each pair, in tick order."""

    def asked(tick: Tick) -> bool:
        return any(begin <= to_micros(tick.gold_time) < end for begin, end in ranges)

    return [tick for pair in pairs for tick in instruments(lake.silver.values()).get(pair, []) if asked(tick)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A lake of two files a day."""
    settings = lake_in(tmp_path_factory.mktemp("lookback"))
    records = in_kafka(market(random.Random(5)))
    write(None, settings, [records[:300], records[300:]])
    return settings


@pytest.fixture(scope="module")
def silver() -> Lake:
    return lake_of(in_kafka(market(random.Random(5))))


PAIRS = [("a", "x"), ("a", "y"), ("b", "x")]
QUESTIONS: list[tuple[list[Pair], list[Range]]] = [
    (PAIRS, [seconds(60, 100), seconds(160, 200)]),
    (PAIRS[:1], [seconds(0, 1_200), seconds(2_400, 3_600)]),
    (PAIRS[1:], [seconds(120, 124), seconds(126, 130)]),
    (PAIRS, [seconds(-1_000, 10_000)]),
]


@pytest.mark.parametrize("large", [False, True], ids=["whole", "by row groups"])
@pytest.mark.parametrize("kept_rows", [10, 1_000_000])
def test_ticks_are_those_of_silver_in_tick_order(
    settings: Settings, silver: Lake, monkeypatch: pytest.MonkeyPatch, large: bool, kept_rows: int
) -> None:
    """In files that are read whole, and of row groups that are read one by one; asked again and again."""
    monkeypatch.setattr("lake.gold.lookback.KEPT_ROWS", kept_rows)
    files = silver_files(settings)
    assert sum(file.rows for file in files) == len(silver.silver)
    if large:
        monkeypatch.setattr("lake.gold.lookback.SMALL_FILE", 1)
        files = [in_row_groups(file, 20) for file in files]
    by = lookback(files)
    for pairs, ranges in QUESTIONS * 2:
        wanted = expected(silver, pairs, ranges)
        assert wanted
        for pair in pairs:
            of_pair = [(tick.event_id, tick.price_usd) for tick in wanted if (tick.source, tick.asset) == pair]
            assert [(tick.event_id, tick.price) for tick in by.of_pair(pair, ranges)] == of_pair
        assert sorted(looked_up(by, pairs, ranges)) == sorted((t.source, t.asset, t.event_id) for t in wanted)
    assert by.ticks([seconds(-100, -50)]).is_empty()
    assert by.ticks([seconds(10**9, 10**9 + 1)]).is_empty()


def test_only_the_row_groups_that_a_question_touches_are_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a late tick of an old day does not read the day's largest file."""
    monkeypatch.setattr("lake.gold.lookback.SMALL_FILE", 1)
    by = lookback([in_row_groups(file, 20) for file in silver_files(settings)])
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counting(file: pq.ParquetFile, number: int, columns: list[str]) -> object:
        read.append(number)
        return real(file, number, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    assert by.ticks([seconds(120, 121)]).height
    assert 0 < len(read) < 10
    first = len(read)
    by.ticks([seconds(120, 121)])
    assert len(read) == first, "they are kept"


def test_only_ticks_of_the_chosen_symbol_feed_gold(settings: Settings, silver: Lake) -> None:
    by = lookback(silver_files(settings), {"a:x": "OTHER", "b:x": "X"})
    assert {(source, asset) for source, asset, _ in looked_up(by, PAIRS, [seconds(0, 10_000)])} == {
        ("a", "y"),
        ("b", "x"),
    }


def tick(number: int, second: float, price: str = "100") -> bytes:
    at = (START + timedelta(seconds=second)).isoformat(timespec="microseconds")
    return compact(
        {"timestamp": at, "asset": "x", "price_usd": price, "source": "a", "symbol": "X", "trade_id": number}
    )


def test_ticks_older_than_what_is_remembered_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last few files are remembered; older ones, also such as came after the first look, stand in the log."""
    monkeypatch.setattr("lake.gold.lookback.KEPT_FILES", 3)
    settings = lake_in(tmp_path)
    lakehouse = opened(settings)
    # At second 4 of each bucket, and at second 1: a minute before second 2 lies among a bucket's ticks.
    records = in_kafka(tick(n, 30 * (n // 2) + (1, 4)[n % 2], f"{100 + n}") for n in range(40))
    for batch in range(20):
        write_one(lakehouse, records[2 * batch : 2 * batch + 2], batch)
        # The look that a micro-batch takes where it has to.
        assert lakehouse.gold._lookback.ticks([seconds(30 * batch, 30 * batch + 5)]).height == 2
    for begin in (0, 30, 150, 300, 420):
        found = lakehouse.gold._lookback.ticks([seconds(begin, begin + 5)])
        assert found["trade_id"].to_list() == [begin // 15, begin // 15 + 1], f"from second {begin}"


def test_a_late_alert_is_found_in_files_older_than_what_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2 on a job that has written more files than it remembers."""
    monkeypatch.setattr("lake.gold.lookback.KEPT_FILES", 3)
    settings = lake_in(tmp_path)
    jump = {3: "103", 60: "104"}
    ticks = {n: tick(n, 4 * n, jump.get(n, "100")) for n in range(120) if n not in (2, 59)}
    parts = [in_kafka([value], first=n) for n, value in ticks.items()]
    # The ticks before the jumps are late: without them nothing is to be seen, and the jumps have their alerts anew.
    late = in_kafka([tick(2, 8, "99"), tick(59, 236, "99")], first=200)
    write(None, settings, [*parts, late])
    records = [record for part in (*parts, late) for record in part]
    assert lake_of(records).alerts
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


@pytest.mark.parametrize("slow", ["", "add", "files_at"])
def test_the_ticks_of_a_micro_batch_itself_are_looked_up_while_silver_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Gold is made beside silver's commit, and does not wait for it: alerts need the ticks among the new ones."""
    settings = lake_in(tmp_path)
    values = [tick(n, 0.5 * n, "100" if n % 7 else "103") for n in range(40)]
    late = [tick(100, 3.3, "90"), tick(101, 90, "100"), tick(102, 91, "97")]
    parts = [in_kafka(values), in_kafka(late, first=100)]
    write(None, settings, parts[:1])
    if slow:
        slow_down(monkeypatch, slow)
    write(None, settings, parts[1:], first=1)
    expected = lake_of([record for part in parts for record in part])
    assert expected.alerts
    assert wrong_rows(settings.lake_root, expected) == {}


def slow_down(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let this method of the writer take long."""
    real = getattr(LakeWriter, name)

    def slowly(writer: LakeWriter, *arguments: object, **options: object) -> object:
        time.sleep(0.4)
        return real(writer, *arguments, **options)

    monkeypatch.setattr(LakeWriter, name, slowly)


@pytest.mark.parametrize("slow", [False, True], ids=["", "silver is slow"])
def test_a_file_that_maintenance_has_replaced_and_vacuumed_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """OPTIMIZE puts a day's files into one, and VACUUM deletes them a day later: a late tick finds the new one.

    Also while the file of the micro-batch itself is in no log yet.
    """
    settings = lake_in(tmp_path)
    lakehouse = opened(settings)
    records = in_kafka(tick(n, 4 * n, "100" if n != 5 else "103") for n in range(20))
    late = in_kafka([tick(100, 17, "99.5"), tick(101, 39, "98")], first=100)
    write_one(lakehouse, records[:10], 0)
    write_one(lakehouse, records[10:], 1)
    compact_and_vacuum(settings)
    # Its own memory of the ticks would hide it.
    lakehouse.gold._lookback._rows.clear()
    lakehouse.gold._lookback._groups.clear()
    if slow:
        slow_down(monkeypatch, "add")
    write_one(lakehouse, late, 2)
    lakehouse.finish()
    assert wrong_rows(settings.lake_root, lake_of([*records, *late])) == {}


def compact_and_vacuum(settings: Settings) -> None:
    """Put all files of silver.ticks into one, and delete the old ones."""
    files = files_of(settings.lake_root, "")
    log = TableLog(files, SILVER_TICKS.path(settings.lake_root))
    old = log.files()
    rows = pl.concat(pl.read_parquet(file.path.removeprefix("file:")) for file in old)
    (first, *_) = old
    name = first.add["path"].replace("part-", "compacted-")
    path = Path(log.path.removeprefix("file:")) / name
    rows.write_parquet(path)
    made = log.file({**first.add, "path": name, "size": path.stat().st_size, "stats": _statistics(old)})
    assert log.put(log.newest() + 1, {}, [made], old, data_change=False)
    for file in old:
        Path(file.path.removeprefix("file:")).unlink()


def _statistics(files: Sequence[DataFile]) -> str:
    """Those of all files together."""
    names = files[0].lowest.keys()
    return json.dumps(
        {
            "numRecords": sum(file.rows for file in files),
            "minValues": {name: min(file.lowest[name] for file in files) for name in names},
            "maxValues": {name: max(file.highest[name] for file in files) for name in names},
            "nullCount": {name: sum(file.nulls[name] for file in files) for name in files[0].nulls},
        }
    )


def test_a_time_of_a_file_is_known_to_the_millisecond_only(tmp_path: Path) -> None:
    """Delta's statistics are cut: the last tick of a file may be up to a millisecond above them."""
    settings = lake_in(tmp_path)
    write(None, settings, [in_kafka([tick(1, 0), tick(2, 7.9999)])])
    by = lookback(silver_files(settings))
    at = BEGIN + 7_999_900
    assert by.ticks([(at, at + 1)])["trade_id"].to_list() == [2]
    assert datetime.fromisoformat(silver_files(settings)[0].highest["event_time"]).microsecond == 999_000
