"""A lake that is made old has the same rows, and the stream goes on with it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.aged import by_path, counts, holds, main, queries, render
from benchmarks.lakes import age, neglect
from benchmarks.load import Market, Shape
from conf.settings import Settings
from lake.delta.files import Files, files_of
from lake.delta.log import TableLog
from lake.reader import query, read
from lake.tables import BRONZE_TICKS, GOLD_CURRENT_PRICE, GOLD_PRICE_1H, GOLD_PRICE_1M, SILVER_TICKS, STREAMED, Table
from tests.micro_batches import in_kafka, lake_in, write

BEGAN_NS = 1_700_000_000_000_000_000


def sent(count: int) -> list[bytes]:
    """Ticks of the load, a hundred milliseconds apart."""
    market = Market(Shape(2), 10, "producer")
    return [value for number in range(count) for _, value in market.next_records(BEGAN_NS + number * 100_000_000)]


def written(folder: Path, batches: int) -> Settings:
    """A lake of so many micro-batches of four ticks each."""
    settings = lake_in(folder)
    values = sent(4 * batches)
    write(None, settings, [in_kafka(values[4 * n : 4 * n + 4], first=4 * n) for n in range(batches)])
    return settings


def store(settings: Settings) -> Files:
    return files_of(settings.lake_root, str(settings.webhdfs_url))


def log_of(settings: Settings, table: Table) -> TableLog:
    return TableLog(store(settings), table.path(settings.lake_root))


def rows_of(settings: Settings, table: Table) -> pa.Table:
    return read(settings.lake_root, table).sort_by([(name, "ascending") for name in table.key])


def versions(settings: Settings, table: Table) -> list[int]:
    names = (status.name for status in store(settings).list(f"{table.path(settings.lake_root)}/_delta_log"))
    return [int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[0].isdigit()]


def check_that_the_stream_goes_on(settings: Settings, batches: int) -> None:
    """The next micro-batch, with repeats of ticks that silver has, adds its new ticks and no others."""
    values = sent(4 * batches + 4)
    records = [*in_kafka(values[-8:], first=4 * batches)]
    write(None, settings, [records], first=batches)
    assert rows_of(settings, SILVER_TICKS)["trade_id"].length() == 4 * batches + 4
    for table in (GOLD_PRICE_1M, GOLD_PRICE_1H):
        assert sum(rows_of(settings, table)["tick_count"].to_pylist()) == 4 * batches + 4


def test_an_aged_lake_has_the_same_rows_and_so_many_commits(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=60)
    before = [rows_of(settings, table) for table in STREAMED]
    age(store(settings), settings.lake_root, 20_000, kept=100)
    for table, rows in zip(STREAMED, before, strict=True):
        assert log_of(settings, table).newest() == 20_000
        assert rows_of(settings, table).equals(rows)
        kept = versions(settings, table)
        assert kept == list(range(kept[0], 20_001))
        assert len(kept) >= 100
    check_that_the_stream_goes_on(settings, batches=60)


def test_an_aged_lake_can_be_aged_again(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=5)
    age(store(settings), settings.lake_root, 200, kept=20)
    check_that_the_stream_goes_on(settings, batches=5)
    age(store(settings), settings.lake_root, 100_000, kept=20)
    for table in STREAMED:
        kept = versions(settings, table)
        assert kept == list(range(kept[0], 100_001))
        assert len(kept) < 60
    check_that_the_stream_goes_on(settings, batches=6)


def test_the_longer_windows_of_an_aged_lake_name_versions_that_exist(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=5)
    before = log_of(settings, GOLD_PRICE_1M).newest()
    log = log_of(settings, GOLD_PRICE_1H)
    noted = log.metadata(log.newest())["minutes_version"]
    age(store(settings), settings.lake_root, 5_000)
    assert log.metadata(5_000)["minutes_version"] == noted + 5_000 - before


def test_a_lake_with_more_commits_than_its_age_is_left_alone(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=20)
    newest = [log_of(settings, table).newest() for table in STREAMED]
    with pytest.raises(ValueError, match=r"bronze.ticks has versions 0 to \d+: 12 are too few"):
        age(store(settings), settings.lake_root, 12)
    assert [log_of(settings, table).newest() for table in STREAMED] == newest


def test_a_neglected_lake_has_many_files_and_commits_and_the_same_rows(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=20)
    before = [(rows_of(settings, table), log_of(settings, table).newest()) for table in STREAMED]
    data_files, commits = neglect(store(settings), settings.lake_root, data_files=400, commits=300)
    assert 300 <= data_files <= 450
    assert 200 <= commits <= 300
    for table, (rows, newest) in zip(STREAMED, before, strict=True):
        assert rows_of(settings, table).equals(rows)
        # Some tables are empty, and share in nothing.
        if rows.num_rows:
            assert log_of(settings, table).newest() >= newest + 25
    for table in (BRONZE_TICKS, SILVER_TICKS):
        assert len(log_of(settings, table).files()) >= 50
    folder = Path(GOLD_CURRENT_PRICE.path(settings.lake_root).removeprefix("file:"))
    live = len(log_of(settings, GOLD_CURRENT_PRICE).files())
    assert len(list(folder.glob("*.parquet"))) >= live + 25
    check_that_the_stream_goes_on(settings, batches=20)


def test_the_four_queries_are_answered_and_the_server_gets_them_by_path(tmp_path: Path) -> None:
    settings = written(tmp_path, batches=5)
    asked = queries(datetime.fromtimestamp(BEGAN_NS / 1e9, UTC))
    answers = {name: query(settings.lake_root, sql) for name, sql in asked.items()}
    assert answers["current"].num_rows == 2
    assert answers["minutes"].num_rows == 1
    assert answers["count"].to_pylist()[0] == {"count_star()": 20}
    assert answers["alerts"].num_rows == 0
    for sql in asked.values():
        assert f"FROM delta.`{settings.lake_root}/" in by_path(settings.lake_root, sql)


def row(start: float | None, outcome: str = "exact") -> dict[str, Any]:
    asked = {"reader count": {"cold": 0.3, "p95": 0.2}}
    return {"age": "20,000 commits", "queries": asked, "start": start, "outcome": outcome}


def test_a_start_within_the_bound_and_exact_tables_hold() -> None:
    assert holds([row(14.9), row(15.0)])
    assert not holds([row(14.9), row(15.1)])
    assert not holds([row(None)])
    assert not holds([row(9.0, "1 ticks, not 2")])
    assert render([row(9.04), row(None)]).splitlines()[2].split() == ["start", "s", "9.0", "-"]


def test_ages_ascend(capsys: pytest.CaptureFixture[str]) -> None:
    assert counts("20,100") == [20, 100]
    for wrong in ("100,20", "0", "x", ""):
        with pytest.raises(SystemExit) as ended:
            main(["--commits", wrong])
        assert ended.value.code == 2
        assert "--commits" in capsys.readouterr().err
