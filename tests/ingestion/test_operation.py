"""What an ingester tells those who run it, and what it keeps to itself."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from conf.settings import PROJECT, Settings
from ingestion.operation import ADDRESS_FILE, fetch_status
from operation.addresses import addresses, ask, read_address
from operation.server import CONNECTIONS
from tests.listening import beyond_loopback, listeners
from tests.operation.conventions import exposed, problems_of
from tests.programs import ingestion, kafka_records, simulator, wait_until
from tests.spools import spooled

CANARY = "canary-8f1d2c"


@pytest.fixture
def nowhere(suite: Settings) -> Settings:
    """Kafka does not answer: everything stays in the spool."""
    return suite.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})


def received(folder: Path) -> int:
    told = fetch_status(folder / "spool")
    return 0 if told is None else int(told["received"])


def get(folder: Path, path: str) -> tuple[int, str]:
    """HTTP status and body."""
    address = read_address(folder / "spool" / ADDRESS_FILE)
    assert address is not None
    code, body = ask(address.url + path, 30)
    return code, body.decode()


def status_command(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ingestion", "status", "--spool-dir", str(folder / "spool")]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_metrics_health_and_status(nowhere: Settings, tmp_path: Path) -> None:
    assert status_command(tmp_path).returncode == 3
    with (
        simulator(tmp_path, "--rate", "200") as (source, url),
        ingestion(tmp_path, nowhere, url, "--stale-seconds", "4", "--log-format", "json") as program,
    ):
        wait_until(lambda: received(tmp_path) > 200, "some flow")
        assert not beyond_loopback(listeners([psutil.Process(program.process.pid)]))
        _, metrics = get(tmp_path, "/metrics")
        figures = exposed(metrics)
        assert problems_of(metrics) == []
        assert figures["process_resident_memory_bytes"] > 1e6
        assert figures['tickhouse_ticks_total{feed="binance"}'] >= 200
        assert figures['tickhouse_bytes_total{feed="binance"}'] > 200 * 100
        assert figures["tickhouse_undelivered"] >= 200
        assert figures["tickhouse_spool_bytes"] > 200 * 200
        assert figures["tickhouse_published_total"] == 0
        assert figures['tickhouse_gaps_open{feed="binance"}'] == 0
        assert get(tmp_path, "/elsewhere")[0] == 404

        wait_until(lambda: get(tmp_path, "/healthz")[0] == 503, "Kafka's absence makes it unhealthy")
        assert "Kafka has acknowledged nothing" in get(tmp_path, "/healthz")[1]
        source.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: "no feed has said anything" in get(tmp_path, "/healthz")[1], "silence makes it unhealthy")
        source.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "no feed has said anything" not in get(tmp_path, "/healthz")[1], "it recovers")

        [address] = addresses(tmp_path / "state")
        assert (address.program, address.pid) == ("ingestion", program.process.pid)
        told = status_command(tmp_path)
        assert told.returncode == 1
        assert f"process {program.process.pid}" in told.stdout
        assert "binance" in told.stdout
        program.stop(signal.SIGKILL)
    for line in program.log.read_text().splitlines():
        assert {"asctime", "levelname", "name", "message"} <= set(json.loads(line))


def test_idle_connections_delay_neither_health_nor_the_end(nowhere: Settings, tmp_path: Path) -> None:
    with (
        simulator(tmp_path, "--rate", "200") as (_, url),
        ingestion(tmp_path, nowhere, url, "--stop-seconds", "0") as program,
        ExitStack() as idle,
    ):
        wait_until(lambda: received(tmp_path) > 0, "some flow")
        address = read_address(tmp_path / "spool" / ADDRESS_FILE)
        assert address is not None
        where = urlsplit(address.url)
        for _ in range(2 * CONNECTIONS):
            idle.enter_context(socket.create_connection((where.hostname or "", where.port or 0)))
        assert get(tmp_path, "/healthz")[0] == 200
        assert program.stop() == 0
    assert addresses(tmp_path / "state") == []


def test_a_taken_port_for_metrics_is_named(nowhere: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with ingestion(tmp_path, nowhere, "ws://127.0.0.1:1/stream", "--metrics-port", port) as program:
            assert program.process.wait(120) == 2
    assert f"metrics_port = {port}: " in program.log.read_text()


def test_a_recording_replayed_gives_the_same_ticks(nowhere: Settings, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    count = 3_000
    arguments = ("--stop-seconds", "0", "--record", str(tmp_path / "day.gz"), "--record-bytes", "100000")
    with (
        simulator(first, "--rate", "1000", "--trades", str(count), "--fault", "malformed") as (source, url),
        ingestion(first, nowhere, url, *arguments) as program,
    ):
        assert source.process.wait(120) == 0
        wait_until(lambda: received(first) == count, "all received")
        assert program.stop() == 0
    files = sorted(tmp_path.glob("day-binance-*.gz"))
    assert len(files) >= 2
    with gzip.open(files[0], "rt") as lines:
        assert int(next(lines).partition(" ")[0]) > 1e18

    with (
        simulator(second, "--speed", "0", "--replay", *map(str, files)) as (source, url),
        ingestion(second, nowhere, url, "--stop-seconds", "0") as program,
    ):
        assert source.process.wait(120) == 0
        wait_until(lambda: received(second) == count, "all received")
        assert program.stop() == 0
    names = ("symbol", "trade_id", "price_usd", "quantity", "event_time", "quote", "asset", "sequence")
    original, replayed = (
        [[message[name] for name in names] for message in spooled(folder / "spool", nowhere.ticks_topic)]
        for folder in (first, second)
    )
    assert len(original) == count
    assert original == replayed


@pytest.mark.services
def test_a_key_is_told_to_nobody(
    running: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by log, exception, metric, status, recording, `ps` or Kafka."""
    monkeypatch.setenv("TICKHOUSE_COINCAP_API_KEY", CANARY)
    own = running("kafka").model_copy(update={"ticks_topic": "ticks-canary", "rejects_topic": "rejects-canary"})
    told: list[str] = []
    with simulator(tmp_path, "--venue", "coincap", "--rate", "100") as (_, url):
        arguments = ("--feed", "coincap", "--record", str(tmp_path / "canary.gz"), "--assets", "bitcoin,ethereum")
        with ingestion(tmp_path, own, url, *arguments) as program:
            wait_until(lambda: received(tmp_path) > 100, "some flow")
            told += [get(tmp_path, path)[1] for path in ("/metrics", "/status", "/healthz")]
            told += [status_command(tmp_path).stdout, " ".join(psutil.Process(program.process.pid).cmdline())]
            assert program.stop() == 0
            told.append(json.dumps(program.line()))
        told.append(program.log.read_text())
        with ingestion(tmp_path, own, url.replace("/prices", "/nothing"), *arguments) as program:
            wait_until(lambda: program.logged("HTTP 404"), "it cannot connect")
            assert program.stop() == 0
        told.append(program.log.read_text())
    for topic in (own.ticks_topic, own.rejects_topic):
        told += [repr(record) for record in kafka_records(own, topic)]
    (recording, *_) = tmp_path.glob("canary-coincap-*.gz")
    told.append(gzip.decompress(recording.read_bytes()).decode())
    told += [file.read_bytes().decode("latin-1") for file in (tmp_path / "spool").iterdir()]
    assert sum(map(len, told)) > 100_000
    assert not [text for text in told if CANARY in text]
