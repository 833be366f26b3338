"""The streaming job as a process, for benchmarks/run.py: its log, its memory and its CPU time."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

# For example: 2026-11-25 18:01:32,123 streaming.lakehouse INFO batch 12: 345 records in 0.21 s
BATCH_LINE = re.compile(
    r"^(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[,.]\d+)?).*?\bbatch (\d+): ([\d,]+) records\b.*?\b(\d+(?:\.\d+)?) s\b",
    re.MULTILINE,
)
# A job must end within so many seconds after SIGTERM; it finishes its micro-batch first.
STOP_LIMIT = 120.0
# The part of a job's log that shows why it died.
LAST_LINES, LAST_LINE_LENGTH = 12, 200
NO_CLASS_ARCHIVE = "Unable to use shared archive"
QUERY_ACCOUNT = "=== Streaming Query ==="


@dataclass(frozen=True)
class MicroBatch:
    """ended_at: seconds since 1970."""

    number: int
    records: int
    seconds: float
    ended_at: float


@dataclass(frozen=True)
class Usage:
    """CPU seconds (user and system) of a job's processes, and resident memory in MB of the driver's two processes."""

    cpu_seconds: float
    jvm_mb: float
    python_mb: float


def read_micro_batches(log: str) -> list[MicroBatch]:
    """The micro-batches that a job's log names. The log's clock is local time."""
    return [
        MicroBatch(
            number=int(number),
            records=int(records.replace(",", "")),
            seconds=float(seconds),
            ended_at=datetime.fromisoformat(at.replace(",", ".")).timestamp(),
        )
        for at, number, records, seconds in BATCH_LINE.findall(log)
    ]


def count_records(batches: Iterable[MicroBatch]) -> int:
    """The number of records in the micro-batches; one repeated after a kill counts once."""
    return sum({batch.number: batch.records for batch in batches}.values())


class Job:
    """A run of ./spark-submit.sh streaming/ticks.py, of the checkout in `project`."""

    def __init__(
        self, project: Path, flags: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        command = [str(project / "spark-submit.sh"), "streaming/ticks.py", *flags]
        with log.open("w", encoding="utf-8") as output:
            # In its own session: Ctrl-C reaches only the benchmark, which then ends the job.
            self._process = psutil.Popen(
                command,
                cwd=project,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = {self._process}

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        code: int | None = self._process.poll()
        return code

    def micro_batches(self) -> list[MicroBatch]:
        return read_micro_batches(self._text())

    def last_lines(self) -> list[str]:
        """The last lines of the log, without Spark's description of the query, which follows the cause of its end."""
        text, _, _ = self._text().partition(QUERY_ACCOUNT)
        lines = [line for line in text.splitlines() if line.strip()]
        return [line[:LAST_LINE_LENGTH] for line in lines[-LAST_LINES:]]

    def lacks_class_archive(self) -> bool:
        """Whether Java refused the class archive: it is valid only in the folder in which it was made."""
        return NO_CLASS_ARCHIVE in self._text()

    def usage(self) -> Usage | None:
        """The usage of all its processes so far; None after the job has ended.

        The usage of ended processes is in their parent's count of its children.
        """
        cpu_seconds, jvm, python = 0.0, 0, 0
        for process in self._family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                cpu_seconds += times.user + times.system + times.children_user + times.children_system
                if process.pid == self._process.pid:
                    python = process.memory_info().rss
                elif process.name() == "java":
                    jvm = max(jvm, process.memory_info().rss)
        return Usage(cpu_seconds, jvm / 1e6, python / 1e6) if self.exit_code is None else None

    def kill(self) -> None:
        """kill -9 of the driver and all its child processes."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait()

    def stop(self) -> bool:
        """Send SIGTERM, and kill -9 whatever does not end. Returns whether SIGTERM was enough."""
        family = self._family()
        if self.exit_code is None:
            self._process.terminate()
        _, alive = psutil.wait_procs(family, STOP_LIMIT)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait()
        return not alive

    def _family(self) -> list[psutil.Process]:
        """All its processes, including earlier ones that have lost their parent since."""
        with suppress(psutil.NoSuchProcess):
            self._seen |= {self._process, *self._process.children(recursive=True)}
        self._seen = {process for process in self._seen if process.is_running()}
        return list(self._seen)

    def _wait(self) -> None:
        psutil.wait_procs(self._seen, STOP_LIMIT)

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")
