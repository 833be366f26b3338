"""The whole way on real services: recorded frames, through simulator, ingestion, Kafka and streaming, to SQL.

Each table is compared with the oracle, every column exact, in two lakes: one written by a driver on this machine, one
written on YARN in cluster mode. While the first was written the driver was killed with -9 in the middle of a
micro-batch, then the broker, the DataNode and the NameNode; while the second was, the executor. What else reads a lake
(SQL, the quality check, the notebook) is tried on the first.
"""

from __future__ import annotations

import getpass
import gzip
import itertools
import json
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import hdfs
import nbclient
import nbformat
import psutil
import pytest
from kafka import KafkaProducer
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.settings import PROJECT, Settings
from lake.delta.files import files_of
from lake.delta.writer import create_table
from lake.reader import NoSuchTable, query
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    GOLD_PRICE_1M,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    TABLES,
    Table,
)
from services.control import daemons, up
from services.registration import sql_connection
from simulator.market import trades
from tests.conftest import TEST_CONF
from tests.killing import DAEMONS, kill_daemon, kill_executors
from tests.lakes import rows_of
from tests.listening import beyond_loopback, family, listeners
from tests.oracle import Lake, Record, RecordedTrade, Row, differences, lake_of, missing_ids, tick_of, traded, trades_in
from tests.programs import RECORDINGS, ingestion, kafka_records, simulator

pytestmark = pytest.mark.services

TICKS, REJECTS, GAPS = "end-to-end.ticks", "end-to-end.rejects", "end-to-end.gaps"
RECORDED = ("binance-btcusdt-20240809.gz", "binance-ethusdt-20240809.gz")
RECORDED_TRADES, SIMULATED = 18_556, 18_000
# Where gold takes one of the two symbols that the test sends for an asset.
GOLD_SYMBOLS = {"desk:silver": "XAG"}
# Seconds after which something that should happen is taken not to; a job has longer on a machine that is busy.
PATIENCE, JOB_PATIENCE = 300.0, 900.0
COMPARED = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, *GOLD)
Running = Callable[..., Settings]


@dataclass
class Job:
    """A job that ended: how, what it printed, and who listened where while it ran."""

    exit_code: int
    output: str
    listening: dict[tuple[str, int], str] = field(default_factory=dict)


def run_job(
    suite: Settings,
    *command: str,
    log: Path,
    meanwhile: Callable[[psutil.Process], None] | None = None,
) -> Job:
    """Run ./spark-submit.sh with these arguments to its end, and note who listens; call `meanwhile` until then."""
    job = Job(0, "")
    with log.open("wb") as output:
        submitted = psutil.Popen(["./spark-submit.sh", *command], cwd=PROJECT, stdout=output, stderr=output)
        deadline = time.monotonic() + JOB_PATIENCE
        seen = 0.0
        while submitted.poll() is None:
            assert time.monotonic() < deadline, f"{command} still runs:\n{log.read_text()[-5000:]}"
            if meanwhile:
                meanwhile(submitted)
            if time.monotonic() - seen > 1:
                services = [process for daemon in daemons(suite) if (process := daemon.process())]
                job.listening |= listeners(family([submitted, *services]))
                seen = time.monotonic()
            time.sleep(0.05)
    job.exit_code, job.output = submitted.wait(), log.read_text(errors="replace")
    return job


def streaming(root: str, *, on: str = "local") -> list[str]:
    """The main job over the test's topics, to its end, in micro-batches small enough that there are several."""
    return [
        *("--on", on, "streaming/ticks.py", "--conf", str(TEST_CONF), "--lake-root", root),
        *("--once", "--max-offsets-per-trigger", "1500"),
        *("--ticks-topic", TICKS, "--rejects-topic", REJECTS, "--gaps-topic", GAPS),
        *("--gold-symbols", ",".join(f"{pair}={symbol}" for pair, symbol in GOLD_SYMBOLS.items())),
    ]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The real recordings of two symbols; where there are none, one in their form of the simulator's own market."""
    real = [RECORDINGS / name for name in RECORDED]
    if all(file.exists() for file in real):
        return real
    opened_ms = 1_723_161_590_000
    file = tmp_path_factory.mktemp("recordings") / "simulated.gz"
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        for trade in itertools.islice(trades(["bitcoin", "ethereum"], rate=60.0, seed=7), SIMULATED):
            symbol, at = {"bitcoin": "BTCUSDT", "ethereum": "ETHUSDT"}[trade.asset], opened_ms + trade.at_ms
            data = {"e": "trade", "E": at, "s": symbol, "t": trade.trade_id, "p": trade.price, "q": trade.quantity}
            frame = {"stream": f"{symbol.lower()}@trade", "data": {**data, "T": at, "m": trade.buyer_is_maker}}
            lines.write(f"{at * 1_000_000} {json.dumps(frame)}\n")
    return [file]


@pytest.fixture(scope="module")
def recorded(recordings: list[Path]) -> list[RecordedTrade]:
    return [trade for file in recordings for trade in trades_in(file)]


@pytest.fixture(scope="module")
def ingested(running: Running, recordings: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What Kafka holds after ingestion has listened to a venue that replays the recordings."""
    suite = running("kafka", "hdfs")
    folder = tmp_path_factory.mktemp("ingestion")
    own = suite.model_copy(update={"ticks_topic": TICKS, "rejects_topic": REJECTS, "gaps_topic": GAPS})
    with (
        simulator(folder, "--speed", "0", "--replay", *map(str, recordings)) as (venue, url),
        ingestion(folder, own, url, "--assets", "bitcoin,ethereum") as ingester,
    ):
        assert venue.process.wait(PATIENCE) == 0
        assert ingester.stop() == 0, ingester.log.read_text()
        counts = ingester.line()
    assert (counts["rejected"], counts["undelivered"]) == (0, 0)
    records = consume(suite)
    assert counts["published"] == len(records)
    return records


def consume(suite: Settings) -> list[Record]:
    """Everything on the test's topics, in order of delivery within each partition."""
    return [
        Record(
            record.topic,
            record.partition,
            record.offset,
            record.key,
            record.value,
            datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=record.timestamp),
        )
        for topic in (TICKS, REJECTS, GAPS)
        for record in kafka_records(suite, topic)
    ]


GOOD: dict[str, object] = {
    "timestamp": "2024-08-09T00:10:00.000001Z",
    "asset": "gold",
    "price_usd": "2426.5",
    "quote": "USD",
    "source": "desk",
    "symbol": "XAU",
    "event_time": "2024-08-09T00:09:59.5Z",
    "quantity": "0.25",
    "trade_id": None,
    "trade_epoch": 0,
    "producer": None,
    "sequence": None,
}
ODD_BUT_VALID: list[dict[str, object]] = [
    # Known by producer and sequence; by its place in Kafka; by a venue's number in its second count.
    *({**GOOD, "producer": "desk-1", "sequence": number, "price_usd": f"24{number}.5"} for number in (1, 2, 3, 2, 5)),
    {key: GOOD[key] for key in ("timestamp", "asset", "price_usd")},
    {key: GOOD[key] for key in ("timestamp", "asset", "price_usd")},
    *({**GOOD, "trade_id": 7, "trade_epoch": epoch, "price_usd": f"{epoch + 1}"} for epoch in (1, 0)),
    # Numbers as JSON numbers, to the last digit; unknown fields; another zone.
    {**GOOD, "price_usd": 2426},
    {**GOOD, "price_usd": 2426.25, "mood": {"of": ["the", "market"]}},
    {**GOOD, "timestamp": "2024-08-09T02:10:00+02:00", "event_time": None, "quantity": None},
    {**GOOD, "quantity": "0"},
    # A venue's clock an hour ahead; one just inside what is believed.
    {**GOOD, "event_time": "2024-08-09T01:10:00Z"},
    {**GOOD, "event_time": "2024-08-09T00:10:05.000001Z"},
    # The smallest and the largest price, alone and in one minute.
    *({**GOOD, "asset": "tiny", "price_usd": "0.000000000001", "quantity": size} for size in ("0.000000000001", "1")),
    {**GOOD, "asset": "tiny", "price_usd": "0.000000000002", "quantity": "3.5"},
    {**GOOD, "asset": "huge", "price_usd": "9999999999999999.999999999999", "quantity": "0.5"},
    {**GOOD, "asset": "huge", "price_usd": "9999999999999999.999999999998", "quantity": "1.000000000001"},
    {**GOOD, "asset": "wide", "price_usd": "0.000000000001", "quantity": "3"},
    {**GOOD, "asset": "wide", "price_usd": "9999999999999999.999999999999", "quantity": "7"},
    {**GOOD, "asset": "wide", "price_usd": "1.5000000000000000", "quantity": "0.1"},
    # Only XAG feeds gold.
    *({**GOOD, "asset": "silver", "symbol": symbol} for symbol in ("XAG", "SI")),
]
BAD: list[bytes | None] = [
    *(None, b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"not JSON"),
    json.dumps(GOOD).encode() + b" and more",
    b"[" + json.dumps(GOOD).encode() + b"]",
    *(
        json.dumps({**GOOD, **change}).encode()
        for change in (
            {"price_usd": True},
            {"price_usd": {"value": "1"}},
            {"trade_id": "12"},
            {"trade_id": 1.5},
            {"trade_epoch": "0"},
            {"sequence": 2**63},
            {"asset": 5},
            {"event_time": 1723161600},
            {"quantity": 1},
            {"price_usd": None},
            {"timestamp": None},
            {"asset": None},
            {"asset": "bit coin"},
            {"symbol": ""},
            {"source": "x" * 65},
            {"producer": "ä"},
            {"timestamp": "2024-08-09T00:10:00"},
            {"timestamp": "2024-13-09T00:10:00Z"},
            {"timestamp": "yesterday"},
            {"event_time": "noon"},
            {"event_time": "2024-08-09T25:00:00Z"},
            {"price_usd": "0"},
            {"price_usd": "-1"},
            {"price_usd": "NaN"},
            {"price_usd": "Infinity"},
            {"price_usd": "1,5"},
            {"price_usd": ""},
            {"price_usd": "1.0000000000001"},
            {"quantity": "0.0000000000001"},
            {"price_usd": "1" + 30 * "0"},
            {"price_usd": 10**30},
            {"quantity": "1" + 16 * "0"},
            {"price_usd": "1" + 15 * "0", "quantity": "100000"},
            {"quantity": "-1"},
            {"quantity": "many"},
        )
    ),
]


def troubles(ingested: Sequence[Record]) -> Iterator[tuple[str, bytes, bytes | None]]:
    """(topic, key, value) of everything that a feed's good hour does not have."""
    chance = random.Random(3)
    for record in chance.sample(ingested, len(ingested) // 10):
        assert record.key is not None
        yield TICKS, record.key, record.value
    btc = next(json.loads(record.value or b"") for record in ingested if record.key == b"binance:BTCUSDT")
    for number in range(200):
        # Half of them an hour late, in minutes of their own; half inside minutes that are long in gold.
        event_time = datetime.fromisoformat(btc["event_time"]) + timedelta(
            hours=number % 2 - 1, milliseconds=chance.randrange(299_000)
        )
        late = {
            **btc,
            # Numbers from before the recording: between them and it is a gap.
            "trade_id": btc["trade_id"] - 300 + number,
            "price_usd": str(50_000 + number * 100),
            "event_time": event_time.isoformat(timespec="microseconds"),
            "sequence": 10**6 + number,
        }
        yield TICKS, b"binance:BTCUSDT", json.dumps(late).encode()
    for tick in ODD_BUT_VALID:
        yield TICKS, b"desk:any", json.dumps(tick).encode()
    yield TICKS, b"desk:any", json.dumps(GOOD).replace('"2426.5"', "61685.990000000001").encode()
    yield TICKS, b"desk:any", json.dumps(GOOD).replace('"2426.5"', "2.5e-7").encode()
    for number, value in enumerate(BAD):
        yield TICKS, str(number).encode(), value
    for raw in ("{", '{"stream":"btcusdt@trade","data":{"p":"NaN"}}'):
        yield REJECTS, b"binance", json.dumps({"source": "binance", "reason": "no price", "raw": raw}).encode()


@pytest.fixture(scope="module")
def expected(suite: Settings, ingested: list[Record]) -> Lake:
    """What the tables must hold once ingestion's records and all the troubles are in Kafka."""
    with closing(KafkaProducer(bootstrap_servers=suite.kafka_bootstrap_servers, acks="all")) as producer:
        for sent in [producer.send(topic, value, key) for topic, key, value in troubles(ingested)]:
            sent.get(timeout=30)
    return lake_of(consume(suite), ticks_topic=TICKS, gaps_topic=GAPS, gold_symbols=GOLD_SYMBOLS)


def commits(files: hdfs.Client, root: str, table: Table) -> int:
    """How many a table of the lake at root has, its creation among them; 0 if there is none yet."""
    log = f"{table.path(urlsplit(root).path)}/_delta_log"
    there = files.list(log) if files.status(log, strict=False) else []
    return sum(name.endswith(".json") for name in there)


class Torn:
    """Kills a driver with -9 when one of silver and gold has a micro-batch that the other has not.

    The driver is stopped before each look, so that what is seen is what is left behind.
    """

    def __init__(self, suite: Settings, root: str) -> None:
        self.files = hdfs.InsecureClient(suite.webhdfs_url, user=getpass.getuser())
        self.root = root
        self.killed = False

    def commits(self) -> tuple[int, int]:
        return commits(self.files, self.root, SILVER_TICKS), commits(self.files, self.root, GOLD_PRICE_1M)

    def torn(self) -> bool:
        """Between the third and the last micro-batch; each table has one commit of its creation."""
        silver, gold = self.commits()
        return min(silver, gold) > 3 and silver != gold

    def __call__(self, submitted: psutil.Process) -> None:
        if self.killed or not self.torn():
            return
        drivers = family([submitted])
        for process in drivers:
            process.suspend()
        # What the NameNode was already told takes effect.
        time.sleep(0.2)
        self.killed = self.torn()
        for process in drivers:
            process.kill() if self.killed else process.resume()


class Faults:
    """Kills these with -9 while a job writes a lake, one after the other, each after a new commit of gold's.

    A daemon is started again after some seconds; another executor is YARN's business.
    """

    def __init__(self, suite: Settings, root: str, *names: str) -> None:
        self.suite, self.root, self.left = suite, root, list(names)
        self.files = hdfs.InsecureClient(suite.webhdfs_url, user=getpass.getuser())
        self.seen = 2

    def __call__(self, submitted: psutil.Process) -> None:
        if not self.left:
            return
        found = commits(self.files, self.root, GOLD_PRICE_1M)
        if found <= self.seen:
            return
        if self.left[0] == "executor":
            if not kill_executors(self.suite):
                return
        else:
            kill_daemon(self.suite, self.left[0])
            time.sleep(5)
            up(self.suite, [DAEMONS[self.left[0]]])
        del self.left[0]
        self.seen = found


@dataclass
class Written:
    """A lake, and what was seen while it was written."""

    root: str
    jobs: list[Job]


@pytest.fixture(scope="module")
def local_lake(suite: Settings, expected: Lake, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Written by a driver on this machine, killed in the middle of a micro-batch, and while services were killed."""
    root, logs = f"{suite.lake_root}/end-to-end", tmp_path_factory.mktemp("local")
    torn = Torn(suite, root)
    killed = run_job(suite, *streaming(root), log=logs / "killed", meanwhile=torn)
    assert torn.killed, f"ended before it could be killed, exit code {killed.exit_code}:\n{killed.output[-5000:]}"
    silver, gold = torn.commits()
    assert silver != gold
    faults, jobs = Faults(suite, root, *DAEMONS), [killed]
    while jobs[-1].exit_code != 0 and len(jobs) < 6:
        jobs.append(run_job(suite, *streaming(root), log=logs / f"again-{len(jobs)}", meanwhile=faults))
    assert jobs[-1].exit_code == 0, jobs[-1].output[-5000:]
    assert faults.left == [], "they were to be killed before the job ended"
    return Written(root, jobs)


@pytest.fixture(scope="module")
def yarn_lake(running: Running, expected: Lake, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Written on YARN in cluster mode, where a node has nothing of ours but what was shipped, and an executor dies."""
    suite = running("kafka", "hdfs", "yarn")
    root = f"{suite.lake_root}/end-to-end-on-yarn"
    log = tmp_path_factory.mktemp("yarn") / "log"
    faults = Faults(suite, root, "executor")
    job = run_job(suite, *streaming(root, on="yarn-cluster"), log=log, meanwhile=faults)
    assert job.exit_code == 0, job.output[-5000:]
    assert faults.left == [], "it was to be killed before the job ended"
    return Written(root, [job])


def test_kafka_has_every_recorded_trade_once_in_order(ingested: list[Record], recorded: list[RecordedTrade]) -> None:
    """Promise 1, as far as Kafka: each trade of the recordings, with its digits and its time, and none else."""
    assert len(recorded) in (RECORDED_TRADES, SIMULATED)
    ticks = [tick_of(record, timedelta(seconds=5)) for record in sorted(ingested, key=lambda record: record.place)]
    for symbol in ("BTCUSDT", "ETHUSDT"):
        found = [traded(tick) for tick in ticks if tick.symbol == symbol]
        assert found == [trade for trade in recorded if trade.symbol == symbol]
    assert sorted(tick.sequence or 0 for tick in ticks) == list(range(1, len(recorded) + 1))
    assert len({tick.producer for tick in ticks}) == 1


@pytest.mark.parametrize("table", COMPARED, ids=lambda table: table.qualified_name)
@pytest.mark.parametrize("lake", ["local_lake", "yarn_lake"])
def test_a_table_holds_what_the_oracle_says(
    request: pytest.FixtureRequest, expected: Lake, lake: str, table: Table
) -> None:
    """Promises 1, 2 and 5: repeats, late ticks, bad records and a kill -9 included."""
    written: Written = request.getfixturevalue(lake)
    tables: dict[str, Mapping[Hashable, Row]] = {
        "bronze.ticks": expected.bronze,
        "silver.ticks": expected.silver,
        "silver.quarantine": expected.quarantine,
        "gold.price_5s": expected.price_5s,
        "gold.price_1m": expected.price_1m,
        "gold.price_5m": expected.price_5m,
        "gold.price_1h": expected.price_1h,
        "gold.price_1d": expected.price_1d,
        "gold.rolling_price": expected.rolling_price,
        "gold.current_price": expected.current_price,
        "gold.alerts": expected.alerts,
    }
    assert differences(tables[table.qualified_name], rows_of(written.root, table)) == []


def test_silver_has_every_recorded_trade(local_lake: Written, recorded: list[RecordedTrade]) -> None:
    columns = ", ".join(RecordedTrade.__dataclass_fields__)
    first, last = min(trade.trade_id for trade in recorded), max(trade.trade_id for trade in recorded)
    rows = query(
        local_lake.root,
        f"SELECT {columns} FROM silver.ticks WHERE trade_id BETWEEN {first} AND {last} AND sequence <= {len(recorded)}",
    )
    assert {RecordedTrade(**row) for row in rows.to_pylist()} == set(recorded)
    assert len(rows) == len(recorded)


@pytest.mark.parametrize("lake", ["local_lake", "yarn_lake"])
def test_every_missing_trade_is_named_once(request: pytest.FixtureRequest, expected: Lake, lake: str) -> None:
    """Promise 4, as far as silver: the numbers between those that came."""
    written: Written = request.getfixturevalue(lake)
    named: dict[tuple[str, str, int], list[int]] = {key: [] for key in missing_ids(expected)}
    for row in query(written.root, "SELECT * FROM silver.gaps WHERE status <> 'filled'").to_pylist():
        key = (row["source"], row["symbol"], row["trade_epoch"])
        named[key] += range(row["first_missing"], row["last_missing"] + 1)
    assert {key: sorted(ids) for key, ids in named.items()} == {
        key: sorted(ids) for key, ids in missing_ids(expected).items()
    }
    assert len(named["binance", "BTCUSDT", 0]) == 100


def test_every_quarantined_record_has_its_reason(local_lake: Written) -> None:
    """Promise 5."""
    reasons = query(local_lake.root, "SELECT rule, reason FROM silver.quarantine").to_pylist()
    assert [row for row in reasons if not row["reason"]] == []
    assert "no price" in {row["reason"] for row in reasons if row["rule"] == "reject"}


@pytest.mark.parametrize("lake", ["local_lake", "yarn_lake"])
def test_nothing_listens_beyond_this_machine(request: pytest.FixtureRequest, lake: str) -> None:
    """Services, drivers, executors and their web pages."""
    written: Written = request.getfixturevalue(lake)
    # A driver that is killed early may not have been listening yet when it was looked at.
    listening = {where: command for job in written.jobs for where, command in job.listening.items()}
    assert any("ticks.py" in command for command in listening.values()), "a driver was seen"
    assert beyond_loopback(listening) == {}


def test_a_job_whose_executors_could_not_write_ends_before_it_begins(
    suite: Settings, local_lake: Written, tmp_path: Path
) -> None:
    """Where webhdfs_url is not of the lake's file system, which it could not tell from a lost file later."""
    nowhere = "http://127.0.0.1:1"
    job = run_job(suite, *streaming(f"{local_lake.root}-nowhere"), "--webhdfs-url", nowhere, log=tmp_path / "log")
    assert job.exit_code == 2
    assert f"webhdfs_url is {nowhere}" in job.output
    with pytest.raises(NoSuchTable):
        rows_of(f"{local_lake.root}-nowhere", SILVER_TICKS)


def test_tables_are_registered_for_sql_once_and_answer(running: Running, local_lake: Written, expected: Lake) -> None:
    suite = running("kafka", "hdfs", "sql")

    def register(root: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["scripts/register-tables", "--conf", str(TEST_CONF), "--lake-root", root],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    for _ in range(2):
        registered = register(local_lake.root)
        assert registered.returncode == 0, registered.stderr
        assert registered.stdout.startswith(f"{len(TABLES)} tables")
    with closing(sql_connection(suite)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM gold.price_1m")
        assert cursor.fetchall() == [(len(expected.price_1m),)]
        cursor.execute("SELECT CAST(price_usd AS STRING) FROM gold.current_price WHERE asset = 'tiny'")
        assert cursor.fetchall() == [(f"{expected.current_price['tiny'].price_usd:f}",)]
        beeline = ["scripts/beeline", "-u", f"jdbc:hive2://127.0.0.1:{suite.sql_port}", "-e"]
        asked = subprocess.run([*beeline, "SELECT count(*) FROM gold.price_1m"], cwd=PROJECT, capture_output=True)
        assert f"| {len(expected.price_1m)} " in asked.stdout.decode(), asked.stderr.decode()
        # A lake of another root is refused, and nothing is changed.
        refused = register(f"{suite.lake_root}/another")
        assert refused.returncode == 2
        assert "a metastore serves one lake" in refused.stderr
        cursor.execute("SELECT count(*) FROM gold.price_1m")
        assert cursor.fetchall() == [(len(expected.price_1m),)]


def test_the_quality_check_passes_and_fails_on_a_planted_row(
    suite: Settings, local_lake: Written, spark: SparkSession, tmp_path: Path
) -> None:
    def check(root: str) -> Job:
        job = ("batch/check_quality.py", "--conf", str(TEST_CONF), "--date", "2024-08-09", "--lake-root", root)
        return run_job(suite, *job, log=tmp_path / "log")

    passed = check(local_lake.root)
    assert passed.exit_code == 0, passed.output[-5000:]

    damaged = f"{suite.lake_root}/end-to-end-damaged"
    files = files_of(damaged, str(suite.webhdfs_url))

    def append(rows: DataFrame, table: Table) -> None:
        rows.select(*table.column_names).write.format("delta").mode("append").save(table.path(damaged))

    for table in (SILVER_TICKS, GOLD_PRICE_1M):
        rows = spark.read.format("delta").load(table.path(local_lake.root))
        create_table(files, table, damaged)
        append(rows, table)
    minute = rows.where("window_date = '2024-08-09' AND asset = 'bitcoin'").limit(1)
    too_high = (F.col("high") + 1).cast("DECIMAL(28,12)")
    append(minute.withColumns({"asset": F.lit("planted"), "average": too_high}), GOLD_PRICE_1M)
    failed = check(damaged)
    assert failed.exit_code == 1, failed.output[-5000:]
    assert "ERROR   gold.price_1m" in failed.output
    wrong = query(damaged, "SELECT column_name, unexpected_count AS n FROM quality.results WHERE NOT success")
    assert wrong.to_pylist() == [{"column_name": "high,average", "n": 1}]


def test_the_notebook_runs_on_the_lake(local_lake: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKHOUSE_LAKE_ROOT", local_lake.root)
    notebook = nbformat.read(PROJECT / "notebooks" / "trends.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == [], "outputs are not kept"
    place = {"metadata": {"path": str(PROJECT / "notebooks")}}
    ran = nbclient.NotebookClient(notebook, timeout=int(PATIENCE), resources=place).execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the notebook draws"
