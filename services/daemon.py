"""A daemon: a process that outlives the command that started it, and is found again by a mark on its command line.

The mark is `-Dtickhouse.daemon=FOLDER/NAME`, a Java property that nothing reads. Unlike a file with a process id it
cannot be out of date, cannot mean a process that got the same id later, and is there however the start was cut short.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from conf.settings import ENVIRONMENT_PREFIX
from services.errors import PortTaken

LOOPBACK = "127.0.0.1"
# A log that has grown beyond this is put aside, once, when its daemon starts.
LOG_BYTES = 20 << 20
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
        return self.folder / "log" / f"{self.name}.log"

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
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=dict(self.environment),
                start_new_session=True,
            )
        return psutil.Process(started.pid)

    def last_lines(self, count: int = 15) -> list[str]:
        """The last lines of the daemon's log without the frames of stack traces; none where there is no log."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 64 * 1024))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("\tat ")][-count:]


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
