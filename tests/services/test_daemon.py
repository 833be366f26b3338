"""A daemon's files are bounded, and what it says last is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conf.settings import Settings
from services import kafka, sql
from services.daemon import LOG_BYTES, OLDER_LOGS, OUTPUT_BLOCK_BYTES, OUTPUT_BLOCKS, Daemon, stop, temporary
from services.java import java_home
from tests.programs import wait_until
from tests.services.commands import free_ports


def python(folder: Path, code: str) -> Daemon:
    return Daemon("talker", folder, (sys.executable, "-c", code), ports={})


def test_output_beyond_the_limit_is_dropped_and_the_daemon_goes_on(tmp_path: Path) -> None:
    """As Java does, the program ignores that nobody reads on."""
    lines = 3 * OUTPUT_BLOCKS * OUTPUT_BLOCK_BYTES // 1000
    daemon = python(
        tmp_path,
        f"""
import os, pathlib
for _ in range({lines}):
    try:
        os.write(1, b"x" * 999 + b"\\n")
    except BrokenPipeError:
        pass
pathlib.Path("reached the end").touch()
""",
    )
    daemon.start().wait()
    assert (tmp_path / "reached the end").exists()
    assert 0 < daemon.output.stat().st_size <= OUTPUT_BLOCKS * OUTPUT_BLOCK_BYTES


def test_last_lines_are_those_of_the_last_start(tmp_path: Path) -> None:
    first = python(tmp_path, "print('of the first start')")
    first.start().wait()
    first.log.write_text(first.log.read_text() + "logged by the first\n")
    second = python(tmp_path, "print('of the second start')")
    second.start().wait()
    wait_until(lambda: second.last_lines()[-1] == "of the second start", "the output")
    assert "first" not in "\n".join(second.last_lines())


def test_a_java_that_cannot_start_says_why(tmp_path: Path) -> None:
    daemon = Daemon("broken", tmp_path, (f"{java_home()}/bin/java", "-XX:+NoSuchOption"), ports={})
    daemon.start().wait()
    wait_until(lambda: "Unrecognized VM option 'NoSuchOption'" in daemon.last_lines(), "the reason")


def test_a_start_removes_the_temporary_files_of_a_killed_daemon(tmp_path: Path) -> None:
    left = temporary(tmp_path, "talker") / "left" / "library.so"
    left.parent.mkdir(parents=True)
    left.touch()
    python(tmp_path, "pass").start().wait()
    assert list(temporary(tmp_path, "talker").iterdir()) == []


@pytest.mark.services
@pytest.mark.parametrize("name", ["kafka", "sql"])
def test_a_log_begins_anew_at_its_limit_and_few_older_ones_are_kept(tmp_path: Path, name: str) -> None:
    """With a limit of 1,000 bytes in place of LOG_BYTES, and all that a start has to say."""
    broker, controller, thrift = free_ports(3)
    settings = Settings(state_dir=tmp_path, kafka_port=broker, kafka_controller_port=controller, sql_port=thrift)
    service = {"kafka": kafka, "sql": sql}[name].service(settings)
    service.prepare()
    (daemon,) = service.daemons
    (configuration,) = (daemon.folder / "conf").glob("log4j*.properties")
    text = configuration.read_text()
    assert str(LOG_BYTES) in text
    configuration.write_text(text.replace(str(LOG_BYTES), "1000").replace("WARN", "INFO").replace("=warn", "=info"))
    process = daemon.start()
    try:
        wait_until(lambda: (daemon.log.parent / f"{daemon.log.name}.{OLDER_LOGS}").exists(), "the oldest log")
    finally:
        stop([process])
    logs = {path.name: path.stat().st_size for path in daemon.log.parent.glob(f"{daemon.log.name}*")}
    assert set(logs) == {daemon.log.name, *(f"{daemon.log.name}.{number}" for number in range(1, OLDER_LOGS + 1))}
    # A line is not cut: one may go beyond.
    assert max(logs.values()) < 1000 + 16_384
