"""A soak fails a lake that grows, passes one that does not, and says what a day would leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import cold, curves, growth
from benchmarks.figures import frame_to_gold
from benchmarks.follow import GoldFollower, receipts
from benchmarks.growth import Minute
from benchmarks.load import Market, Shape
from benchmarks.soak import GOLD_COUNT, SILVER_COUNT, default_horizon, environment_of, main, rows_of, soak
from benchmarks.storage import NameNode
from conf.settings import Settings
from lake.delta.files import files_of
from lake.delta.log import TableLog
from lake.tables import GOLD_PRICE_1M, SILVER_TICKS
from tests.conftest import TEST_CONF
from tests.micro_batches import in_kafka, lake_in, write

FLAT = Minute(
    minute=1,
    micro_batches=200,
    micro_batch_seconds=0.2,
    frame_to_gold_p50=0.4,
    frame_to_gold_p99=0.9,
    files=4_000,
    data_files=2_900,
    live_files=400,
    log_files=1_000,
    log_bytes=9_000_000,
    namenode_files=5_000,
    heap_mb=60.0,
    jvm_mb=700.0,
    python_mb=300.0,
    cpu_cores=0.8,
    commits=100,
    written_files=90.0,
    written_log_bytes=500_000.0,
)


def minutes(count: int, **figures: Callable[[int], Any]) -> list[Minute]:
    """Minutes with the flat figures, and a query every fifth minute; figures: by minute."""
    rows = []
    for minute in range(1, count + 1):
        queries = {"silver_seconds": 0.2, "minutes_seconds": 0.1} if minute % 5 == 0 else {}
        planted = {name: figure(minute) for name, figure in figures.items()}
        rows.append(replace(FLAT, minute=minute, **{**queries, **planted}))
    return rows


def failed(rows: list[Minute]) -> list[str]:
    return [verdict.what for verdict in [*growth.growth(rows), *growth.fast_queries(rows)] if verdict.holds is False]


def test_a_lake_that_does_not_grow_passes() -> None:
    rows = minutes(60)
    assert failed(rows) == []
    assert {verdict.holds for verdict in growth.growth(rows)} == {True}


@pytest.mark.parametrize(
    ("figures", "what"),
    [
        ({"files": lambda minute: 2_700 * minute}, "files in HDFS"),
        ({"heap_mb": lambda minute: 50 + 3 * minute}, "NameNode's heap"),
        ({"python_mb": lambda minute: 300 + 20 * minute}, "driver's memory"),
        ({"jvm_mb": lambda minute: 300 + 20 * minute}, "driver's memory"),
        (
            {"silver_seconds": lambda minute: 0.005 * minute if minute % 5 == 0 else None},
            "count(*) of silver.ticks",
        ),
        (
            {"minutes_seconds": lambda minute: 0.005 * minute if minute % 5 == 0 else None},
            "count(*) of a day of gold.price_1m",
        ),
    ],
)
def test_a_figure_that_grows_fails_by_its_name(figures: dict[str, Callable[[int], Any]], what: str) -> None:
    assert failed(minutes(60, **figures)) == [what]


def test_a_figure_may_grow_until_the_middle_and_up_to_the_bound_after_it() -> None:
    assert failed(minutes(60, files=lambda minute: 100 * min(minute, 30))) == []
    assert failed(minutes(60, files=lambda minute: 1_000 if minute <= 30 else 1_290)) == []
    assert failed(minutes(60, files=lambda minute: 1_000 if minute <= 30 else 1_310)) == ["files in HDFS"]


def test_garbage_of_the_namenode_is_no_growth() -> None:
    assert failed(minutes(60, heap_mb=lambda minute: 60 + 40 * (minute % 4) * (minute > 30))) == []


def test_a_slow_query_fails_though_it_does_not_become_slower() -> None:
    rows = minutes(60, silver_seconds=lambda _: 0.51)
    assert failed(rows) == ["count(*) of silver.ticks, cold"]


def test_what_was_not_measured_does_not_pass() -> None:
    rows = minutes(60, silver_seconds=lambda _: None, heap_mb=lambda _: None)
    assert failed(rows) == ["NameNode's heap", "count(*) of silver.ticks", "count(*) of silver.ticks, cold"]


def test_a_run_of_three_minutes_is_too_short_to_tell_growth() -> None:
    assert {verdict.holds for verdict in growth.growth(minutes(3, files=lambda minute: 10**minute))} == {None}


def test_upkeep_may_make_ticks_a_tenth_later_than_another_run_without_it() -> None:
    others = minutes(60)
    late = minutes(60, frame_to_gold_p99=lambda _: 1.0)
    assert [verdict.holds for verdict in growth.as_fresh(minutes(60, frame_to_gold_p50=lambda _: 0.43), others)] == [
        True,
        True,
    ]
    assert [verdict.holds for verdict in growth.as_fresh(late, others)] == [True, False]


def test_a_verdict_says_pass_or_fail_with_both_values() -> None:
    (files, *_) = growth.growth(minutes(60, files=lambda minute: 100 if minute <= 30 else 200))
    assert str(files) == "FAIL  files in HDFS: 200 in minute 60, 100 in minute 30: x 2.00 (bound 1.3)"


def test_a_day_is_rate_times_horizon_and_what_stays() -> None:
    # Live files grow by 2 a minute, 480 at the end; other files (files - data - log) stay 100.
    rows = minutes(
        60,
        live_files=lambda minute: 360 + 2 * minute,
        files=lambda minute: 4_000 + 2 * minute,
        data_files=lambda minute: 2_900 + 2 * minute,
    )
    day = growth.day(rows, run_horizon=10, horizon_minutes=30)
    assert day.data_files == 90 * 30 + 480 + 2 * (1_440 - 60)
    assert day.log_files == 100 * 30
    assert day.other_files == 100
    assert day.files == day.data_files + day.log_files + day.other_files
    # 10 of the run's 9 MB are no commits' but checkpoints'; three times the horizon makes nine times as much.
    assert day.log_bytes == 500_000 * 30 + (9_000_000 - 500_000 * 10) * 9
    assert day.heap_mb == pytest.approx(60 + (day.files - 4_120) * 500 / 1e6)
    assert day.files_if_growth_goes_on == 4_120 + 2 * (1_440 - 60)


def test_processor_time_is_per_million_ticks_of_the_second_half() -> None:
    rows = minutes(10, cpu_cores=lambda minute: 2.0 if minute <= 5 else 0.5)
    assert growth.cpu_seconds_a_million(rows, rate=1_000) == pytest.approx(500)


def test_the_table_has_a_title_for_each_figure() -> None:
    assert len(growth.header()) == len(growth.line(FLAT))
    titles_and_figures = dict(zip(growth.COLUMNS, growth.line(FLAT).split(), strict=True))
    assert titles_and_figures["files"] == "4,000"
    assert titles_and_figures["silver s"] == "-"
    assert titles_and_figures["log MB"] == "9.0"


def test_the_curves_are_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "curves.png"
    curves.draw(minutes(12, heap_mb=lambda minute: None if minute == 3 else 60.0), "a soak", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_another_runs_rows_are_read_from_its_output() -> None:
    rows = minutes(3)
    output = f"a table\n\n{json.dumps({'rows': [asdict(row) for row in rows]})}\n"
    assert rows_of(output) == rows
    for wrong in ("", "a table", '{"figures": []}', '{"rows": [{"minute": 1}]}'):
        with pytest.raises(ValueError, match="no figures of a soak"):
            rows_of(wrong)


class WithUpkeep(Settings):
    history_minutes: float = 45.0
    upkeep: bool = True


class WithoutUpkeep(Settings):
    pass


def test_the_job_gets_only_settings_that_its_checkout_has(capsys: pytest.CaptureFixture[str]) -> None:
    own = argparse.Namespace(history_minutes=10.0, upkeep=False)
    assert environment_of(own, WithUpkeep) == {"TICKHOUSE_HISTORY_MINUTES": "10", "TICKHOUSE_UPKEEP": "false"}
    assert default_horizon(own, WithUpkeep) == 45.0


def test_wrong_arguments_end_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--minutes", "0"], ["--rate", "-1"], ["--against", str(tmp_path / "absent")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert arguments[0] in capsys.readouterr().err


def ticks_of(count: int, began: datetime) -> list[bytes]:
    """Ticks of the load, ten milliseconds apart."""
    market = Market(Shape(3), 100, "producer")
    began_ns = int(began.timestamp() * 1e6) * 1_000
    return [value for number in range(count) for _, value in market.next_records(began_ns + number * 10_000_000)]


def test_delays_are_those_of_the_data_files_without_reading_them(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    values = ticks_of(300, datetime.now(UTC) - timedelta(seconds=5))
    write(None, settings, [in_kafka(values[:200]), in_kafka(values[200:], first=200)])
    files = files_of(settings.lake_root, str(settings.webhdfs_url))
    silver = TableLog(files, SILVER_TICKS.path(settings.lake_root))
    for file in silver.files():
        times = pq.read_table(file.path.removeprefix("file:"), columns=["received_at"])["received_at"].to_pylist()
        assert receipts(file) == pytest.approx(sorted(time.timestamp() for time in times), abs=0.002)
    follower = GoldFollower(files, settings.lake_root)
    commits = follower.read()
    assert [len(commit.received_at) for commit in commits] == [200, 100]
    assert all(0 < delay < 600 for delay in frame_to_gold(commits, 0.0))
    assert follower.read() == []


def test_commits_that_only_move_rows_bring_no_ticks_to_gold(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    write(None, settings, [in_kafka(ticks_of(20, datetime.now(UTC)))])
    files = files_of(settings.lake_root, str(settings.webhdfs_url))
    follower = GoldFollower(files, settings.lake_root)
    assert len(follower.read()) == 1
    for table in (SILVER_TICKS, GOLD_PRICE_1M):
        log = TableLog(files, table.path(settings.lake_root))
        live = log.files()
        assert log.put(log.newest() + 1, {"batch": 7}, live, live, data_change=False)
    assert follower.read() == []


def test_a_cold_query_has_a_time_and_a_lake_without_tables_a_reason(tmp_path: Path) -> None:
    settings = lake_in(tmp_path)
    write(None, settings, [in_kafka(ticks_of(20, datetime.now(UTC)))])
    times = cold.measured(settings.lake_root, SILVER_COUNT, times=3)
    assert len(times) == 3
    assert min(times) > 0
    with pytest.raises(cold.NoAnswer, match=r"gold.price_1m is not in the lake"):
        cold.measured(f"{settings.lake_root}/elsewhere", GOLD_COUNT.format("2026-01-01"))


@pytest.mark.services
def test_a_run_has_its_rows_its_verdicts_and_exact_tables(running: Callable[..., Settings], tmp_path: Path) -> None:
    settings = running("kafka", "hdfs")
    own = argparse.Namespace(
        minutes=4,
        rate=100.0,
        instruments=2,
        history_minutes=1.0,
        upkeep=True,
        prove=True,
        keep=False,
        png=tmp_path / "curves.png",
    )
    shown: list[str] = []
    figures = soak(settings, own, TEST_CONF, period=8.0, show=shown.append)
    verdicts = {verdict["what"]: verdict for verdict in figures["verdicts"]}
    for what in ("the job", "the tables", "the proof"):
        assert verdicts[what]["holds"] is True, verdicts[what]["why"]
    assert verdicts["the tables"]["why"].startswith("3,200 ticks")
    rows = rows_of(json.dumps(figures))
    assert [row.minute for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.files >= row.data_files + row.log_files
        assert row.data_files >= row.live_files
        assert min(row.jvm_mb, row.python_mb, row.cpu_cores, row.namenode_files) > 0
        assert (row.heap_mb or 0) > 0
    assert sum(row.micro_batches for row in rows) > 0
    assert sum(row.commits for row in rows) > 0
    for row in (row for row in rows if row.frame_to_gold_p50):
        assert 0 < (row.frame_to_gold_p50 or 0) <= (row.frame_to_gold_p99 or 0)
    assert any(row.frame_to_gold_p50 for row in rows)
    assert (rows[-1].silver_seconds or 0) > 0
    assert (rows[-1].minutes_seconds or 0) > 0
    assert own.png.read_bytes().startswith(b"\x89PNG")
    assert len([line for line in shown if line.startswith(("PASS", "FAIL", "----"))]) == len(verdicts)
    assert NameNode(settings).files() > 0
