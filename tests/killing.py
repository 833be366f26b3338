"""kill -9 of the services' daemons and of executors on YARN, for tests."""

from __future__ import annotations

from contextlib import suppress

import psutil

from conf.settings import Settings
from services.control import daemons
from tests.listening import family

# Which service each daemon is of.
DAEMONS = {"broker": "kafka", "datanode": "hdfs", "namenode": "hdfs"}


def kill_daemon(settings: Settings, name: str) -> None:
    """kill -9 of a service's daemon."""
    (daemon,) = (daemon for daemon in daemons(settings) if daemon.name == name)
    process = daemon.process()
    assert process is not None, f"{name} does not run"
    process.kill()
    process.wait(60)


def kill_executors(settings: Settings) -> bool:
    """kill -9 of the executors that jobs have on YARN at this moment; whether there was one."""
    (manager,) = (daemon.process() for daemon in daemons(settings, ["yarn"]) if daemon.name == "nodemanager")
    assert manager is not None, "YARN does not run"
    killed = False
    for process in family([manager]):
        with suppress(psutil.Error):
            if process.name() == "java" and "YarnCoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
                process.kill()
                killed = True
    return killed
