"""Start and stop services, and tell how they are."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from conf.settings import Settings
from services import hdfs, kafka, sql, yarn
from services.daemon import Daemon, is_alive, stop
from services.errors import DaemonDied, NoAnswer
from services.service import Service

MAKERS: dict[str, Callable[[Settings], Service]] = {
    "kafka": kafka.service,
    "hdfs": hdfs.service,
    "yarn": yarn.service,
    "sql": sql.service,
}
NAMES = tuple(MAKERS)
# Seconds in which a service must answer; all four at once need about 20 on two cores.
LIMIT = 180.0
# Seconds between looks at a service that is starting.
LOOK_EVERY = 0.25


@dataclass(frozen=True)
class State:
    """A daemon's state. waits_for is its service's: None where it answers."""

    service: str
    daemon: str
    pid: int | None
    address: str
    waits_for: str | None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def up(settings: Settings, names: Sequence[str] = NAMES) -> None:
    """Start what does not run of the named services, side by side, and return when all of them answer.

    Raises ServiceError for the first that cannot; nobody waits for the others then, but what has started goes on. Then
    removes what ended jobs have left in them.
    """
    if os.geteuid() == 0:
        say("these services run as root, and so may whoever finds a fault in them: an account of their own is better")
    given_up = threading.Event()
    with _alone(settings), ThreadPoolExecutor(len(names)) as threads:
        starting = [threads.submit(_up, MAKERS[name](settings), given_up) for name in names]
        try:
            for started in as_completed(starting):
                started.result()
        finally:
            given_up.set()
        for service in all_services(settings, names):
            # Another time does as well.
            with suppress(OSError, ValueError, KeyError):
                service.tidy()


def down(settings: Settings, names: Sequence[str] = NAMES) -> None:
    """Stop the named services and what they left behind. What computes stops before what stores."""
    with _alone(settings):
        for group in (("sql", "yarn"), ("hdfs", "kafka")):
            chosen = [MAKERS[name](settings) for name in group if name in names]
            if chosen:
                with ThreadPoolExecutor(len(chosen)) as threads:
                    list(threads.map(_down, chosen))


def states(settings: Settings, names: Sequence[str] = NAMES) -> list[State]:
    """The state of every daemon of the named services."""
    result = []
    for service in all_services(settings, names):
        processes = [daemon.process() for daemon in service.daemons]
        waits_for = service.waits_for() if any(processes) else "scripts/services up"
        for daemon, process in zip(service.daemons, processes, strict=True):
            pid = process.pid if process else None
            result.append(State(service.name, daemon.name, pid, service.address, waits_for))
    return result


def all_services(settings: Settings, names: Sequence[str] = NAMES) -> list[Service]:
    return [MAKERS[name](settings) for name in names]


def daemons(settings: Settings, names: Sequence[str] = NAMES) -> list[Daemon]:
    return [daemon for service in all_services(settings, names) for daemon in service.daemons]


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Two commands at once would start a daemon twice."""
    folder = settings.state_dir / "services"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command that starts or stops these services")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _up(service: Service, given_up: threading.Event) -> None:
    began = time.monotonic()
    processes = {daemon.name: daemon.process() for daemon in service.daemons}
    if not all(processes.values()):
        _kill_leftovers(service)
        for daemon in service.daemons:
            if processes[daemon.name] is None:
                daemon.check_ports()
        service.prepare()
    for daemon in service.daemons:
        if processes[daemon.name] is None:
            say(f"{service.name}: starting {daemon.name}")
            processes[daemon.name] = daemon.start()
    if _answers(service, processes, given_up):
        say(f"{service.name}: answers at {service.address} ({time.monotonic() - began:.1f} s)")


def _answers(service: Service, processes: dict[str, psutil.Process | None], given_up: threading.Event) -> bool:
    """Wait until the service answers: True, or somebody gives up: False. Raises DaemonDied and NoAnswer."""
    began = logged_at = time.monotonic()
    while (waits_for := service.waits_for()) is not None:
        for daemon in service.daemons:
            process = processes[daemon.name]
            if process is None or not is_alive(process):
                raise DaemonDied(f"{service.name}: {daemon.name} ended before it answered. {_advice(service, daemon)}")
        waited = time.monotonic() - began
        if waited > LIMIT:
            advice = _advice(service, service.daemons[-1])
            raise NoAnswer(f"{service.name}: still waiting for {waits_for} after {LIMIT:.0f} s. {advice}")
        if time.monotonic() - logged_at > 5:
            say(f"{service.name}: waiting for {waits_for}, {waited:.0f} s")
            logged_at = time.monotonic()
        if given_up.wait(LOOK_EVERY):
            return False
    return True


def _advice(service: Service, daemon: Daemon) -> str:
    lines = "\n".join(f"  | {line}" for line in daemon.last_lines()) or "  | (empty)"
    return (
        f"The end of {daemon.log}:\n{lines}\n"
        f"What it says is the cause as a rule. When that is put right: scripts/services up {service.name}"
    )


def _down(service: Service) -> None:
    running = [process for process in (daemon.process() for daemon in service.daemons) if process]
    killed = stop(running)
    _kill_leftovers(service)
    say(f"{service.name}: {'stopped' if running else 'was not running'}" + (" (had to be killed)" if killed else ""))


def _kill_leftovers(service: Service) -> None:
    for pid in service.leftovers():
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue
