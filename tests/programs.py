"""The suite's programs as processes of their own, and what Kafka holds, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from conf.settings import PROJECT, Settings, flag

RECORDINGS = Path(os.environ.get("TICKHOUSE_RECORDINGS", PROJECT.parent / "shared" / "recordings"))
LIMIT = 120.0


def wait_until(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    """Poll until the condition holds; fails the test after `limit` seconds."""
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, f"not within {limit:.0f} s: {what}"
        time.sleep(0.1)


class Program:
    """A process whose standard output is lines of JSON; what it logs goes to `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=PROJECT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def line(self) -> Any:
        """The next line of its output; waits for it."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"{self.log} says:\n{self.log.read_text()}"
        return json.loads(text)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, and wait until it has ended; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def logged(self, text: str) -> bool:
        return text in self.log.read_text()


@contextmanager
def running_program(module: str, arguments: Sequence[str], log: Path) -> Iterator[Program]:
    program = Program(module, arguments, log)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()
        if program.process.stdout is not None:
            program.process.stdout.close()


@contextmanager
def simulator(folder: Path, *arguments: str) -> Iterator[tuple[Program, str]]:
    """A running simulator on a free port, and its address. `program.process.wait()` returns when it has sent all."""
    with running_program("simulator", ["--port", "0", *arguments], folder / "simulator.log") as program:
        yield program, program.line()["url"]


@contextmanager
def ingestion(folder: Path, settings: Settings, url: str, *arguments: str) -> Iterator[Program]:
    """A running ingester of a Binance-like server, with these settings' Kafka and topics, and its spool in `folder`.

    After `program.stop()`, `program.line()` is its summary: received, rejected, published, undelivered.
    """
    names = (
        "kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "kafka_partitions", "kafka_client",
        "max_frame_bytes",
    )  # fmt: skip
    given = [text for name in names for text in (flag(name), str(getattr(settings, name)))]
    own = ("--spool-dir", str(folder / "spool"), "--state-dir", str(folder / "state"), "--metrics-port", "0")
    arguments = ("--feed", "binance", "--url", url, *own, *given, *arguments)
    with running_program("ingestion", arguments, folder / "ingestion.log") as program:
        yield program


def kafka_count(settings: Settings, topic: str) -> int:
    """How many records the topic holds; 0 where it does not exist."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers)
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        return sum(consumer.end_offsets(partitions).values()) if partitions else 0
    finally:
        consumer.close()


def kafka_records(settings: Settings, topic: str) -> list[Any]:
    """The topic's records up to now, in the order of each partition."""
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers, auto_offset_reset="earliest")
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        records: list[Any] = []
        until = time.monotonic() + LIMIT
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            assert time.monotonic() < until, f"topic {topic} gave nothing for {LIMIT:.0f} s"
            for batch in consumer.poll(timeout_ms=200).values():
                records.extend(batch)
                until = time.monotonic() + LIMIT
        return records
    finally:
        consumer.close()
