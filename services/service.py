"""What a service is to the commands `up`, `down`, `status` and `logs`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from services.daemon import LOG_BYTES, OLDER_LOGS, Daemon


@dataclass
class Report:
    """What `status` says of a service besides its daemons. Services add to it.

    figures: for machines; a name ends with its unit. lines: the same for people. warnings: what is wrong, and what to
    do. unknown: the figures that could not be had, and why.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Service:
    """One of NAMES.

    address: where clients connect.
    prepare: writes the configuration and, the first time, formats the storage. May be cut short and called again.
    waits_for: None when the service answers as a client needs it, else what is not there yet, in a few words.
    report: adds what is to be said of a service that answers.
    tidy: removes what ended jobs have left in the services, which answer; may fail with OSError or ValueError.
    leftovers: processes that outlive the daemons that started them.
    """

    name: str
    address: str
    daemons: tuple[Daemon, ...]
    prepare: Callable[[], None]
    waits_for: Callable[[], str | None]
    report: Callable[[Report], None] = lambda report: None
    tidy: Callable[[], None] = lambda: None
    leftovers: Callable[[], list[int]] = list


def in_units(size: int | None) -> str:
    """Bytes as people read them; a dash where they are not known."""
    if size is None:
        return "-"
    number, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1000:
            break
        number, unit = number / 1024, larger
    return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"


def write_if_changed(path: Path, text: str) -> None:
    """Write a configuration file whole, so that no daemon that starts meanwhile reads a half of it."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def as_properties(values: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def as_hadoop_xml(values: dict[str, str]) -> str:
    properties = "".join(
        f"  <property><name>{escape(name)}</name><value>{escape(value)}</value></property>\n"
        for name, value in values.items()
    )
    return f'<?xml version="1.0"?>\n<configuration>\n{properties}</configuration>\n'


def write_logging_and_hosts(folder: Path) -> None:
    """The two configuration files that every Java daemon of ours has beside its own."""
    write_if_changed(folder / "conf" / "log4j.properties", _RELOAD4J)
    write_if_changed(folder / "conf" / "hosts", f"127.0.0.1 localhost {socket.gethostname()}\n")


# Warnings and worse, to bounded files.
_RELOAD4J = as_properties(
    {
        "log4j.rootLogger": "WARN, file",
        "log4j.appender.file": "org.apache.log4j.RollingFileAppender",
        "log4j.appender.file.File": "${tickhouse.log}",
        "log4j.appender.file.MaxFileSize": str(LOG_BYTES),
        "log4j.appender.file.MaxBackupIndex": str(OLDER_LOGS),
        "log4j.appender.file.layout": "org.apache.log4j.PatternLayout",
        "log4j.appender.file.layout.ConversionPattern": "%d{ISO8601} %p %c{1}: %m%n",
    }
)
# The same for Spark's daemon, which logs by Log4j 2.
LOG4J2 = as_properties(
    {
        "rootLogger.level": "warn",
        "rootLogger.appenderRef.file.ref": "file",
        "appender.file.type": "RollingFile",
        "appender.file.name": "file",
        "appender.file.fileName": "${sys:tickhouse.log}",
        "appender.file.filePattern": "${sys:tickhouse.log}.%i",
        "appender.file.layout.type": "PatternLayout",
        "appender.file.layout.pattern": "%d{ISO8601} %p %c{1}: %m%n%ex",
        "appender.file.policies.type": "SizeBasedTriggeringPolicy",
        "appender.file.policies.size": str(LOG_BYTES),
        "appender.file.strategy.type": "DefaultRolloverStrategy",
        "appender.file.strategy.max": str(OLDER_LOGS),
        # As of the others: .1 is the newest of the older ones.
        "appender.file.strategy.fileIndex": "min",
    }
)
