"""A service that cannot start says why and what to do, and the command's exit code says which kind it is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.services.commands import free_ports, services_command


def test_a_taken_port_is_named_with_its_holder_and_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = services_command("up", "kafka", state_dir=tmp_path, kafka_port=port)
    assert found.returncode == 3
    assert f"port {port} is taken by process {os.getpid()}" in found.stderr
    assert "TICKHOUSE_KAFKA_PORT" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="this test does not run as root")
def test_who_starts_services_as_root_is_warned(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = services_command("up", "kafka", state_dir=tmp_path, kafka_port=taken.getsockname()[1])
    assert "these services run as root" in started.stderr


def test_an_unknown_service_is_wrong_usage() -> None:
    found = services_command("up", "postgres")
    assert found.returncode == 2
    assert "there is no service postgres; there are kafka, hdfs, yarn, sql" in found.stderr


def test_a_service_that_does_not_run_is_shown_so(tmp_path: Path) -> None:
    found = services_command("status", "kafka", state_dir=tmp_path)
    assert found.returncode == 1
    assert "not running" in found.stdout


@pytest.mark.services
def test_a_daemon_that_dies_at_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    meta = tmp_path / "services" / "kafka" / "data" / "meta.properties"
    meta.parent.mkdir(parents=True)
    meta.write_text("version=1\ncluster.id=damaged\nnode.id=77\n")
    broker, controller = free_ports(2)
    found = services_command("up", "kafka", state_dir=tmp_path, kafka_port=broker, kafka_controller_port=controller)
    assert found.returncode == 4
    assert "broker ended before it answered" in found.stderr
    assert "Stored node id 77 doesn't match" in found.stderr
    assert "scripts/services up kafka" in found.stderr
