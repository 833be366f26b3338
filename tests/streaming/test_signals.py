"""A running job tells how it is, and Ctrl-C ends it as SIGTERM does: after the micro-batch in hand, without a trace."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from conf.settings import PROJECT, Settings, flag
from lake.reader import row_count
from lake.tables import BRONZE_TICKS, GOLD_PRICE_1D
from operation.addresses import addresses, ask
from operation.server import CONNECTIONS
from tests.micro_batches import market
from tests.operation.conventions import exposed, problems_of
from tests.programs import wait_until


def tells_how_it_is(state_dir: Path, producer: KafkaProducer, topic: str, idle: ExitStack) -> None:
    """The job has written the 21 records that Kafka has, and writes no more. Leaves idle connections to it."""
    [address] = addresses(state_dir)
    assert (address.program, address.is_alive) == ("streaming", True)
    where = urlsplit(address.url)
    for _ in range(2 * CONNECTIONS):
        idle.enter_context(socket.create_connection((where.hostname or "", where.port or 0)))
    lag = f'tickhouse_kafka_lag_records{{partition="0",reader="stream",topic="{topic}"}}'

    def figures() -> dict[str, float]:
        page = ask(f"{address.url}/metrics", 60)[1].decode()
        assert problems_of(page) == []
        return exposed(page)

    wait_until(lambda: figures().get(lag) == 0, "it has seen that Kafka has nothing more")
    assert figures()["tickhouse_stream_records_total"] == 21
    assert figures()["tickhouse_stream_quarantined_total"] == 1
    assert figures()["tickhouse_stream_jvm_resident_memory_bytes"] > 50e6
    assert figures()["tickhouse_stream_lease_held"] == 1
    assert ask(f"{address.url}/healthz", 60) == (200, b'{"trouble": []}')
    for _ in range(7):
        producer.send(topic, b"a record that waits").get(30)
    wait_until(lambda: figures()[lag] == 7, "Kafka has what the checkpoint has not")
    wait_until(lambda: ask(f"{address.url}/healthz", 60)[0] == 503, "the records wait for too long")
    assert b"7 of the 7 records to go" in ask(f"{address.url}/healthz", 60)[1]
    status = json.loads(ask(f"{address.url}/status", 60)[1])
    assert (status["lag_records"], status["stale_records"], status["last_batch"]["number"]) == (7, 7, 0)
    assert status["tables"]["bronze.ticks"]["files"] == 1


@pytest.mark.services
def test_ctrl_c_ends_the_job_with_all_windows_written(running: Callable[..., Settings], tmp_path: Path) -> None:
    suite = running("kafka")
    name = uuid.uuid4().hex[:8]
    settings = {
        "kafka_bootstrap_servers": suite.kafka_bootstrap_servers,
        **{topic: f"{topic.partition('_')[0]}-{name}" for topic in ("ticks_topic", "rejects_topic", "gaps_topic")},
        "lake_root": f"file:{tmp_path / 'lake'}",
        "checkpoint": f"file:{tmp_path / 'checkpoint'}",
        "state_dir": str(tmp_path / "state"),
        "stream_metrics_port": "0",
        "stream_stale_seconds": "5",
        # One micro-batch, and no other while the test runs.
        "trigger_seconds": str(max((3_600, 3_500, 3_400, 3_300), key=lambda seconds: seconds - time.time() % seconds)),
    }
    producer = KafkaProducer(bootstrap_servers=suite.kafka_bootstrap_servers, acks="all")
    admin = KafkaAdminClient(bootstrap_servers=suite.kafka_bootstrap_servers)
    # Others' topics, whose names begin or end like ours, are not ours.
    others = [f"{settings['ticks_topic']}-copy", f"my-{settings['ticks_topic']}"]
    for topic in (settings["ticks_topic"], *others):
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        producer.send(topic, b"no tick")
    producer.flush()
    for value in market(random.Random(6))[:20]:
        producer.send(settings["ticks_topic"], value)
    producer.flush()
    admin.close()
    log = tmp_path / "job.log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [
                "./spark-submit.sh",
                "streaming/ticks.py",
                *(word for key, value in settings.items() for word in (flag(key), value)),
            ],
            cwd=PROJECT,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, as a shell gives it: Ctrl-C reaches all of its processes.
            start_new_session=True,
        )
    try:
        wait_until(lambda: "batch 0:" in log.read_text(), "the first micro-batch")
        with closing(producer), ExitStack() as idle:
            tells_how_it_is(Path(settings["state_dir"]), producer, settings["ticks_topic"], idle)
            os.killpg(job.pid, signal.SIGINT)
            assert job.wait(120) == 0, log.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert "Traceback" not in log.read_text()
    assert "KeyboardInterrupt" not in log.read_text()
    root = f"{tmp_path / 'lake'}"
    assert row_count(root, BRONZE_TICKS) == 21
    assert row_count(root, GOLD_PRICE_1D) > 0
    assert addresses(Path(settings["state_dir"])) == []
