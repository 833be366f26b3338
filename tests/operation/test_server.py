"""A program's figures can be had whoever else is connected, by this machine only, and its end waits for nobody."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client.core import CounterMetricFamily, Metric

from operation.addresses import addresses, ask, own_address, read_address, run_file, write_address
from operation.server import CONNECTIONS, Server
from tests.listening import beyond_loopback, listeners
from tests.operation.conventions import exposed, problems_of
from tests.programs import wait_until

LIMIT = 120.0


class Counting:
    """A program that has done three things."""

    def __init__(self) -> None:
        self.trouble: list[str] = []
        self.error: Exception | None = None

    def status(self) -> dict[str, Any]:
        if self.error:
            raise self.error
        return {"trouble": self.trouble, "done": 3}

    def metrics(self, status: dict[str, Any]) -> Iterable[Metric]:
        yield CounterMetricFamily("tickhouse_done", "things done", value=status["done"])


@pytest.fixture
def program() -> Counting:
    return Counting()


@pytest.fixture
def server(program: Counting, tmp_path: Path) -> Iterator[Server]:
    with Server("counting", 0, program, tmp_path) as server:
        yield server


def port_of(server: Server) -> int:
    return urlsplit(server.url).port or 0


def idle_connections(server: Server, stack: ExitStack, number: int) -> list[socket.socket]:
    return [stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)))) for _ in range(number)]


def is_ended(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection; waits for it."""
    connection.settimeout(LIMIT)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_metrics_health_and_status(server: Server, program: Counting) -> None:
    metrics = exposed(ask(f"{server.url}/metrics")[1].decode())
    assert metrics["tickhouse_done_total"] == 3
    assert metrics["tickhouse_healthy"] == 1
    assert metrics["process_resident_memory_bytes"] > 1e6
    assert problems_of(ask(f"{server.url}/metrics")[1].decode()) == []
    code, status = ask(f"{server.url}/status")
    assert code == 200
    told = json.loads(status)
    assert (told["program"], told["pid"], told["done"], told["trouble"]) == ("counting", os.getpid(), 3, [])
    assert ask(f"{server.url}/healthz") == (200, b'{"trouble": []}')

    program.trouble = ["nothing comes"]
    assert ask(f"{server.url}/healthz") == (503, b'{"trouble": ["nothing comes"]}')
    assert ask(f"{server.url}/status")[0] == 200
    assert exposed(ask(f"{server.url}/metrics")[1].decode())["tickhouse_healthy"] == 0
    assert ask(f"{server.url}/elsewhere")[0] == 404


def test_it_listens_on_loopback_only(server: Server) -> None:
    listening = listeners([psutil.Process()])
    assert ("127.0.0.1", port_of(server)) in listening
    own = {where: who for where, who in listening.items() if where[1] == port_of(server)}
    assert beyond_loopback(own) == {}


@pytest.mark.parametrize("number", [1, CONNECTIONS, 10 * CONNECTIONS])
def test_idle_connections_delay_neither_answers_nor_the_end(program: Counting, tmp_path: Path, number: int) -> None:
    server = Server("counting", 0, program, tmp_path)
    with ExitStack() as stack:
        idle = idle_connections(server, stack, number)
        assert ask(f"{server.url}/healthz", LIMIT)[0] == 200
        assert ask(f"{server.url}/metrics", LIMIT)[0] == 200
        # Some have asked for half a page.
        for connection in idle[-3:]:
            connection.sendall(b"GET /status HTTP/1.1\r\nHost: local")
        closing = threading.Thread(target=server.close, daemon=True)
        closing.start()
        closing.join(LIMIT)
        assert not closing.is_alive(), "the end waits for none of them"
        assert all(map(is_ended, idle))


def test_connections_take_a_bounded_number_of_threads(server: Server) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        idle_connections(server, stack, 20 * CONNECTIONS)
        assert ask(f"{server.url}/healthz", LIMIT)[0] == 200
        wait_until(lambda: threading.active_count() <= before + CONNECTIONS, "no more threads than places")


def test_a_connection_that_drips_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operation.server.CONNECTION_SECONDS", 1.0)
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        until = time.monotonic() + LIMIT
        with pytest.raises(OSError):  # noqa: PT012 - a byte at a time until the server has had enough
            connection.sendall(b"GET /status HTTP/1.1\r\nX: ")
            while time.monotonic() < until:
                connection.sendall(b"x")
                time.sleep(0.05)


def asked(server: Server, *hosts: str, method: str = "GET") -> tuple[int, bytes]:
    """/status with these Host headers: HTTP status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=LIMIT)
    connection.putrequest(method, "/status", skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


@pytest.mark.parametrize(
    "hosts",
    [
        ("rebound.example",),
        ("rebound.example:29108",),
        ("127.0.0.1.rebound.example",),
        ("localhost.",),
        ("",),
        ("127.0.0.1", "rebound.example"),
    ],
    ids=repr,
)
def test_a_page_of_another_site_reads_nothing(server: Server, hosts: tuple[str, ...]) -> None:
    """Its own name may point to 127.0.0.1, and the browser then sends that name."""
    code, body = asked(server, *hosts)
    assert code == 421
    assert b"done" not in body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost:9999", "127.0.0.1:29108"])
def test_this_machine_is_answered_by_any_port(server: Server, host: str) -> None:
    """A port that is forwarded, by ssh for example, has another number."""
    code, body = asked(server, host)
    assert code == 200
    assert json.loads(body)["done"] == 3


def test_head_has_no_body_and_other_methods_are_refused(server: Server) -> None:
    assert asked(server, "localhost", method="HEAD") == (200, b"")
    assert asked(server, "localhost", method="POST")[0] == 501


def test_an_error_is_an_answer_and_in_the_log(
    server: Server, program: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    program.error = ValueError("no figures today")
    with caplog.at_level(logging.ERROR):
        for path in ("/healthz", "/metrics", "/status"):
            code, body = ask(server.url + path)
            assert code == 500
            assert b"no figures" not in body
    assert caplog.text.count("no figures today") == 3
    program.error = None
    assert ask(f"{server.url}/healthz")[0] == 200


def test_a_taken_port_is_an_error_or_another_port(
    server: Server, program: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OSError, match="in use"):
        Server("second", port_of(server), program, tmp_path)
    with Server("second", port_of(server), program, tmp_path, or_any=True) as second:
        assert second.url != server.url
        assert ask(f"{second.url}/healthz")[0] == 200
    assert f"port {port_of(server)} for metrics" in caplog.text


def test_a_program_is_found_while_it_runs(program: Counting, tmp_path: Path) -> None:
    with Server("counting", 0, program, tmp_path) as server:
        server.announce(tmp_path / "elsewhere.json")
        [address] = addresses(tmp_path)
        assert (address.program, address.pid, address.url) == ("counting", os.getpid(), server.url)
        assert address.is_alive
        assert read_address(tmp_path / "elsewhere.json") == address
    assert addresses(tmp_path) == []
    assert not (tmp_path / "elsewhere.json").exists()


def test_killed_programs_and_others_with_their_number_are_told_apart(program: Counting, tmp_path: Path) -> None:
    """A file that a killed process left is not of a process that has got its number; the next start removes it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = own_address("counting", "http://127.0.0.1:1")
    assert own.is_alive
    dead = replace(own, pid=ended.pid)
    reused = replace(own, started=own.started - 3_600)
    assert [dead.is_alive, reused.is_alive] == [False, False]
    folder = run_file(tmp_path, "counting").parent
    write_address(folder / "counting-1.json", dead)
    write_address(folder / "counting-2.json", reused)
    write_address(folder / "other-3.json", replace(dead, program="other"))
    (folder / "torn.json").write_text('{"pid": 1')
    assert len(addresses(tmp_path)) == 3
    with Server("counting", 0, program, tmp_path):
        assert {(address.program, address.is_alive) for address in addresses(tmp_path)} == {
            ("counting", True),
            ("other", False),
        }


def test_a_program_runs_on_where_no_file_can_say_where_it_is(
    program: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver on YARN has its code in a zip file, and so no state folder."""
    (tmp_path / "code.zip").write_text("")
    with Server("counting", 0, program, tmp_path / "code.zip") as server:
        assert ask(f"{server.url}/healthz")[0] == 200
    assert "scripts/status may not find this program" in caplog.text


def test_this_machine_is_asked_without_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ask(f"{server.url}/healthz")[0] == 200
