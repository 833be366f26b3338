"""The report of `scripts/services status`: first what is wrong, then each daemon, then each service's figures.

No part of it waits for long: every request has a time limit, and the report names each missing figure with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from services.daemon import Daemon
from services.heap import heap
from services.service import Report, Service, in_units

# Less free space than this, or a larger share in use, deserves a warning.
FREE_BYTES = 5 << 30
USED_SHARE = 0.95
# Java collects garbage before its heap is full: a share above this is one that it cannot keep down.
HEAP_SHARE = 0.95
State = Literal["running", "suspended", "not running"]
NOT_RUNNING: State = "not running"


@dataclass(frozen=True)
class DaemonFigures:
    """A daemon. Memory, heap and log in bytes; None where there is no daemon or it does not say."""

    service: str
    daemon: str
    state: State
    pid: int | None
    address: str
    heap_used_bytes: int | None
    heap_limit_bytes: int | None
    memory_bytes: int | None
    log_bytes: int


@dataclass(frozen=True)
class ServiceFigures:
    """A service. waits_for: None where it answers, else what is not there yet."""

    service: str
    waits_for: str | None
    daemons: tuple[DaemonFigures, ...]
    report: Report

    @property
    def answers(self) -> bool:
        return self.waits_for is None and all(daemon.pid for daemon in self.daemons)


def look_at(services: Sequence[Service]) -> list[ServiceFigures]:
    """All services, side by side: one that hangs costs the others no time."""
    with ThreadPoolExecutor(len(services)) as threads:
        return list(threads.map(_look_at, services))


def _look_at(service: Service) -> ServiceFigures:
    report = Report()
    daemons = tuple(_daemon(service, daemon, report) for daemon in service.daemons)
    waits_for = service.waits_for() if any(daemon.pid for daemon in daemons) else f"scripts/services up {service.name}"
    _disk(service, report)
    if waits_for is None:
        service.report(report)
    elif any(daemon.pid for daemon in daemons):
        report.unknown.append(f"its own figures: it waits for {waits_for}")
    return ServiceFigures(service.name, waits_for, daemons, report)


def _daemon(service: Service, daemon: Daemon, report: Report) -> DaemonFigures:
    process = daemon.process()
    if process is None:
        return _figures(service, daemon, NOT_RUNNING)
    try:
        memory, state = process.memory_info().rss, process.status()
    except psutil.Error:
        return _figures(service, daemon, NOT_RUNNING)
    used = limit = None
    try:
        size = heap(process)
        used, limit = size.used, size.limit
    except (OSError, ValueError, psutil.Error) as error:
        report.unknown.append(f"the heap of {daemon.name} ({error})")
    if state == psutil.STATUS_STOPPED:
        report.warnings.append(f"{daemon.name} is suspended and does nothing: kill -CONT {process.pid} lets it go on")
    if used and limit and used > HEAP_SHARE * limit:
        report.warnings.append(
            f"{daemon.name} uses {in_units(used)} of its heap of {in_units(limit)}; if that stays so, it ends soon: "
            "restart it, and see what has grown"
        )
    return _figures(
        service, daemon, "suspended" if state == psutil.STATUS_STOPPED else "running", process.pid, used, limit, memory
    )


def _figures(
    service: Service,
    daemon: Daemon,
    state: State,
    pid: int | None = None,
    used: int | None = None,
    limit: int | None = None,
    memory: int | None = None,
) -> DaemonFigures:
    return DaemonFigures(service.name, daemon.name, state, pid, service.address, used, limit, memory, daemon.log_bytes)


def _disk(service: Service, report: Report) -> None:
    """The service's folder without HDFS's blocks: there may be many, and the NameNode knows their size."""
    folder = service.daemons[0].folder
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    disk = shutil.disk_usage(existing)
    report.figures |= {"disk_bytes": _bytes_below(folder), "disk_free_bytes": disk.free}
    if disk.free < FREE_BYTES or disk.used > USED_SHARE * (disk.used + disk.free):
        report.warnings.append(
            f"the disk of {existing} has {in_units(disk.free)} free: delete something; kafka_retention_bytes, "
            "kafka_retention_hours and the lake's horizons bound what the suite keeps"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "blocks"]
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    return total


def as_table(all_figures: Sequence[ServiceFigures]) -> str:
    """For people: what is wrong, then a line a daemon, then a line or more a service."""
    lines = [f"! {figures.service}: {warning}" for figures in all_figures for warning in figures.report.warnings]
    lines += [f"? {figures.service}: unknown: {what}" for figures in all_figures for what in figures.report.unknown]
    lines += [""] if lines else []
    for figures in all_figures:
        lines += [_daemon_line(daemon, figures.waits_for) for daemon in figures.daemons]
    lines.append("")
    for figures in all_figures:
        known = figures.report.figures
        disk = known["disk_bytes"] + known.get("blocks_bytes", 0)
        lines.append(f"{figures.service:6} disk {in_units(disk)}; {in_units(known['disk_free_bytes'])} free")
        lines += [f"{figures.service:6} {line}" for line in figures.report.lines]
    return "\n".join(lines)


def _daemon_line(daemon: DaemonFigures, waits_for: str | None) -> str:
    name = f"{daemon.service:6} {daemon.daemon:18}"
    if not daemon.pid:
        return f"{name} {NOT_RUNNING}: scripts/services up {daemon.service}"
    state = "suspended" if daemon.state == "suspended" else "answers" if waits_for is None else f"waits for {waits_for}"
    sizes = [("heap", daemon.heap_used_bytes), ("of", daemon.heap_limit_bytes), ("memory", daemon.memory_bytes)]
    columns = " ".join(f"{name} {in_units(size):>8}" for name, size in [*sizes, ("log", daemon.log_bytes)])
    return f"{name} pid {daemon.pid:<8} {daemon.address:32} {columns}  {state}"


def as_json(all_figures: Sequence[ServiceFigures]) -> dict[str, Any]:
    """For machines: the service's name -> its figures; sizes in bytes, times in seconds."""
    return {
        figures.service: {
            "answers": figures.answers,
            "waits_for": figures.waits_for,
            "warnings": figures.report.warnings,
            "unknown": figures.report.unknown,
            "daemons": {daemon.daemon: asdict(daemon) for daemon in figures.daemons},
            **figures.report.figures,
        }
        for figures in all_figures
    }
