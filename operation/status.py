"""The whole suite on one screen, from the venue to gold and to alerts, with what is wrong first: scripts/status

It asks the programs that run on this machine with this state folder, and the services. It starts and changes nothing.
Alerting, the notifier, YARN and SQL may be absent; that is said, and is not wrong.

Exit codes: 0 healthy; 1 something is wrong; 2 a wrong setting.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from conf.settings import Settings, arguments, from_command_line
from operation.addresses import Address, addresses, ask
from operation.server import LOOPBACK
from services.control import NAMES, states
from services.errors import ServiceError

PATIENCE_SECONDS = 15.0
"""Whoever has not answered by then is shown as silent."""
REFRESH_SECONDS = 2.0
# Program -> how it is started.
PROGRAMS = {
    "ingestion": "python -m ingestion",
    "streaming": "./spark-submit.sh streaming/ticks.py",
    "alerting": "python -m alerting",
    "notifier": "python -m notifier",
}
REQUIRED = ("ingestion", "streaming")
Status = Mapping[str, Any]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Program:
    """A program that runs, or has died. status: what it says of itself; None: problem says why there is none."""

    address: Address
    status: Status | None
    problem: str | None = None


@dataclass(frozen=True)
class Service:
    """running: daemon -> process id, None where it does not run. waits_for: None where the service answers.

    problem: why neither is known.
    """

    running: dict[str, int | None] = field(default_factory=dict)
    waits_for: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Suite:
    """The suite at one moment. programs: of each of PROGRAMS those that run or have died."""

    at: datetime
    services: dict[str, Service]
    programs: dict[str, list[Program]]
    required: tuple[str, ...]

    def wrong(self) -> list[tuple[str, str]]:
        """What is wrong: the part of the suite, and what, in words."""
        return [*self._wrong_services(), *self._wrong_programs()]

    def _wrong_services(self) -> Iterator[tuple[str, str]]:
        for name, service in self.services.items():
            runs = any(service.running.values())
            if service.problem:
                yield name, service.problem
                continue
            if service.waits_for is not None and (runs or name in self.required):
                yield name, f"waits for {service.waits_for}" if runs else f"is not running: scripts/services up {name}"
            for daemon, pid in service.running.items():
                if runs and pid is None:
                    yield name, f"{daemon} is not running: scripts/services up {name}"

    def _wrong_programs(self) -> Iterator[tuple[str, str]]:
        for name, seen in self.programs.items():
            if not seen and name in REQUIRED:
                yield name, f"is not running: {PROGRAMS[name]}"
            for program in seen:
                if program.status is None:
                    yield name, str(program.problem)
                else:
                    yield from ((name, str(trouble)) for trouble in program.status.get("trouble", ()))


def look(settings: Settings) -> Suite:
    """The suite as it is now; takes at most PATIENCE_SECONDS."""
    until = time.monotonic() + PATIENCE_SECONDS
    services = {name: _asked(partial(_service, settings, name)) for name in NAMES}
    known = addresses(settings.state_dir)
    if not any(address.program == "streaming" for address in known):
        known += _stream_elsewhere(settings)
    programs = {address: _asked(partial(_program, address)) for address in known}
    asked: list[Future[Any]] = [*services.values(), *programs.values()]
    wait(asked, max(0.0, until - time.monotonic()))
    seen = [
        answer.result()
        if answer.done()
        else Program(address, None, f"process {address.pid} has not answered at {address.url}")
        for address, answer in programs.items()
    ]
    return Suite(
        datetime.now(UTC),
        {
            name: answer.result() if answer.done() else Service(problem=f"no answer in {PATIENCE_SECONDS:g} s")
            for name, answer in services.items()
        },
        {name: [program for program in seen if program.address.program == name] for name in PROGRAMS},
        tuple(_required(settings)),
    )


def _required(settings: Settings) -> Iterator[str]:
    """The services without which this suite does not work, as far as they are on this machine."""
    if settings.kafka_bootstrap_servers == f"{LOOPBACK}:{settings.kafka_port}":
        yield "kafka"
    if settings.lake_root.startswith(f"hdfs://{LOOPBACK}:{settings.namenode_port}/"):
        yield "hdfs"


def _asked(question: Callable[[], Answer]) -> Future[Answer]:
    """The answer, some time. The thread does not keep the process from ending."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # noqa: BLE001 - whoever takes the answer gets it
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _service(settings: Settings, name: str) -> Service:
    try:
        found = states(settings, [name])
    except ServiceError as error:
        return Service(problem=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the others' states are shown
        return Service(problem=f"its state cannot be seen: {type(error).__name__}: {error}")
    return Service({state.daemon: state.pid for state in found}, found[0].waits_for)


def _program(address: Address) -> Program:
    try:
        code, content = ask(f"{address.url}/status")
        status = json.loads(content)
        if code == 200 and isinstance(status, dict) and status.get("pid") == address.pid:
            return Program(address, status)
        problem = f"process {address.pid} answers with HTTP {code} at {address.url}"
    except (OSError, ValueError) as error:
        problem = f"process {address.pid} does not answer at {address.url}: {error}"
    if not address.is_alive:
        problem = f"process {address.pid} has ended, and not by itself: it was killed, or the machine was"
    return Program(address, None, problem)


def _stream_elsewhere(settings: Settings) -> list[Address]:
    """The streaming job of this lake where it has no state folder: on YARN."""
    url = f"http://{LOOPBACK}:{settings.stream_metrics_port}"
    try:
        status = json.loads(ask(f"{url}/status", 2)[1])
        if (status["program"], status["lake"]) == ("streaming", settings.lake_root):
            return [Address("streaming", int(status["pid"]), 0.0, url)]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return []


# For people


def page(suite: Suite) -> str:
    """The suite on one screen."""
    wrong = suite.wrong()
    number = {0: "nothing is wrong", 1: "one thing is wrong"}.get(len(wrong), f"{len(wrong)} things are wrong")
    lines = [f"Tickhouse, {suite.at:%Y-%m-%d %H:%M:%S} UTC: {number}"]
    lines += [f"! {part:<10} {what}" for part, what in wrong]
    lines += ["", *(f"  {part:<10} {text}" for part, text in _rows(suite))]
    # A text from outside moves no cursor.
    return "\n".join("".join(each if each.isprintable() else "?" for each in line) for line in lines)


def _rows(suite: Suite) -> Iterator[tuple[str, str]]:
    """From the venue to gold and to alerts, then what they stand on."""
    yield from _program_rows(suite, "ingestion", _ingestion)
    yield "kafka", _state(suite.services["kafka"])
    yield from _program_rows(suite, "streaming", _streaming)
    yield from _program_rows(suite, "alerting", _alerting)
    yield from _program_rows(suite, "notifier", _notifier)
    yield from ((name, _state(service)) for name, service in suite.services.items() if name != "kafka")


def _program_rows(
    suite: Suite, name: str, rows: Callable[[Status], Iterable[tuple[str, str]]]
) -> Iterator[tuple[str, str]]:
    if not suite.programs[name]:
        yield name, "not running"
    for program in suite.programs[name]:
        if program.status is None:
            yield name, str(program.problem)
            continue
        try:
            shown = list(rows(program.status))
        except (KeyError, TypeError, ValueError):
            shown = [(name, "is of another version than scripts/status")]
        yield from shown
        yield from (("", f"note: {note}") for note in program.status.get("notes", ()))


def _process(status: Status) -> str:
    return f"process {status['pid']}, {_ago(status['seconds'])}, {_megabytes(status['memory_bytes'])}"


def _ingestion(status: Status) -> Iterator[tuple[str, str]]:
    for name, feed in status["feeds"].items():
        up = "not connected"
        if feed["sockets_up"]:
            connected = f"{feed['sockets_up']} of {feed['sockets']} connections up"
            up = f"{connected}, last tick {feed['tickless_seconds']:.1f} s ago"
        yield "venue", f"{name}: {up}; {feed['ticks']:,} ticks, {feed['rejected']:,} rejected, {feed['gaps_open']} gaps"
    yield (
        "ingestion",
        f"{_process(status)}; {status['undelivered']:,} messages in the spool, the oldest"
        f" {status['spool_age_seconds']:.1f} s; {status['lag_seconds'] * 1e3:.0f} ms to Kafka",
    )


def _streaming(status: Status) -> Iterator[tuple[str, str]]:
    jvm = status["jvm_resident_memory_bytes"]
    memory = f" and {_megabytes(jvm)} of the JVM" if jvm else ""
    yield "streaming", f"{_process(status)}{memory}; epoch {status['epoch']}; {status['lag_records']:,} records to go"
    if last := status["last_batch"]:
        batches = status["recent_batches"]
        mean = f", {status['recent_batch_seconds'] / batches:.2f} s each" if batches else ""
        yield (
            "",
            f"micro-batch {last['number']:,} ended {_ago(last['seconds_ago'])} ago; in the last minute {batches:,}"
            f" of them{mean}, {status['recent_records'] / 60:,.0f} records/s",
        )
    if upkeep := status["upkeep"]:
        yield (
            "",
            f"upkeep: {upkeep['joined_files']:,} files joined, {upkeep['deleted_data_files']:,} deleted;"
            f" {upkeep['debt_files']:,} wait",
        )
    now = time.time()
    for name, table in status["tables"].items():
        committed, freshness = table["commit_timestamp_seconds"], table["freshness_seconds"]
        text = "no commit yet" if committed is None else f"committed {_ago(now - committed)} ago"
        fresh = "" if freshness is None else f", {freshness:.1f} s after the receipt"
        files = "" if table["files"] is None else f"; {table['files']:,} files"
        log = "" if table["log_files"] is None else f", {table['log_files']:,} commits since the log's checkpoint"
        database, _, table_name = name.partition(".")
        yield database, f"{table_name:<14} {text}{fresh}{files}{log}"


def _alerting(status: Status) -> Iterator[tuple[str, str]]:
    last = status["last_record_timestamp_seconds"]
    newest = "no record yet" if last is None else f"newest record {_ago(time.time() - last)} old"
    yield (
        "alerting",
        f"{_process(status)}; {newest}, {status['lag_records']:,} to go; {status['opened']:,} alerts opened,"
        f" {status['closed']:,} closed",
    )


def _notifier(status: Status) -> Iterator[tuple[str, str]]:
    yield "notifier", _process(status)
    for name, channel in status["channels"].items():
        oldest = f", the oldest for {_ago(channel['waiting_seconds'])}" if channel["waiting_seconds"] else ""
        error = f"; last error: {channel['last_error']}" if channel["last_error"] else ""
        yield (
            "",
            f"{name}: {channel['sent']:,} sent, {channel['refused']:,} refused, {channel['stale']:,} given up,"
            f" {channel['waiting']:,} wait{oldest}{error}",
        )


def _state(service: Service) -> str:
    if service.problem:
        return service.problem
    if not any(service.running.values()):
        return "not running"
    pids = ", ".join(f"{daemon} {pid or 'not running'}" for daemon, pid in service.running.items())
    return f"{'answers' if service.waits_for is None else f'waits for {service.waits_for}'}; {pids}"


def _ago(seconds: float) -> str:
    """A time span for people, to two digits or so."""
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def as_json(suite: Suite) -> str:
    """The suite for other programs."""
    content = {
        "at": suite.at.isoformat(),
        "wrong": [{"part": part, "what": what} for part, what in suite.wrong()],
        "services": {name: asdict(service) for name, service in suite.services.items()},
        "programs": {name: [asdict(program) for program in seen] for name, seen in suite.programs.items()},
    }
    return json.dumps(content, indent=2)


def watch(settings: Settings) -> Suite:
    """Show the suite again and again, until Ctrl-C. Returns what was shown last."""
    console = Console()
    suite = look(settings)
    with Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else nullcontext() as screen:
        try:
            while True:
                if screen is None:
                    print(page(suite), flush=True)
                else:
                    screen.update(Text(page(suite)), refresh=True)
                time.sleep(REFRESH_SECONDS)
                suite = look(settings)
        except KeyboardInterrupt:
            return suite


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, "state_dir")
    parser.prog = "scripts/status"
    parser.add_argument("--json", action="store_true", help="for programs: what each of ours says, as JSON")
    parser.add_argument("--watch", action="store_true", help=f"look again every {REFRESH_SECONDS:g} s, until Ctrl-C")
    settings, options = from_command_line(parser, argv)
    suite = watch(settings) if options.watch else look(settings)
    if not options.watch:
        print(as_json(suite) if options.json else page(suite))
    return 1 if suite.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
