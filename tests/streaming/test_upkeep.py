"""Upkeep beside the stream: fewer files, the same rows, whatever is killed (promises 1 to 3)."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from conf.settings import Settings
from lake.delta import compact, frames
from lake.delta.drop import DROPPED_BEFORE, UnknownTable
from lake.delta.files import LocalDisk
from lake.delta.log import TableLog
from lake.delta.parquet import ContentsDiffer
from lake.delta.writer import LakeWriter
from lake.gold.sinks import PlainParquet, is_of_the_contract
from lake.reader import read
from lake.tables import (
    BRONZE_TICKS,
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1M,
    GOLD_PRICE_5S,
    GOLD_PRICES,
    GOLD_ROLLING_PRICE,
    SILVER_TICKS,
    STREAMED,
    Table,
)
from streaming import upkeep as upkeep_module
from streaming.lakehouse import Lakehouse
from streaming.status import Subject
from streaming.upkeep import Upkeep
from tests.lake.gold.test_update import delivered
from tests.lakes import wrong_gaps, wrong_rows
from tests.micro_batches import START, in_kafka, lake_in, opened, pieces, write, write_one
from tests.operation.conventions import exposed, problems_of
from tests.oracle import Record, lake_of
from tests.streaming.test_status import leased, page_of

HOUR = 3_600
DAY = 24 * HOUR


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upkeep that takes no rest and joins what is seconds old."""
    monkeypatch.setattr(upkeep_module, "REST", 0.0)
    monkeypatch.setattr(upkeep_module, "CHANGING_FOR", timedelta(seconds=20))
    monkeypatch.setattr(upkeep_module, "APPENDED_FOR", timedelta(0))
    # Files of few rows, so that a short market has many.
    monkeypatch.setattr(frames, "ROWS_A_FILE", 15)


def tended(house: Lakehouse, settings: Settings, ahead: float = 0.0, fan_in: int = 3) -> Upkeep:
    """The house's upkeep, by a clock that is so many seconds ahead."""
    return Upkeep(house, settings, clock=lambda: time.time() + ahead + 1, fan_in=fan_in)


def untended(settings: Settings, parts: Sequence[list[Record]]) -> Lakehouse:
    """Write micro-batches without upkeep, by a driver that goes on."""
    house = opened(settings)
    for batch, part in enumerate(parts):
        write_one(house, part, batch)
    return house


def written(settings: Settings, parts: Sequence[list[Record]], first: int = 0, sink: Any = None) -> Lakehouse:
    """Write micro-batches with a round of upkeep after each, by a driver that starts before and ends after."""
    house = opened(settings, sink=sink)
    upkeep = tended(house, settings)
    for batch, part in enumerate(parts, first):
        write_one(house, part, batch)
        upkeep.round()
    house.finish()
    assert upkeep.figures()["joined_files"] > 0
    return house


def live_files(settings: Settings, table: Table) -> list[str]:
    return [file.path for file in TableLog(LocalDisk(), table.path(settings.lake_root)).files()]


def stored_files(settings: Settings, table: Table) -> set[str]:
    """All data files in the table's folder."""
    folder = Path(table.path(settings.lake_root).removeprefix("file:"))
    return {f"file:{path}" for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts}


@pytest.mark.parametrize("seed", range(6))
def test_tables_are_exact_while_their_files_are_joined(tmp_path: Path, seed: int) -> None:
    """With late ticks, repeats and invalid records, and a restart. Late ticks change rows of joined files."""
    chance = random.Random(seed)
    records = in_kafka(delivered(chance))
    settings = lake_in(tmp_path)
    parts = pieces(records, chance, 30)
    written(settings, parts[:15])
    written(settings, parts[15:], first=15)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert wrong_gaps(settings.lake_root, lake_of(records)) == []
    for table in (BRONZE_TICKS, SILVER_TICKS):
        # Not the last one's, and two days.
        assert len(live_files(settings, table)) < 15


def logged(settings: Settings, table: Table) -> tuple[int, int, int]:
    """A table's newest version, live files, and commits since the log's last checkpoint, as its log says."""
    log = TableLog(LocalDisk(), table.path(settings.lake_root))
    pointer = Path(log.path.removeprefix("file:")) / "_delta_log" / "_last_checkpoint"
    last = json.loads(pointer.read_text())["version"] if pointer.exists() else -1
    return log.newest(), len(log.files()), log.newest() - last


def test_figures_of_tables_follow_the_stream_upkeep_and_outsiders(tmp_path: Path) -> None:
    """Whether files were counted before or after the first commits, and without another look at the logs."""
    records = in_kafka(delivered(random.Random(9)))
    settings = lake_in(tmp_path, keep_days={"silver.ticks": "1"})
    parts = pieces(records, random.Random(9), 24)
    written(settings, parts[:8])
    house = opened(settings)
    upkeep = tended(house, settings)

    def known() -> dict[str, tuple[int, int | None, int | None]]:
        # Checkpoints are written in the background.
        house.writer._background.submit(int).result()
        figures = {table: house.writer.figures(table) for table in STREAMED}
        return {table.qualified_name: (each.version, each.files, each.log_files) for table, each in figures.items()}

    def expected() -> dict[str, tuple[int, int, int]]:
        return {table.qualified_name: logged(settings, table) for table in STREAMED}

    for table in STREAMED[::2]:
        house.writer.count(table)
    for batch, part in enumerate(parts[8:16], 8):
        write_one(house, part, batch)
    upkeep.round()
    for table in STREAMED[1::2]:
        house.writer.count(table)
    assert known() == expected()
    for batch, part in enumerate(parts[16:], 16):
        write_one(house, part, batch)
        upkeep.round()
    assert known() == expected()
    DeltaTable(GOLD_ALERTS.path(settings.lake_root)).optimize.compact()
    DeltaTable(SILVER_TICKS.path(settings.lake_root)).optimize.compact()
    for table in (GOLD_ALERTS, SILVER_TICKS):
        house.writer.catch_up(table)
    assert known() == expected()
    before = house.writer.figures(SILVER_TICKS).files
    tended(house, settings, ahead=START.timestamp() + 30 * DAY - time.time())._sweep()
    assert known() == expected()
    assert (before or 0) > (house.writer.figures(SILVER_TICKS).files or 0)
    house.finish()
    assert known() == expected()


def test_metrics_have_all_figures_of_upkeep(tmp_path: Path) -> None:
    records = in_kafka(delivered(random.Random(4)))
    settings = lake_in(tmp_path, kafka_bootstrap_servers="127.0.0.1:1", state_dir=tmp_path)
    house = written(settings, pieces(records, random.Random(4), 12))
    house.upkeep = tended(house, settings)
    for _ in range(2):
        house.upkeep.round()
    house.upkeep.debt = 3
    with leased(settings, house) as lease:
        page, status = page_of(Subject(settings, house, lease, None), tmp_path)
    done = house.upkeep.figures()
    names = {name: f"tickhouse_upkeep_{name}" + ("" if name == "debt_files" else "_total") for name in done}
    metrics = exposed(page)
    assert problems_of(page) == []
    assert {name: metrics[metric] for name, metric in names.items()} == dict(done) == status["upkeep"]
    assert (done["rounds"], done["debt_files"]) == (2, 3)


class Killed(BaseException):
    """A kill -9, as far as Python can show it: nobody handles it."""


@pytest.mark.parametrize("step", ["before the file", "before the commit", "after the commit"])
@pytest.mark.parametrize(
    "table",
    [BRONZE_TICKS, SILVER_TICKS, GOLD_PRICE_5S, GOLD_ROLLING_PRICE],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_kill_in_the_middle_of_joining_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Table, step: str
) -> None:
    chance = random.Random(3)
    records = in_kafka(delivered(chance))
    settings = lake_in(tmp_path)
    parts = pieces(records, chance, 24)
    house = untended(settings, parts[:16])
    point, is_after = {
        "before the file": ("write_file", False),
        "before the commit": ("write_file", True),
        "after the commit": ("reorganize", True),
    }[step]
    real: Callable[..., Any] = getattr(LakeWriter, point)

    def killed(writer: LakeWriter, of: Table, *arguments: Any) -> Any:
        result = None if of == table and not is_after else real(writer, of, *arguments)
        if of == table:
            raise Killed
        return result

    monkeypatch.setattr(LakeWriter, point, killed)
    with pytest.raises(Killed):
        tended(house, settings).round()
    monkeypatch.setattr(LakeWriter, point, real)
    written(settings, parts[16:], first=16)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    # What the killed one wrote and did not commit goes once it is old, and no other file of the tables.
    house = opened(settings)
    house.last = house._last_written() or house.last
    before = {file for t in STREAMED for file in live_files(settings, t)}
    upkeep = tended(house, settings, ahead=2 * DAY)
    upkeep._sweep()
    assert upkeep.figures()["orphans"] == (1 if step == "before the commit" else 0)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert before


def test_replaced_files_are_readable_for_the_history_and_gone_after_it(tmp_path: Path) -> None:
    records = in_kafka(delivered(random.Random(4)))
    settings = lake_in(tmp_path, history_minutes=90)
    house = written(settings, pieces(records, random.Random(4), 20))
    house.writer.close()
    now = int(time.time() * 1_000)
    for table in (SILVER_TICKS, GOLD_CURRENT_PRICE, GOLD_PRICE_1M):
        log = TableLog(LocalDisk(), table.path(settings.lake_root))
        order = [(name, "ascending") for name in table.key]
        files, rows = stored_files(settings, table), read(settings.lake_root, table).sort_by(order)
        versions = [DeltaTable(log.path, version=v).to_pyarrow_table().num_rows for v in range(log.newest() + 1)]
        cleaned = log.checkpoint(now=now + 89 * 60_000, delete_data=True)
        assert cleaned.data_files == 0
        assert stored_files(settings, table) == files
        assert versions == [
            DeltaTable(log.path, version=v).to_pyarrow_table().num_rows for v in range(log.newest() + 1)
        ]
        # The next checkpoint is of a later version.
        house = opened(settings)
        house.writer.define(table, {"more": "1"})
        cleaned = log.checkpoint(now=now + 92 * 60_000, delete_data=True)
        assert cleaned.data_files == len(files) - len(live_files(settings, table)) > 0
        assert stored_files(settings, table) == set(live_files(settings, table))
        assert read(settings.lake_root, table).sort_by(order).equals(rows)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_deletions_are_limited_and_go_on_at_the_next_checkpoint(tmp_path: Path) -> None:
    records = in_kafka(delivered(random.Random(4)))
    settings = lake_in(tmp_path, history_minutes=1)
    write(None, settings, pieces(records, random.Random(4), 20))
    log = TableLog(LocalDisk(), GOLD_CURRENT_PRICE.path(settings.lake_root))
    later = int(time.time() * 1_000) + 3_600_000
    stale = len(stored_files(settings, GOLD_CURRENT_PRICE)) - 1
    assert stale > 8
    cleaned = log.checkpoint(now=later, deletions=5, delete_data=True)
    assert cleaned.data_files == 5
    assert cleaned.left >= stale - 5
    assert len(stored_files(settings, GOLD_CURRENT_PRICE)) == 1 + stale - 5
    opened(settings)
    cleaned = log.checkpoint(now=later, delete_data=True)
    assert cleaned.data_files == stale - 5
    assert stored_files(settings, GOLD_CURRENT_PRICE) == set(live_files(settings, GOLD_CURRENT_PRICE))


def test_an_outsiders_optimize_at_the_same_time_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It commits after the file was joined and before its commit: the joined file is thrown away."""
    chance = random.Random(7)
    records = in_kafka(delivered(chance))
    settings = lake_in(tmp_path)
    parts = pieces(records, chance, 24)
    house = untended(settings, parts[:12])
    real, tables = LakeWriter.write_file, {BRONZE_TICKS, GOLD_PRICE_5S}

    def write_file(writer: LakeWriter, table: Table, file: Any) -> Any:
        if table in tables:
            tables.discard(table)
            DeltaTable(table.path(settings.lake_root)).optimize.compact()
        return real(writer, table, file)

    monkeypatch.setattr(LakeWriter, "write_file", write_file)
    upkeep = tended(house, settings)
    upkeep.round()
    assert not tables
    for batch, part in enumerate(parts[12:], 12):
        write_one(house, part, batch)
        upkeep.round()
    house.finish()
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_plain_parquet_has_golds_rows_after_files_were_joined(tmp_path: Path) -> None:
    records = in_kafka(delivered(random.Random(5)))
    settings = lake_in(tmp_path)
    folder = f"file:{tmp_path / 'plain'}"
    sink = PlainParquet(LocalDisk(), folder)
    parts = pieces(records, random.Random(5), 20)
    written(settings, parts[:10], sink=sink)
    written(settings, parts[10:], first=10, sink=sink)
    for table in (*GOLD_PRICES, GOLD_ROLLING_PRICE, GOLD_ALERTS):
        names = [column.name for column in table.columns if is_of_the_contract(column)]
        order = [(name, "ascending") for name in table.key]
        plain = pq.read_table(tmp_path / "plain" / table.name, partitioning=None).sort_by(order)
        assert (
            plain.select(names).to_pylist() == read(settings.lake_root, table).sort_by(order).select(names).to_pylist()
        )


def test_old_rows_are_dropped_where_the_settings_say_so(tmp_path: Path) -> None:
    """Whole files of rows older than keep_days; other tables stay as they are."""
    records = in_kafka(delivered(random.Random(6)))
    days = {"silver.ticks": "1", "gold.price_1m": "2"}
    settings = lake_in(tmp_path, keep_days=days)
    house = written(settings, pieces(records, random.Random(6), 12))
    counts = {table: read(settings.lake_root, table).num_rows for table in STREAMED}
    upkeep = tended(house, settings, ahead=START.timestamp() + 1.5 * DAY - time.time())
    upkeep._define()
    upkeep._sweep()
    # The recorded minutes begin ten minutes before midnight.
    left = {table: read(settings.lake_root, table).num_rows for table in STREAMED}
    expected = lake_of(records)
    assert left[SILVER_TICKS] < counts[SILVER_TICKS]
    cut = START + timedelta(days=0.5)
    assert left[SILVER_TICKS] >= sum(row.event_time >= cut for row in expected.silver.values())
    assert {table: left[table] for table in STREAMED if table != SILVER_TICKS} == {
        table: counts[table] for table in STREAMED if table != SILVER_TICKS
    }
    properties = TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).state().configuration
    assert datetime.fromisoformat(properties[DROPPED_BEFORE]) > cut
    upkeep = tended(house, settings, ahead=START.timestamp() + 30 * DAY - time.time())
    upkeep._sweep()
    assert TableLog(LocalDisk(), GOLD_PRICE_1M.path(settings.lake_root)).property(DROPPED_BEFORE)
    assert not TableLog(LocalDisk(), GOLD_PRICE_5S.path(settings.lake_root)).property(DROPPED_BEFORE)
    assert read(settings.lake_root, SILVER_TICKS).num_rows == read(settings.lake_root, GOLD_PRICE_1M).num_rows == 0
    assert read(settings.lake_root, GOLD_PRICE_5S).num_rows == counts[GOLD_PRICE_5S]


@pytest.mark.parametrize("name", ["gold.current_price", "quality.results", "gold.none"])
def test_keep_days_of_a_table_from_which_the_stream_drops_nothing_is_refused(tmp_path: Path, name: str) -> None:
    settings = lake_in(tmp_path, keep_days={name: "3"})
    with pytest.raises(UnknownTable, match=re.escape(name)):
        Upkeep(opened(settings), settings)


def test_a_lake_with_too_many_files_slows_the_stream(tmp_path: Path) -> None:
    """Until upkeep has caught up. A job that is to end does not wait."""
    settings = lake_in(tmp_path, debt_files=10)
    upkeep = tended(opened(settings), settings)
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    stop = Stop()
    for debt in (0, 10, 11, 40, 1_000_000, 0):
        upkeep.debt = debt
        upkeep.pause(stop)
    assert waits == [1.1, 4.0, upkeep_module.LONGEST_PAUSE]


def test_a_join_that_would_lose_a_row_fails_before_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = in_kafka(delivered(random.Random(8)))
    settings = lake_in(tmp_path)
    write(None, settings, pieces(records, random.Random(8), 12))
    log = TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root))
    [group, *_] = compact.due(SILVER_TICKS, log.files(), lambda _: True, fan_in=2)
    real = pq.ParquetWriter.write_table

    def losing(writer: pq.ParquetWriter, rows: Any, **options: Any) -> None:
        real(writer, rows.slice(1), **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", losing)
    with pytest.raises(ContentsDiffer, match=r"silver\.ticks: a joined file has"):
        compact.join(LocalDisk(), SILVER_TICKS, group)
    monkeypatch.undo()
    wrong = [type(file)({**file.add, "stats": '{"numRecords": 1}'}, file.path) for file in group]
    with pytest.raises(ContentsDiffer, match="rows, not"):
        compact.join(LocalDisk(), SILVER_TICKS, wrong)


def test_a_trickle_of_ticks_keeps_the_commits_that_a_start_needs(tmp_path: Path) -> None:
    """Each micro-batch comes hours after the last: the log is cleaned, but not of the state since its last snapshot."""
    records = in_kafka(delivered(random.Random(9)))
    settings = lake_in(tmp_path, history_minutes=1)
    parts = pieces(records, random.Random(9), 8)
    house = opened(settings)
    log = TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root))
    for batch, part in enumerate(parts[:6]):
        write_one(house, part, batch)
        house.writer.tidy(SILVER_TICKS, 0.0)
        house.writer._background.submit(lambda: None).result()
        for path in Path(log.path.removeprefix("file:")).rglob("*"):
            os.utime(path, (time.time() - 7_200 * (6 - batch),) * 2)
    # kill -9: the driver does not say goodbye.
    write(None, settings, parts[6:], first=6)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
