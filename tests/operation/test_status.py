"""scripts/status says what is wrong, whatever runs or does not, and waits for nobody for ever."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from kafka import KafkaAdminClient

from conf.settings import PROJECT, Settings, read_settings
from operation.addresses import addresses, own_address, run_file, write_address
from operation.server import Server
from operation.status import PROGRAMS
from streaming.status import Subject
from tests.conftest import TEST_CONF
from tests.micro_batches import checkpoint_of, in_kafka, lake_in, market, opened, write_one
from tests.notifier.receivers import Hook, serving
from tests.programs import ingestion, running_program, simulator, wait_until
from tests.streaming.test_status import leased


def status(conf: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROJECT / "scripts" / "status", "--conf", str(conf), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def wrong(conf: Path, **environment: str) -> dict[str, str]:
    """What is wrong, by part of the suite."""
    shown = status(conf, "--json", **environment)
    assert shown.stderr == ""
    return {each["part"]: each["what"] for each in json.loads(shown.stdout)["wrong"]}


def conf_in(folder: Path, **changes: Any) -> Path:
    """A settings file: that of the tests' suite, with changes."""
    text = TEST_CONF.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if line.partition("=")[0].strip() not in changes]
    conf = folder / "suite.toml"
    conf.write_text("\n".join([*kept, *(f"{name} = {json.dumps(value)}" for name, value in changes.items())]))
    return conf


def test_where_nothing_runs_it_says_so(tmp_path: Path) -> None:
    conf = conf_in(tmp_path, state_dir=str(tmp_path / "state"))
    shown = status(conf)
    assert (shown.returncode, shown.stderr) == (1, "")
    title, *lines = shown.stdout.splitlines()
    assert title.endswith("4 things are wrong")
    assert [line.split()[:5] for line in lines[:4]] == [
        ["!", part, "is", "not", "running:"] for part in ("kafka", "hdfs", "ingestion", "streaming")
    ]
    for command in (PROGRAMS["ingestion"], PROGRAMS["streaming"], "scripts/services up kafka"):
        assert command in shown.stdout
    assert status(conf, "--state-dir", "/dev/null").returncode == 1
    assert status(conf, "--lines").returncode == 2


class Greeting(socketserver.StreamRequestHandler):
    """Greets as a mail server does."""

    def handle(self) -> None:
        self.wfile.write(b"220 here I am\r\n")


def test_programs_that_died_or_hang_are_named(tmp_path: Path) -> None:
    """And others that have got their address are not taken for them; a proxy is not asked."""
    state = tmp_path / "state"
    conf = conf_in(tmp_path, state_dir=str(state))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        hanging = own_address("streaming", f"http://127.0.0.1:{silent.getsockname()[1]}")
        write_address(run_file(state, "streaming"), hanging)
        _, venue = stack.enter_context(simulator(tmp_path, "--rate", "50"))
        settings = read_settings(environment={}, file=conf)
        away = settings.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
        program = stack.enter_context(ingestion(tmp_path, away, venue, "--stop-seconds", "0"))
        wait_until(lambda: len(addresses(state)) == 2, "it runs")
        [running] = [address for address in addresses(state) if address.program == "ingestion"]
        mail_server = socketserver.TCPServer(("127.0.0.1", 0), Greeting)
        stack.enter_context(serving(mail_server))
        greeting = own_address("notifier", f"http://127.0.0.1:{mail_server.server_address[1]}")
        write_address(run_file(state, "notifier"), greeting)
        # A dead process's number at the address of a living one.
        write_address(state / "run" / "alerting-1.json", replace(running, program="alerting", pid=ended.pid))
        found = wrong(conf, http_proxy="http://127.0.0.1:1", all_proxy="http://127.0.0.1:1")
        assert found["streaming"].startswith(f"process {os.getpid()} ")
        assert "answer" in found["streaming"]
        assert (
            found["alerting"] == f"process {ended.pid} has ended, and not by itself: it was killed, or the machine was"
        )
        assert "no web server of ours" in found["notifier"]
        assert "ingestion" not in found or "Kafka" in found["ingestion"], "it runs, maybe longer than Kafka may be away"
        program.stop(signal.SIGKILL)
        assert wrong(conf)["ingestion"].startswith(f"process {running.pid} has ended")


def test_a_driver_without_a_state_folder_is_found_by_its_port_and_lake(tmp_path: Path) -> None:
    """As on YARN, where its code lies in a zip file."""
    settings = lake_in(tmp_path, kafka_bootstrap_servers="127.0.0.1:1")
    lakehouse = opened(settings)
    (tmp_path / "code.zip").write_text("")
    with leased(settings, lakehouse) as lease:
        subject = Subject(settings, lakehouse, lease, None)
        with Server("streaming", 0, subject, tmp_path / "code.zip") as server:
            changes = {"state_dir": str(tmp_path / "state"), "stream_metrics_port": urlsplit(server.url).port}
            assert "streaming" not in wrong(conf_in(tmp_path, **changes, lake_root=settings.lake_root))
            found = wrong(conf_in(tmp_path, **changes, lake_root="file:/another"))
            assert found["streaming"].startswith("is not running")
    lakehouse.finish()


@pytest.mark.services
def test_a_healthy_suite_is_shown_from_the_venue_to_gold(
    running: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = running("kafka")
    name = uuid.uuid4().hex[:8]
    conf = conf_in(
        tmp_path,
        state_dir=str(suite.state_dir),
        lake_root=f"file:{tmp_path / 'lake'}",
        checkpoint=f"file:{tmp_path / 'checkpoint'}",
        stream_stale_seconds=3_600,
        **{f"{topic}_topic": f"{topic}-{name}" for topic in ("ticks", "rejects", "gaps", "alerts")},
    )
    settings = read_settings(environment={}, file=conf)
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    admin.create_topics({settings.alerts_topic: {"num_partitions": 1, "replication_factor": 1}})
    admin.close()
    checkpoint_of(tmp_path / "checkpoint", "q")
    hook = Hook()
    monkeypatch.setenv("TICKHOUSE_WEBHOOK_URL", f"http://127.0.0.1:{hook.port}/hook")
    own = ("--conf", str(conf))
    with ExitStack() as stack:
        stack.enter_context(serving(hook))
        _, venue = stack.enter_context(simulator(tmp_path, "--rate", "50"))
        program = stack.enter_context(ingestion(tmp_path, settings, venue, "--state-dir", str(settings.state_dir)))
        stack.enter_context(running_program("alerting", own, tmp_path / "alerting.log"))
        stack.enter_context(running_program("notifier", own, tmp_path / "notifier.log"))
        # The streaming job without Spark, in this process.
        lakehouse = opened(settings)
        write_one(lakehouse, in_kafka(market(random.Random(4))[:50]), 0)
        subject = Subject(settings, lakehouse, stack.enter_context(leased(settings, lakehouse)), psutil.Process())
        stack.enter_context(Server("streaming", 0, subject, settings.state_dir))
        wait_until(lambda: {each.program for each in addresses(settings.state_dir)} == set(PROGRAMS), "all run")
        wait_until(lambda: wrong(conf) == {}, "all is well")
        shown = status(conf)
        assert (shown.returncode, shown.stderr) == (0, "")
        title, *lines = shown.stdout.splitlines()
        assert title.endswith("nothing is wrong")
        parts = ("venue", "ingestion", "kafka", "streaming", "bronze", "silver", "gold", "alerting", "notifier", "hdfs")
        first = [next(number for number, line in enumerate(lines) if line.split()[:1] == [part]) for part in parts]
        assert first == sorted(first)
        assert len(shown.stdout.splitlines()) <= 30, "it is one screen"
        for text in (
            "binance: 1 of 1 connections up, last tick",
            "answers; broker",
            "micro-batch 0 ended",
            "webhook: 0 sent",
            "1 files",
        ):
            assert text in shown.stdout
        told = json.loads(status(conf, "--json").stdout)
        assert told["programs"]["streaming"][0]["status"]["tables"]["silver.ticks"]["version"] >= 1
        assert told["programs"]["ingestion"][0]["address"]["pid"] == program.process.pid

        program.stop(signal.SIGKILL)
        shown = status(conf)
        assert shown.returncode == 1
        title, first_line, *_ = shown.stdout.splitlines()
        assert title.endswith("one thing is wrong")
        assert first_line.split()[:5] == ["!", "ingestion", "process", str(program.process.pid), "has"]
    lakehouse.finish()


def test_watch_shows_the_suite_again_and_again(tmp_path: Path) -> None:
    """In a file and on a terminal."""
    state = tmp_path / "state"
    command = [
        sys.executable,
        "-m",
        "operation.status",
        "--conf",
        str(conf_in(tmp_path, state_dir=str(state))),
        "--watch",
    ]
    terminal, its_other_end = pty.openpty()
    shown = tmp_path / "shown"
    problem = f"process {os.getpid()} does not answer".encode()
    with ExitStack() as stack:
        file = stack.enter_context(shown.open("wb"))
        for output in (file.fileno(), its_other_end):
            watching = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output)
            stack.callback(watching.wait)
            stack.callback(watching.kill)
            if output == its_other_end:
                os.close(its_other_end)
                shown.write_bytes(b"")
                threading.Thread(target=copy, args=(terminal, shown), daemon=True).start()
            wait_until(lambda: b"alerting   not running" in shown.read_bytes(), "the suite is shown")
            write_address(run_file(state, "alerting"), own_address("alerting", "http://127.0.0.1:1"))
            wait_until(lambda: problem in shown.read_bytes(), "what has changed is shown")
            run_file(state, "alerting").unlink()
            watching.send_signal(signal.SIGINT)
            assert watching.wait(120) == 1
            assert b"Traceback" not in shown.read_bytes()


def copy(terminal: int, shown: Path) -> None:
    """Append what a terminal shows to a file, until nobody writes to it any more."""
    with shown.open("ab", buffering=0) as file:
        while True:
            try:
                file.write(os.read(terminal, 4096))
            except OSError:
                return
