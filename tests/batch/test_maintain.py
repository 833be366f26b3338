"""Maintenance of a neglected lake: fewer files, the same rows, whatever is killed and whoever else writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from batch import maintain as maintain_job
from batch.file_report import surveyed
from batch.maintain import Joined, Joining, here
from conf.settings import PROJECT, Settings
from lake.delta import frames
from lake.delta.beside import Beside
from lake.delta.drop import DROPPED_BEFORE
from lake.delta.files import Files, FileStatus, LocalDisk, files_of
from lake.delta.inventory import Inventory
from lake.delta.log import MAINTENANCE, DataFile, TableLog
from lake.delta.writer import LakeWriter
from lake.reader import read
from lake.tables import (
    BRONZE_TICKS,
    GOLD_PRICE_1M,
    GOLD_PRICE_5S,
    GOLD_ROLLING_PRICE,
    SILVER_TICKS,
    STREAMED,
    Table,
)
from tests.batch.neglected import age, live_files, log_files, maintain, neglected, problems, stored_files
from tests.conftest import TEST_CONF
from tests.lakes import wrong_gaps, wrong_rows
from tests.micro_batches import QUERY, START, opened, write, write_one
from tests.oracle import lake_of
from tests.programs import wait_until

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of few rows, so that a short market has many."""
    monkeypatch.setattr(frames, "ROWS_A_FILE", 15)


def test_a_neglected_lake_has_few_files_and_the_same_rows(tmp_path: Path) -> None:
    """Of settled days, silver's rows are sorted within a file. Deltalake reads it, and the stream goes on."""
    settings, records, parts = neglected(tmp_path, 1, 30)
    write(None, settings, parts[:25])
    planned = maintain(settings, run=None)
    assert {name for name, work in planned.items() if work.joined} >= {"bronze.ticks", "silver.ticks", "gold.price_5s"}
    done = maintain(settings)
    assert problems(done) == []
    assert {name: (work.joined, work.new) for name, work in done.items()} == {
        name: (work.joined, work.new) for name, work in planned.items()
    }
    for table in (BRONZE_TICKS, SILVER_TICKS, GOLD_PRICE_5S):
        assert len(live_files(settings, table)) < 10
    sorted_rows = 0
    for path in live_files(settings, SILVER_TICKS):
        rows = pq.ParquetFile(path.removeprefix("file:")).read(["asset", "event_time"])
        is_sorted = rows.equals(rows.sort_by([("asset", "ascending"), ("event_time", "ascending")]))
        sorted_rows += rows.num_rows if is_sorted else 0
    assert sorted_rows > 0.9 * read(settings.lake_root, SILVER_TICKS).num_rows
    assert all(work.joined == 0 for work in maintain(settings).values()), "nothing is left to join"
    silver = DeltaTable(SILVER_TICKS.path(settings.lake_root))
    assert silver.to_pyarrow_table().num_rows == read(settings.lake_root, SILVER_TICKS).num_rows
    write(None, settings, parts[25:], first=25)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert wrong_gaps(settings.lake_root, lake_of(records)) == []


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    settings, _, parts = neglected(tmp_path, 2, 8, keep_days={"silver.ticks": "1"})
    write(None, settings, parts)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    planned = maintain(settings, run=None, ahead=3 * DAY)
    assert planned["silver.ticks"].rows > 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_maintenance_runs_beside_the_stream(tmp_path: Path) -> None:
    """The same driver goes on while another thread maintains the lake again and again; then a new driver does."""
    settings, records, parts = neglected(tmp_path, 3, 40)
    house = opened(settings)
    for batch, part in enumerate(parts[:10]):
        write_one(house, part, batch)
    ended = threading.Event()
    works: list[dict[str, maintain_job.Work]] = []

    def maintain_always() -> None:
        while not ended.is_set():
            works.append(maintain(settings))

    thread = threading.Thread(target=maintain_always)
    thread.start()
    try:
        for batch, part in enumerate(parts[10:30], 10):
            write_one(house, part, batch)
    finally:
        ended.set()
        thread.join()
    house.finish()
    house.writer.close()
    assert sum(table.joined for work in works for table in work.values()) > 0
    write(None, settings, parts[30:], first=30)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert wrong_gaps(settings.lake_root, lake_of(records)) == []


class Killed(BaseException):
    """A kill -9, as far as Python can show it: nobody handles it."""


@pytest.mark.parametrize(
    ("of", "step", "is_after"),
    [
        (TableLog, "checkpoint", False),
        (TableLog, "checkpoint", True),
        (TableLog, "add", True),
        (Beside, "commit", False),
        (Beside, "commit", True),
        (LocalDisk, "delete", True),
    ],
    ids=["before the checkpoint", "after it", "after a file", "before the commit", "after it", "after a deletion"],
)
def test_a_kill_in_any_step_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: type, step: str, is_after: bool
) -> None:
    """What the killed one wrote and did not commit goes with the orphans, a day later."""
    settings, records, parts = neglected(tmp_path, 4, 16, history_minutes=1)
    write(None, settings, parts[:12])
    real: Callable[..., Any] = getattr(of, step)

    def killed(*arguments: Any, **options: Any) -> Any:
        if is_after:
            real(*arguments, **options)
        raise Killed

    monkeypatch.setattr(of, step, killed)
    # Ten minutes later replaced files have passed the history of one minute.
    with pytest.raises(Killed):
        maintain(settings, ahead=timedelta(minutes=10))
    monkeypatch.undo()
    monkeypatch.setattr(frames, "ROWS_A_FILE", 15)
    write(None, settings, parts[12:], first=12)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert problems(maintain(settings)) == []
    age(settings, 60)
    assert problems(maintain(settings, ahead=2 * DAY)) == []
    for table in STREAMED:
        assert stored_files(settings, table) >= live_files(settings, table)
        known = TableLog(LocalDisk(), table.path(settings.lake_root)).orphans(2**62)
        assert list(known) == [], table.qualified_name
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


class Crash(Exception):
    """Of a driver."""


def test_a_driver_that_died_in_a_micro_batch_goes_on_after_days_of_maintenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silver has the last micro-batch and gold lacks it: its files, its commit and the state must be there still."""
    settings, records, parts = neglected(tmp_path, 5, 12, history_minutes=1)
    house = opened(settings)
    for batch, part in enumerate(parts[:8]):
        write_one(house, part, batch)
    real = LakeWriter.replace

    def crash(*arguments: Any, **options: Any) -> Any:
        raise Crash

    monkeypatch.setattr(LakeWriter, "replace", crash)
    with pytest.raises(Crash):
        write_one(house, parts[8], 8)
    monkeypatch.setattr(LakeWriter, "replace", real)
    last = {file.path for file in house.writer.files_of(SILVER_TICKS, 8)}
    assert last
    house.writer.close()
    for days in (1, 2, 3):
        assert problems(maintain(settings, ahead=days * DAY)) == []
        # As if a day had passed.
        age(settings, 86_400)
    assert last <= live_files(settings, SILVER_TICKS)
    assert len(log_files(settings, BRONZE_TICKS)) < 8
    write(None, settings, parts[8:], first=8)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert wrong_gaps(settings.lake_root, lake_of(records)) == []


def test_cleaning_the_log_spares_the_last_micro_batchs_metadata(tmp_path: Path) -> None:
    settings, _, parts = neglected(tmp_path, 6, 6, history_minutes=1)
    write(None, settings, parts)
    for _ in range(2):
        maintain(settings, ahead=DAY)
        age(settings, 86_400)
    for table in (SILVER_TICKS, GOLD_PRICE_1M):
        log = TableLog(LocalDisk(), table.path(settings.lake_root))
        assert log.last_batch(log.newest())["batch"] == 5
    newest = TableLog(LocalDisk(), BRONZE_TICKS.path(settings.lake_root))
    assert newest.metadata(newest.newest()).keys() >= {"query", "batch", "epoch", MAINTENANCE}


def test_two_at_once_join_each_file_once(tmp_path: Path) -> None:
    """The second one comes while the first has written its files, and before its commit: the first skips its work."""
    settings, records, parts = neglected(tmp_path, 7, 12)
    write(None, settings, parts)
    seconds: list[Any] = []

    def overtaken(tasks: Sequence[Joining]) -> list[Joined]:
        results = here(tasks)
        if not seconds:
            seconds.append(maintain(settings))
        return results

    first = maintain(settings, run=overtaken)
    assert seconds[0]["bronze.ticks"].joined > 0
    assert first["bronze.ticks"].joined == 0
    assert "others have replaced" in first["bronze.ticks"].problems[0]
    assert problems(seconds[0]) == []
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert list(TableLog(LocalDisk(), BRONZE_TICKS.path(settings.lake_root)).orphans(2**62)) == []


@pytest.mark.parametrize("what", ["optimize", "vacuum"])
def test_an_outsiders_work_at_the_same_time_wins(tmp_path: Path, what: str) -> None:
    """Another program's OPTIMIZE or VACUUM between the read of the files and the commit."""
    settings, records, parts = neglected(tmp_path, 8, 12)
    write(None, settings, parts)
    done = set()

    def interrupted(tasks: Sequence[Joining]) -> list[Joined]:
        results = here(tasks)
        if tasks[0].table not in done:
            done.add(tasks[0].table)
            table = DeltaTable(tasks[0].table.path(settings.lake_root))
            if what == "optimize":
                table.optimize.compact()
            else:
                table.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False, full=True)
        return results

    work = maintain(settings, run=interrupted, tables=(BRONZE_TICKS, SILVER_TICKS))
    assert done == {BRONZE_TICKS, SILVER_TICKS}
    said = "others have replaced" if what == "optimize" else "somebody has deleted"
    assert said in " ".join(problems(work))
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
    assert problems(maintain(settings)) == []
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_an_outsiders_restore_brings_the_old_files_back(tmp_path: Path) -> None:
    settings, records, parts = neglected(tmp_path, 16, 12)
    write(None, settings, parts[:10])
    before = {table: DeltaTable(table.path(settings.lake_root)).version() for table in (BRONZE_TICKS, SILVER_TICKS)}
    maintain(settings)
    for table, version in before.items():
        DeltaTable(table.path(settings.lake_root)).restore(version)
    assert len(live_files(settings, BRONZE_TICKS)) >= 10
    assert problems(maintain(settings, ahead=timedelta(hours=1))) == []
    assert len(live_files(settings, BRONZE_TICKS)) < 10
    write(None, settings, parts[10:], first=10)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


@dataclass(frozen=True)
class FullDisk(LocalDisk):
    """A disk without room for data files."""

    def write(self, url: str, content: bytes) -> None:
        if url.endswith(".zstd.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device", url)
        super().write(url, content)


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path) -> None:
    settings, records, parts = neglected(tmp_path, 9, 10)
    write(None, settings, parts)
    before = {table: live_files(settings, table) for table in STREAMED}
    work = maintain(settings, files=FullDisk())
    assert "No space left on device" in work["bronze.ticks"].problems[0]
    assert work["bronze.ticks"].joined == 0
    assert before == {table: live_files(settings, table) for table in STREAMED}
    assert problems(maintain(settings)) == []
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_a_long_log_is_cleaned_in_one_run(tmp_path: Path) -> None:
    """Also one without any checkpoint. What a version within the history needs stays."""
    settings, records, parts = neglected(tmp_path, 10, 24, history_minutes=60)
    write(None, settings, parts[:20])
    age(settings, 7_200)
    write(None, settings, parts[20:], first=20)
    log = TableLog(LocalDisk(), GOLD_PRICE_1M.path(settings.lake_root))
    versions = range(log.newest() - 2, log.newest() + 1)
    rows = {version: DeltaTable(log.path, version=version).to_pyarrow_table().num_rows for version in versions}
    before, stored = log_files(settings, GOLD_PRICE_1M), stored_files(settings, GOLD_PRICE_1M)
    planned = maintain(settings, run=None)["gold.price_1m"]
    done = maintain(settings)["gold.price_1m"]
    assert done.log_files == planned.log_files > 10
    assert len(log_files(settings, GOLD_PRICE_1M)) < len(before) - 10
    assert stored <= stored_files(settings, GOLD_PRICE_1M), "tombstones are younger than an hour, by their own time"
    for version, count in rows.items():
        assert DeltaTable(log.path, version=version).to_pyarrow_table().num_rows == count
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_replaced_files_are_deleted_after_the_history_and_not_before(tmp_path: Path) -> None:
    settings, records, parts = neglected(tmp_path, 11, 10, history_minutes=60)
    write(None, settings, parts)
    stored = stored_files(settings, GOLD_ROLLING_PRICE)
    assert maintain(settings, ahead=timedelta(minutes=55))["gold.rolling_price"].data_files == 0
    assert stored <= stored_files(settings, GOLD_ROLLING_PRICE)
    assert maintain(settings, ahead=timedelta(minutes=65))["gold.rolling_price"].data_files > 5
    live = live_files(settings, GOLD_ROLLING_PRICE)
    assert live <= stored_files(settings, GOLD_ROLLING_PRICE)
    assert len(stored_files(settings, GOLD_ROLLING_PRICE)) < len(stored)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}


def test_old_rows_are_dropped_and_the_table_remembers_it(tmp_path: Path) -> None:
    settings, _, parts = neglected(tmp_path, 12, 10, keep_days={"silver.ticks": "30", "gold.price_1m": "30"})
    write(None, settings, parts)
    rows = read(settings.lake_root, SILVER_TICKS).num_rows
    work = maintain(settings)
    assert problems(work) == []
    log = TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root))
    # The last micro-batch's rows stay: a restarted stream may need them.
    left = read(settings.lake_root, SILVER_TICKS).num_rows
    assert work["silver.ticks"].rows == rows - left > 0
    assert left == sum(file.rows for file in log.batch_files(log.newest()).files)
    properties = log.state().configuration
    assert properties["delta.appendOnly"] == "false"
    assert properties[DROPPED_BEFORE] > START.isoformat()
    assert maintain(settings)["silver.ticks"].rows == 0
    house = opened(settings)
    house.finish()


def test_an_inventory_has_each_live_file_once(tmp_path: Path) -> None:
    """From a checkpoint, from commits, and from both."""
    settings, _, parts = neglected(tmp_path, 17, 8)
    write(None, settings, parts[:5])
    for table in (BRONZE_TICKS, GOLD_PRICE_1M):
        TableLog(LocalDisk(), table.path(settings.lake_root)).checkpoint()
    write(None, settings, parts[5:], first=5)
    for table in STREAMED:
        log = TableLog(LocalDisk(), table.path(settings.lake_root))
        inventory = Inventory(log, table)

        def figures(file: DataFile, table: Table = table) -> tuple[object, ...]:
            column = table.file_time or table.arrival_time
            ends = file.lowest.get(column), file.highest.get(column)
            partition = sorted(file.add["partitionValues"].items())
            return file.path, file.size, file.rows, partition, file.add["modificationTime"], *ends

        files = list(map(figures, inventory.data_files(inventory.files)))
        assert sorted(files, key=str) == sorted(map(figures, log.files()), key=str)
        assert inventory.version == log.newest()
        if table.file_time or table.arrival_time:
            chunks = [file for _, chunk in inventory.chunks() for file in chunk]
            assert sorted(map(figures, chunks), key=str) == sorted(files, key=str)


def test_the_report_counts_all_files(tmp_path: Path) -> None:
    settings, _, parts = neglected(tmp_path, 13, 6)
    write(None, settings, parts)
    for table in (SILVER_TICKS, GOLD_PRICE_1M):
        report = surveyed(LocalDisk(), settings.lake_root, table)
        live = live_files(settings, table)
        assert report.files == len(live) == sum(sum(sizes.values()) for sizes in report.days.values())
        assert report.bytes == sum(Path(path.removeprefix("file:")).stat().st_size for path in live)
        folder = Path(table.path(settings.lake_root).removeprefix("file:"))
        assert report.stored_files == sum(path.is_file() for path in folder.rglob("*"))
        assert set(report.days) <= {"2024-08-09", "2024-08-10"}


def test_the_job_says_what_it_would_do_in_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, _, parts = neglected(tmp_path, 14, 6)
    write(None, settings, parts)
    picture = tmp_path / "files.png"
    arguments = ["--lake-root", settings.lake_root, "--older-than-minutes", "0"]
    assert maintain_job.main([*arguments, "--json", "--picture", str(picture)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["executed"] is False
    (bronze,) = (work for work in said["work"] if work["table"] == "bronze.ticks")
    assert bronze["joined"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        maintain_job.main([*arguments, "--tables", "gold.nothing"])
    with pytest.raises(SystemExit, match="2"):
        maintain_job.main(["--lake-root", f"file:{tmp_path / 'nowhere'}"])
    assert "there is no lake" in capsys.readouterr().err


@pytest.mark.services
def test_a_lake_on_hdfs_is_maintained_and_reported(running: Callable[..., Settings], tmp_path: Path) -> None:
    """The number and bytes of its files as HDFS counts them."""
    _, records, parts = neglected(tmp_path, 18, 8)
    hdfs = running("hdfs")
    root = f"{hdfs.lake_root}/maintained"
    settings = hdfs.model_copy(update={"lake_root": root, "checkpoint": f"{root}/_checkpoints/ticks"})
    files = files_of(root, settings.webhdfs_url)
    files.write(f"{settings.checkpoint_location}/metadata", json.dumps({"id": QUERY}).encode())
    write(None, settings, parts)
    assert problems(maintain(settings, files=files)) == []
    report = surveyed(files, root, BRONZE_TICKS)
    stored = list(_all_files(files, BRONZE_TICKS.path(root)))
    assert (report.stored_files, report.stored_bytes) == (len(stored), sum(status.size for status in stored))
    assert report.files == 2 < len(stored)
    assert wrong_rows(root, lake_of(records)) == {}


def _all_files(files: Files, folder: str) -> Iterator[FileStatus]:
    for status in files.list(folder):
        yield from _all_files(files, f"{folder}/{status.name}") if status.is_folder else [status]


def test_a_killed_job_leaves_a_lake_that_the_next_one_finishes(tmp_path: Path) -> None:
    """kill -9 of the real process, with its Spark, as soon as a joined file is there."""
    settings, records, parts = neglected(tmp_path, 15, 20)
    write(None, settings, parts[:18])
    command = [
        *("./spark-submit.sh", "batch/maintain.py", "--conf", str(TEST_CONF), "--lake-root", settings.lake_root),
        *("--execute", "--older-than-minutes", "0"),
    ]
    log = tmp_path / "job.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output, start_new_session=True)
        wait_until(
            lambda: any(tmp_path.rglob("part-*.zstd.parquet")) or process.poll() is not None, "a file is joined", 300
        )
        assert process.poll() is None, log.read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert wrong_rows(settings.lake_root, lake_of([record for part in parts[:18] for record in part])) == {}
    again = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "files joined to" in again.stdout
    write(None, settings, parts[18:], first=18)
    assert wrong_rows(settings.lake_root, lake_of(records)) == {}
