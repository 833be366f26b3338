"""A daemon: a process that outlives the command that started it, and is found again by a mark on its command line.

The mark is `-Dtickhouse.daemon=FOLDER/NAME`, a Java property that nothing reads. Unlike a file with a process id it
cannot be out of date, cannot mean a process that got the same id later, and is there however the start was cut short.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import psutil

from conf.settings import ENVIRONMENT_PREFIX
from services.errors import PortTaken

LOOPBACK = "127.0.0.1"
# A daemon's log begins a new file after so many bytes, and so many older files of it are kept.
LOG_BYTES = 10 << 20
OLDER_LOGS = 3
# Of what a daemon writes elsewhere than to its log, so many blocks of at most so many bytes are kept. It is little: the
# last words of a Java that cannot start or go on, and exceptions that nobody catches.
OUTPUT_BLOCKS = 4096
OUTPUT_BLOCK_BYTES = 4096
_STARTED = "==== started at "
# Seconds a daemon has to end by itself before it is killed.
PATIENCE = 30.0
# Of our environment, what a daemon sees besides PATH and JAVA_HOME.
_PASSED_ON = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Daemon:
    """name: the daemon's; folder: of its service's state; command: with the mark in it; ports: setting -> port."""

    name: str
    folder: Path
    command: tuple[str, ...]
    ports: Mapping[str, int]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What it logs, by the configuration that services/service.py writes."""
        return self.folder / "log" / f"{self.name}.log"

    @property
    def output(self) -> Path:
        """What else it writes to stdout and stderr since its start."""
        return self.log.with_suffix(".out")

    @property
    def log_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.log.parent.glob(f"{self.name}.*"))

    def process(self) -> psutil.Process | None:
        """The running daemon, or None."""
        return marked(mark(self.folder, self.name))

    def check_ports(self) -> None:
        """Raises PortTaken where somebody listens on a port of this daemon, which is not running."""
        for setting, port in self.ports.items():
            _check_free(self.name, setting, port)

    def start(self) -> psutil.Process:
        """Start the daemon in a session of its own, so that Ctrl-C here does not end it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{_STARTED}{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n")
        # A daemon that was killed has left its temporary files behind.
        folder = temporary(self.folder, self.name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Not a file, which could grow for ever: dd ends at the limit, and Java ignores that nobody reads on.
        with self._reader_of_output() as output:
            started = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=dict(self.environment),
                start_new_session=True,
            )
        return psutil.Process(started.pid)

    def _reader_of_output(self) -> IO[bytes]:
        """A pipe into a bounded file; the file of the start before is kept."""
        if self.output.exists():
            self.output.replace(self.output.with_suffix(".out.1"))
        limits = [f"bs={OUTPUT_BLOCK_BYTES}", f"count={OUTPUT_BLOCKS}"]
        reader = subprocess.Popen(
            ["dd", f"of={self.output}", *limits],
            stdin=subprocess.PIPE,
            # Whoever waits for the end of our own output does not wait for the daemon.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert reader.stdin is not None
        return reader.stdin

    def last_lines(self, count: int = 15) -> list[str]:
        """The last lines of the log since the last start, then of the output, without frames of stack traces."""
        logged = _last_lines(self.log)
        starts = [number for number, line in enumerate(logged) if line.startswith(_STARTED)]
        return [*logged[starts[-1] if starts else 0 :][-count:], *_last_lines(self.output)[-count:]]


def _last_lines(path: Path) -> list[str]:
    """The last lines of a file without frames of stack traces; none where there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if not line.startswith("\tat ")]


def temporary(folder: Path, name: str) -> Path:
    """The folder of a daemon's temporary files, empty when the daemon starts."""
    return folder / "tmp" / name


def mark(folder: Path, name: str) -> str:
    return f"-Dtickhouse.daemon={folder}/{name}"


def marked(mark: str) -> psutil.Process | None:
    """The process with this mark on its command line, or None. A child just forked shows its parent's: not that one."""
    processes = [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]
    pids = {process.pid for process in processes}
    for process in processes:
        try:
            if process.ppid() not in pids and is_alive(process):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs: neither gone, nor another one with its id, nor a zombie that waits for its parent."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop(processes: list[psutil.Process]) -> list[psutil.Process]:
    """End the processes: politely, and after PATIENCE by force. Returns those that had to be killed."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=PATIENCE)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)
    return left


def daemon_environment(java_home: Path) -> dict[str, str]:
    """What a daemon sees of the environment. Nothing of ours and no virtual environment: what runs in YARN's containers
    inherits it, and must find there what it would find on any other node."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    own = os.environ.get("VIRTUAL_ENV")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not own or not folder.startswith(own))
    return environment | {"PATH": path, "JAVA_HOME": str(java_home)}


def accepts(port: int) -> bool:
    """Whether somebody on loopback accepts connections to the port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _check_free(name: str, setting: str, port: int) -> None:
    with socket.socket() as probe:
        # As the daemons do: a connection that has just been closed does not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PortTaken(
                f"{name}: port {port} is taken by {_holder(port)} ({error.strerror}). End that, or choose another port:"
                f" {setting} in the settings file, or {ENVIRONMENT_PREFIX}{setting.upper()}."
            ) from error


def _holder(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.NoSuchProcess:
                break
    return "another process"
