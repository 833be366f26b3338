"""Show the whole suite at work: live frames to prices in SQL, on this machine.

Starts Kafka, HDFS and SQL where they do not run, a simulated venue (with --live: Binance's public feed), ingestion and
the streaming job, and shows what they do until Ctrl-C, or for DEMO_SECONDS of the environment. Then it stops what it
started; services that ran before run on. The lake and its history stay for the next time.

Exit codes: 0 ticks reached gold; 1 none did, or a program ended that should not have; 2 a wrong setting.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from impala.error import Error as SqlError
from rich.console import Console
from rich.live import Live
from thrift.transport.TTransport import TTransportException

import services
from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from demo.children import Child, Ended, start
from demo.figures import Watch
from demo.screen import page
from services.registration import AnotherLake, register_lake

REFRESH_SECONDS, PLAIN_SECONDS = 1.0, 10.0
TRADES_PER_SECOND = "50"


class Demo:
    """What runs for the demo. Leaving it stops that, in the reverse order of starting."""

    def __init__(self, settings: Settings, conf: Path | None) -> None:
        self.settings = settings
        self._conf = () if conf is None else ("--conf", str(conf))
        self._cleanup = ExitStack()
        self._children: list[Child] = []
        self._sql_thread = ThreadPoolExecutor(1)
        self._registered: Future[int] | None = None

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *error: object) -> None:
        print("stopping what the demo started", file=sys.stderr, flush=True)
        # A server that is just starting must be there to be stopped.
        self._sql_thread.shutdown()
        self._cleanup.close()

    def start_services(self, *names: str) -> None:
        """Start the services that do not run; only those are stopped at the end. Raises ServiceError."""
        running = {state.service for state in services.states(self.settings, names) if state.pid is not None}
        ours = [name for name in names if name not in running]
        if ours:
            self._cleanup.callback(services.down, self.settings, ours)
        services.up(self.settings, names)

    def start_programs(self, live: bool) -> Watch:
        """Start venue, ingestion and streaming; what watches them. Raises Ended."""
        python = sys.executable
        url: tuple[str, ...] = ()
        if not live:
            market = ("--rate", TRADES_PER_SECOND, "--assets", ",".join(self.settings.assets))
            venue = self._start("venue", [python, "-m", "simulator", *market])
            while not (lines := venue.log.read_text(encoding="utf-8")).endswith("\n"):
                venue.check()
                time.sleep(0.05)
            url = ("--url", json.loads(lines.splitlines()[0])["url"])
        ingestion = self._start("ingestion", [python, "-m", "ingestion", *self._conf, *url])
        self._start("streaming", ["./spark-submit.sh", "streaming/ticks.py", *self._conf])
        watch = Watch(self.settings, ingestion.log, datetime.now(UTC))
        self._cleanup.callback(watch.close)
        return watch

    def _start(self, name: str, command: Sequence[str]) -> Child:
        child = start(name, command, self.settings.state_dir / "demo")
        self._cleanup.callback(child.stop)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises Ended if a program has ended."""
        for child in self._children:
            child.check()

    def serve_sql(self) -> None:
        """Start SQL beside all else and register the tables, unless that is under way."""
        if self._registered is None:
            self._registered = self._sql_thread.submit(self._serve_sql)

    def _serve_sql(self) -> int:
        self.start_services("sql")
        return register_lake(self.settings)

    def how_to_query(self) -> list[str]:
        """Lines that say how to query by SQL, or why not yet."""
        if self._registered is None:
            return ["The first row of gold takes half a minute; then SQL starts."]
        if not self._registered.done():
            return ["SQL: the Thrift Server starts"]
        try:
            number = self._registered.result()
        except (AnotherLake, SqlError, TTransportException, services.ServiceError) as error:
            return [f"SQL: {error}"]
        url = f"jdbc:hive2://{self.settings.sql_host}:{self.settings.sql_port}"
        return [
            f"SQL: {number} tables of the databases bronze, silver, gold and quality at {url}",
            f"  scripts/beeline -u {url} -e 'SELECT asset, price_usd FROM gold.current_price'",
        ]


def show(demo: Demo, watch: Watch, seconds: float, began: float, stop: threading.Event) -> bool:
    """Show the figures until told to stop; whether ticks reached gold. Raises Ended."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    deadline = time.monotonic() + seconds
    first_gold: float | None = None
    printed = 0.0
    with Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else ExitStack() as screen:
        while True:
            demo.check()
            figures = watch.look()
            now = time.monotonic()
            if figures.gold_rows and first_gold is None:
                first_gold = now - began
                demo.serve_sql()
            is_last = stop.is_set() or now >= deadline
            content = page(figures, _title(now - began, first_gold), demo.how_to_query())
            if isinstance(screen, Live):
                screen.update(content, refresh=True)
            elif is_last or now - printed >= PLAIN_SECONDS:
                console.print(content)
                printed = now
            if is_last:
                return first_gold is not None
            stop.wait(REFRESH_SECONDS)


def _title(elapsed: float, first_gold: float | None) -> str:
    gold = "none in gold yet" if first_gold is None else f"first row of gold after {first_gold:.0f} s"
    return f"Tickhouse, {elapsed:.0f} s: {gold}"


def seconds_to_run() -> float:
    """DEMO_SECONDS of the environment; without it infinity: until Ctrl-C. Raises ValueError."""
    text = os.environ.get("DEMO_SECONDS", "inf")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"DEMO_SECONDS = {text!r}: not a number of seconds above 0")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = arguments(__doc__)
    parser.prog = "scripts/demo"
    parser.add_argument("--live", action="store_true", help="the real Binance feed instead of a simulated venue")
    settings, options = from_command_line(parser, argv)
    try:
        seconds = seconds_to_run()
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        with Demo(settings, options.conf) as demo:
            demo.start_services("kafka", "hdfs")
            watch = demo.start_programs(options.live)
            reached_gold = show(demo, watch, seconds, began, stop)
    except (Ended, services.ServiceError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if not reached_gold:
        print(f"{parser.prog}: no tick reached gold; see {settings.state_dir / 'demo'}", file=sys.stderr)
    return 0 if reached_gold else 1


if __name__ == "__main__":
    sys.exit(main())
