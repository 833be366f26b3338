"""Ctrl-C ends the streaming job as SIGTERM does: after the micro-batch in hand, without a stack trace."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from conf.settings import PROJECT, Settings, flag
from lake.reader import row_count
from lake.tables import BRONZE_TICKS, GOLD_PRICE_1D
from tests.micro_batches import market
from tests.programs import wait_until


@pytest.mark.services
def test_ctrl_c_ends_the_job_with_all_windows_written(running: Callable[..., Settings], tmp_path: Path) -> None:
    suite = running("kafka")
    name = uuid.uuid4().hex[:8]
    settings = {
        "kafka_bootstrap_servers": suite.kafka_bootstrap_servers,
        **{topic: f"{topic.partition('_')[0]}-{name}" for topic in ("ticks_topic", "rejects_topic", "gaps_topic")},
        "lake_root": f"file:{tmp_path / 'lake'}",
        "checkpoint": f"file:{tmp_path / 'checkpoint'}",
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
    producer.close()
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
