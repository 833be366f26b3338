"""`scripts/services status`: its figures are true, it ends whatever hangs, and it says what is wrong and what to do."""

from __future__ import annotations

import getpass
import http.server
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import hdfs
import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import NewTopic

import services
from conf.settings import Settings
from lake.tables import GOLD_CURRENT_PRICE, SILVER_TICKS
from services import hdfs as hdfs_service
from services.control import daemons
from services.hdfs import MAX_ENTRIES, most_files
from services.service import Report
from services.web import ask, beans
from tests.conftest import TEST_CONF
from tests.programs import wait_until
from tests.services.commands import free_ports, services_command

Running = Callable[..., Settings]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def status(*names: str) -> tuple[int, dict[str, Any]]:
    command = services_command("status", *names, "--json", "--conf", str(TEST_CONF))
    return command.returncode, json.loads(command.stdout)


def client(settings: Settings) -> hdfs.InsecureClient:
    return hdfs.InsecureClient(f"http://127.0.0.1:{settings.namenode_http_port}", user=getpass.getuser())


@contextmanager
def web_server(answer: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback that always answers the same, its URL, and the requests that it has had."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.requestline)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()


def test_a_request_to_this_machine_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(b'{"from": "the proxy"}') as (proxy, asked_proxy), web_server(b'{"from": "it"}') as (url, _):
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        for name in PROXIES:
            monkeypatch.setenv(name, proxy)
        assert ask(url) == {"from": "it"}
        assert asked_proxy == []


@pytest.mark.services
def test_services_start_and_answer_though_a_proxy_is_set(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(b"{}") as (proxy, asked):
        for name in PROXIES:
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("no_proxy", "")
        running("hdfs", "yarn")
        assert services_command("status", "hdfs", "yarn", "--conf", str(TEST_CONF)).returncode == 0
        assert asked == []


@pytest.mark.services
def test_files_of_the_lake_are_counted_by_table_and_folder(running: Running) -> None:
    settings = running("hdfs")
    files = client(settings)
    root = f"/{settings.lake_root.rpartition('/')[2]}"
    files.delete(root, recursive=True)
    before = status("hdfs")[1]["hdfs"]
    names = [
        *(f"{root}/{GOLD_CURRENT_PRICE.database}/{GOLD_CURRENT_PRICE.name}/_delta_log/{number}" for number in range(7)),
        *(f"{root}/{GOLD_CURRENT_PRICE.database}/{GOLD_CURRENT_PRICE.name}/{number}" for number in range(2)),
        *(f"{root}/{SILVER_TICKS.database}/{SILVER_TICKS.name}/event_date=2026-01-0{day}/{day}" for day in (1, 2, 3)),
    ]
    for name in names:
        files.write(name, b"12345")
    code, figures = status("hdfs")
    after = figures["hdfs"]
    assert code == 0
    assert after["tables"] == {
        "silver.ticks": {"files": 3, "log_files": 0, "bytes": 15},
        "gold.current_price": {"files": 2, "log_files": 7, "bytes": 45},
    }
    assert (after["fullest_folder"], after["fullest_folder_entries"]) == ("gold.current_price/_delta_log", 7)
    folders = 1 + 2 + 2 + 1 + 3  # the root, two databases, two tables, a log, three days
    assert after["files"] - before["files"] == len(names) + folders
    assert after["blocks"] - before["blocks"] == len(names)
    assert after["files"] < after["files_limit"]
    assert after["disk_free_bytes"] > 0
    assert after["unknown"] == []


@pytest.mark.services
def test_heap_memory_and_log_of_each_daemon_are_shown(running: Running) -> None:
    settings = running(*services.NAMES)
    figures = status()[1]
    shown = {name: daemon for service in figures.values() for name, daemon in service["daemons"].items()}
    assert set(shown) == {daemon.name for daemon in daemons(settings)}
    for name, daemon in shown.items():
        assert daemon["state"] == "running", name
        assert 0 < daemon["heap_used_bytes"] < daemon["heap_limit_bytes"], name
        assert daemon["memory_bytes"] > 20 << 20, name
        assert daemon["log_bytes"] > 0, name
    # The NameNode says of itself how much it may use, less the half of the young generation that is always empty.
    memory = beans(f"http://127.0.0.1:{settings.namenode_http_port}", "java.lang:type=Memory")["java.lang:type=Memory"]
    limit = shown["namenode"]["heap_limit_bytes"]
    assert 0.9 * limit < memory["HeapMemoryUsage"]["max"] <= limit


@pytest.mark.services
def test_topics_are_shown_with_their_retention(running: Running) -> None:
    settings = running("kafka")
    configs = {"retention.ms": str(5 * 3_600_000), "retention.bytes": str(1 << 20)}
    with closing(KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)) as admin:
        admin.create_topics(
            [
                NewTopic("measured", num_partitions=3, replication_factor=1, topic_configs=configs),
                NewTopic("endless", 1, 1, topic_configs={"retention.ms": "-1", "retention.bytes": "-1"}),
            ]
        )
    with closing(KafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)) as producer:
        producer.send("measured", b"x" * 10_000, partition=1).get(timeout=60)
    kafka = status("kafka")[1]["kafka"]
    measured = kafka["topics"]["measured"]
    assert 10_000 < measured.pop("bytes") < 20_000
    assert measured == {"partitions": 3, "retention_hours": 5, "retention_bytes": 3 << 20}
    assert [warning for warning in kafka["warnings"] if "topic endless keeps all records for ever" in warning]
    assert not [warning for warning in kafka["warnings"] if "measured" in warning]


@pytest.mark.services
@pytest.mark.parametrize(("service", "name"), [("hdfs", "namenode"), ("kafka", "broker"), ("yarn", "resourcemanager")])
def test_a_frozen_daemon_is_named_and_status_ends(running: Running, service: str, name: str) -> None:
    settings = running(service)
    (process,) = [daemon.process() for daemon in daemons(settings, [service]) if daemon.name == name]
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        code, figures = status(service)
        table = services_command("status", service, "--conf", str(TEST_CONF)).stdout
    finally:
        os.kill(process.pid, signal.SIGCONT)
    frozen = figures[service]
    assert code == 1
    assert frozen["daemons"][name]["state"] == "suspended"
    # Of a daemon that hangs, too, the heap can be read; what only it can tell is named.
    assert frozen["daemons"][name]["heap_used_bytes"] > 0
    assert [what for what in frozen["unknown"] if "its own figures" in what]
    assert table.startswith(f"! {service}: {name} is suspended and does nothing: kill -CONT {process.pid}")
    wait_until(lambda: status(service)[0] == 0, f"{service} answers again")


@pytest.mark.services
def test_the_log_of_changes_is_merged_while_the_namenode_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two seconds instead of every hour. Without merges, HDFS's log grows as long as the NameNode runs."""
    monkeypatch.setattr(hdfs_service, "CHECKPOINT_SECONDS", 2)
    names = [
        name for name in Settings.model_fields if name.startswith(("namenode_", "datanode_", "secondarynamenode_"))
    ]
    own = Settings(state_dir=tmp_path, **dict(zip(names, free_ports(len(names)), strict=True)))
    folder = tmp_path / "services" / "hdfs" / "data" / "name" / "current"
    services.up(own, ["hdfs"])
    try:
        for number in range(50):
            client(own).write(f"/merged/{number}", b"")
        written = ask(f"http://127.0.0.1:{own.namenode_http_port}/jmx?qry=Hadoop:service=NameNode,name=FSNamesystem")
        last_change = written["beans"][0]["LastWrittenTransactionId"]

        def last_in(kind: str) -> list[int]:
            """The last change in each of NameNode's files of this kind."""
            return [int(path.name[-19:]) for path in folder.glob(f"{kind}_*") if path.name[-19:].isdigit()]

        wait_until(lambda: max(last_in("fsimage")) >= last_change, "an image with all files")
        wait_until(lambda: min(last_in("edits")) >= last_change, "the end of the log's older files")
    finally:
        services.down(own, ["hdfs"])


def test_warnings_say_what_to_do() -> None:
    """Of figures as the NameNode gives them."""
    names = {"MissingBlocks": 2, "CorruptBlocks": 0, "LowRedundancyBlocks": 5, "TransactionsSinceLastCheckpoint": 10**6}
    most = most_files(512 << 20)
    missing, redundancy, merge = hdfs_service._dangers(names, files=most // 2, most=most, merged=86_400)
    assert missing.startswith("2 blocks are missing")
    assert redundancy.startswith("5 blocks have fewer replicas")
    assert "24 h ago" in merge
    assert "SecondaryNameNode" in merge
    healthy = dict.fromkeys(names, 0)
    assert hdfs_service._dangers(healthy, files=most // 2, most=most, merged=86_400) == []
    (full,) = hdfs_service._dangers(healthy, files=most, most=most, merged=0)
    assert "compact the tables" in full


def test_the_default_heap_has_room_for_twice_the_files_of_the_default_horizons() -> None:
    assert most_files(512 << 20) > 2 * 250_000


def test_a_folder_near_its_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one would take a million files: the counts are what HDFS would answer."""
    counts = {"": 950_000, "/_delta_log": 900_000}

    def content(_: Settings, url: str) -> dict[str, int] | None:
        name = url.partition("gold/alerts")[2]
        return {"fileCount": counts[name], "length": 0} if "gold/alerts" in url else None

    monkeypatch.setattr(hdfs_service, "_content", content)
    report = Report()
    hdfs_service._report_lake(Settings(), report)
    (warning,) = report.warnings
    assert f"gold.alerts/_delta_log has 900,000 entries, and HDFS takes no more than {MAX_ENTRIES:,}" in warning
