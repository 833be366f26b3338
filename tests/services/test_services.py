"""The services: data outlives a restart and a kill, nothing is left behind, no other machine can connect."""

from __future__ import annotations

import getpass
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import hdfs
import impala.dbapi
import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic

import services
from conf.settings import Settings
from services.control import daemons
from services.daemon import is_alive
from tests.listening import beyond_loopback, family, listeners

pytestmark = pytest.mark.services

Running = Callable[..., Settings]
PORTS = (
    "kafka_port", "kafka_controller_port",
    "namenode_port", "namenode_http_port", "secondarynamenode_http_port",
    "datanode_port", "datanode_http_port", "datanode_ipc_port",
    "resourcemanager_port", "resourcemanager_http_port", "nodemanager_port", "nodemanager_http_port",
    "sql_port",
)  # fmt: skip


def processes(suite: Settings) -> dict[str, psutil.Process]:
    found = {daemon.name: daemon.process() for daemon in daemons(suite)}
    return {name: process for name, process in found.items() if process}


@contextmanager
def sql(suite: Settings) -> Iterator[impala.dbapi.Cursor]:
    with (
        closing(impala.dbapi.connect("127.0.0.1", suite.sql_port, auth_mechanism="PLAIN")) as connection,
        connection.cursor() as cursor,
    ):
        yield cursor


def webhdfs(suite: Settings) -> hdfs.InsecureClient:
    return hdfs.InsecureClient(suite.webhdfs_url, user=getpass.getuser())


@pytest.fixture(scope="module")
def kept(running: Running) -> Settings:
    """All services, with a record in Kafka, a file in HDFS and a Delta table with a name in SQL."""
    suite = running(*services.NAMES)
    with closing(KafkaAdminClient(bootstrap_servers=suite.kafka_bootstrap_servers)) as admin:
        admin.create_topics([NewTopic("kept", num_partitions=1, replication_factor=1)])
    with closing(KafkaProducer(bootstrap_servers=suite.kafka_bootstrap_servers)) as producer:
        producer.send("kept", b"a record").get(timeout=30)
    webhdfs(suite).write("/kept/file", b"a file", overwrite=True)
    with sql(suite) as cursor:
        cursor.execute("create database if not exists kept")
        location = f"hdfs://127.0.0.1:{suite.namenode_port}/kept/table"
        cursor.execute(f"create table kept.prices (price decimal(28,12)) using delta location '{location}'")
        cursor.execute("insert into kept.prices values (0.000000000001)")
    return suite


def check_kept(suite: Settings) -> None:
    consumer = KafkaConsumer(
        "kept",
        bootstrap_servers=suite.kafka_bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=30_000,
    )
    with closing(consumer):
        assert next(consumer).value == b"a record"
    with webhdfs(suite).read("/kept/file") as file:
        assert file.read() == b"a file"
    with sql(suite) as cursor:
        cursor.execute("select cast(price as string) from kept.prices")
        assert cursor.fetchall() == [("0.000000000001",)]


def test_every_listener_is_on_loopback(kept: Settings) -> None:
    found = listeners(family(processes(kept).values()))
    assert {port for _, port in found} >= {getattr(kept, name) for name in PORTS}
    assert beyond_loopback(found) == {}


def test_up_again_changes_nothing(kept: Settings) -> None:
    before = {name: process.pid for name, process in processes(kept).items()}
    services.up(kept)
    assert {name: process.pid for name, process in processes(kept).items()} == before


@pytest.mark.parametrize(
    "victims",
    [("broker", "namenode", "nodemanager", "thriftserver"), ("datanode", "secondarynamenode", "resourcemanager")],
    ids=" ".join,
)
def test_up_restarts_only_what_was_killed(kept: Settings, victims: tuple[str, ...]) -> None:
    before = processes(kept)
    for name in victims:
        os.kill(before[name].pid, signal.SIGKILL)
    psutil.wait_procs([before[name] for name in victims], timeout=30)
    dead = {state.daemon for state in services.states(kept) if state.pid is None}
    assert dead == set(victims)
    services.up(kept)
    restarted = {name for name, process in processes(kept).items() if process.pid != before[name].pid}
    assert restarted == set(victims)
    check_kept(kept)


def test_down_leaves_nothing_and_up_finds_everything(kept: Settings, running: Running) -> None:
    before = family(processes(kept).values())
    services.down(kept)
    assert [process for process in before if is_alive(process)] == []
    for name in PORTS:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", getattr(kept, name))) != 0, name
    assert {state.pid for state in services.states(kept)} == {None}
    running(*services.NAMES)
    check_kept(kept)
