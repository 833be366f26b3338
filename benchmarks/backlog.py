"""This suite beside others, on the same backlog of ticks: `scripts/bench [--ticks 1000000]`

Fills a topic with ticks as an ingester sends them, 2,000 to a second of a simulated market, and lets each contestant
read it from beginning to end, one after the other:

suite    ./spark-submit.sh streaming/ticks.py --once: bronze, silver and all of gold as Delta tables on HDFS
floor    benchmarks/floor.py, a hand-written confluent-kafka + polars + deltalake consumer: bronze, silver and
         gold.price_1m as Delta tables on the local disk
pathway  benchmarks/with_pathway.py: ticks and minutes as lines of JSON on the local disk

What each has written is held against the topic: as many ticks, and the same minutes as the others'.

Prints a table, and one line of JSON. ticks/s counts the whole process, and again from its first read to its end: most
of a short run of the suite is Spark's start. Processor seconds (user and system) are those of all processes of a
contestant (benchmarks/cost.py), and beside them those of Kafka's and HDFS's daemons meanwhile, where they are this
checkout's. Memory is the most that is resident at one time. At the end topics, lake and files are removed, and the
services that were started are stopped.

Exit codes: 0 all contestants did the job, 1 one did not, 2 a wrong setting, 6 not set up.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hdfs
import psutil
from kafka import KafkaAdminClient

import services
from benchmarks.contestants import PYTHON, Contestant, Floor, Pathway, Suite, Windows
from conf.settings import PROJECT, Settings, arguments, from_command_line, settings_file
from ingestion.feeds import make_feed
from ingestion.publisher import publisher
from ingestion.ticks import Tick
from simulator.dialects import Listing
from simulator.dialects.binance import Binance
from simulator.market import trades

NOT_SET_UP = 6
SERVICES = ("kafka", "hdfs")
PACE = 2_000
OPENED_MS = 1_700_000_000_000
# From a trade to its receipt.
UNDERWAY_NS = 30_000_000
# A sum of floats differs from the sum of decimals.
TOLERANCE = 1e-9


class WrongResult(RuntimeError):
    """A contestant ended otherwise than with the job done."""


def ticks(assets: Sequence[str], count: int) -> Iterator[Tick]:
    """Of the simulated market, as ingestion makes them of its frames."""
    feed = make_feed("binance", assets)
    market = islice(trades(assets, PACE, seed=1), count)
    for frame in Binance(Listing("binance", list(assets))).frames(market, OPENED_MS):
        received_ns = OPENED_MS * 1_000_000 + frame.at_ns + UNDERWAY_NS
        yield from (event for event in feed.receive(frame.text.encode(), received_ns) if isinstance(event, Tick))


async def fill(settings: Settings, count: int) -> None:
    """Create the topics, and send the ticks."""
    kafka = publisher(settings.model_copy(update={"kafka_client": "confluent-kafka"}))
    await kafka.start()
    for number, tick in enumerate(ticks(settings.assets, count)):
        await kafka.send(settings.ticks_topic, tick.key, tick.to_json("benchmark", number))
    await kafka.flush(600)
    await kafka.close()
    if kafka.published != count:
        raise WrongResult(f"{kafka.published} of {count} ticks are in Kafka")


def services_cpu(settings: Settings) -> float | None:
    """Processor seconds of Kafka's and HDFS's daemons since they were started; None where they are not ours."""
    pids = [state.pid for state in services.states(settings, SERVICES)]
    if None in pids:
        return None
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(spent.user + spent.system for spent in times)


def run(contestant: Contestant, settings: Settings, count: int, log: Path) -> dict[str, Any]:
    """Let it do the job; what that cost. Raises WrongResult."""
    before = services_cpu(settings)
    # Pathway's settings in the environment here would change what is compared, or send telemetry.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PATHWAY_")}
    environment |= contestant.environment
    command = [sys.executable, "-m", "benchmarks.cost", *contestant.command]
    with log.open("w", encoding="utf-8") as output:
        ran = subprocess.run(
            command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, check=True
        )
    after = services_cpu(settings)
    figures = json.loads(ran.stdout)
    log_text = log.read_text(encoding="utf-8", errors="replace")
    if figures.pop("exit_code"):
        raise WrongResult(f"{contestant.name} failed; its log ends:\n{log_text[-3_000:]}")
    if set(rows := contestant.rows()) != {count}:
        raise WrongResult(f"{contestant.name} wrote {rows} ticks, not {count}")
    figures |= contestant.own_figures(log_text)
    cpu_of_services = None if before is None or after is None else after - before
    return {
        "contestant": contestant.name,
        "ticks_a_second": round(count / figures["seconds"]),
        "ticks_a_second_from_first_read": round(count / figures["first_read_to_end"]),
        "cpu_seconds_a_million": round(figures["cpu_seconds"] / count * 1e6, 1),
        "services_cpu_seconds_a_million": cpu_of_services and round(cpu_of_services / count * 1e6, 1),
        **figures,
    }


def check(name: str, windows: Windows, others: Windows, count: int) -> None:
    """Raises WrongResult where minutes lack ticks, or differ from another contestant's."""
    if (counted := sum(window["tick_count"] for window in windows.values())) != count:
        raise WrongResult(f"{name}'s minutes have {counted:.0f} ticks, not {count}")
    if different := sorted(windows.keys() ^ others.keys()):
        raise WrongResult(f"{name} has other minutes than those before it: {different[0]} and more")
    for key, window in windows.items():
        for figure in window.keys() & others[key].keys():
            if not math.isclose(window[figure], others[key][figure], rel_tol=TOLERANCE):
                raise WrongResult(f"{key}: {figure} is {window[figure]} of {name}, {others[key][figure]} before it")


COMPARED = {
    "ticks_a_second": "ticks/s",
    "ticks_a_second_from_first_read": "from first read",
    "cpu_seconds_a_million": "CPU s/million",
    "services_cpu_seconds_a_million": "of services",
    "peak_mb": "peak MB",
}


def ratios(figures: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, float]:
    """How many times a contestant's figures are another's."""
    return {name: round(figures[name] / of[name], 3) for name in COMPARED if figures[name] and of[name]}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """For people: each contestant's figures, and below them how many times the first one's they are."""
    lines = ["".join([f"{'':10}", *(f"{title:>18}" for title in COMPARED.values())])]
    for result in results:
        figures = ["-" if result[name] is None else f"{result[name]:,}" for name in COMPARED]
        lines.append("".join([f"{result['contestant']:10}", *(f"{figure:>18}" for figure in figures)]))
        if times := result.get("times"):
            cells = [f"x {times[name]:.2f}" if name in times else "" for name in COMPARED]
            lines.append("".join([f"{'':10}", *(f"{figure:>18}" for figure in cells)]))
    return "\n".join(lines)


@contextmanager
def started(settings: Settings, names: Sequence[str] = SERVICES) -> Iterator[None]:
    """The services run; in the end those that did not run before are stopped. Raises ServiceError."""
    running = {state.service for state in services.states(settings, names) if state.pid is not None}
    ours = [service for service in names if service not in running]
    try:
        services.up(settings, names)
        yield
    finally:
        if ours:
            services.down(settings, ours)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *("kafka_bootstrap_servers", "lake_root", "webhdfs_url", "state_dir", "assets", "max_offsets_per_trigger"),
    )
    parser.prog = "scripts/bench"
    parser.add_argument("--ticks", type=int, default=1_000_000, metavar="N", help="default: 1000000")
    parser.add_argument("--only", default="suite,floor,pathway", metavar="NAMES", help="default: suite,floor,pathway")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--keep", action="store_true", help="remove neither topics nor what was written")
    settings, own = from_command_line(parser, argv)
    name = uuid.uuid4().hex[:8]
    topics = {key: f"benchmark-{key.split('_')[0]}-{name}" for key in ("ticks_topic", "rejects_topic", "gaps_topic")}
    settings = settings.model_copy(update={**topics, "lake_root": f"{settings.lake_root}-benchmark-{name}"})
    folder = settings.state_dir / "benchmark" / name
    contestants = {
        "suite": Suite(settings, settings_file(os.environ, own.conf).resolve()),
        "floor": Floor(settings, folder / "floor"),
        "pathway": Pathway(settings, folder / "pathway"),
    }
    chosen = [word for word in contestants if word in own.only.split(",")]
    if len(chosen) != len(own.only.split(",")):
        parser.error(f"--only {own.only}: write some of {','.join(contestants)}")
    if chosen != ["suite"] and not PYTHON.exists():
        say(f"there is no {PYTHON}: run scripts/bench, which makes it")
        return NOT_SET_UP
    results: list[dict[str, Any]] = []
    with ExitStack() as cleanup:
        cleanup.enter_context(started(settings))
        if not own.keep:
            cleanup.callback(remove, settings, list(topics.values()), folder)
        folder.mkdir(parents=True)
        say(f"filling {settings.ticks_topic} with {own.ticks} ticks")
        asyncio.run(fill(settings, own.ticks))
        before: Windows = {}
        try:
            for word in chosen:
                say(f"{word}: {' '.join(contestants[word].command)}")
                results.append(run(contestants[word], settings, own.ticks, folder / f"{word}.log"))
                windows = contestants[word].windows()
                check(word, windows, before or windows, own.ticks)
                before = before or windows
        except WrongResult as error:
            say(f"scripts/bench: {error}")
            return 1
    for result in results[1:]:
        result["times"] = ratios(result, results[0])
    if not own.json:
        print(f"{own.ticks:,} ticks, {settings.kafka_partitions} partitions, {os.cpu_count()} cores\n")
        print(table(results), end="\n\n")
    print(
        json.dumps(
            {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "ticks": own.ticks,
                "cores": os.cpu_count(),
                "results": results,
            }
        )
    )
    return 0


def remove(settings: Settings, topics: list[str], folder: Path) -> None:
    """What a run leaves."""
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers.split(","))
    admin.delete_topics(topics)
    admin.close()
    hdfs.InsecureClient(settings.webhdfs_url).delete(urlsplit(settings.lake_root).path, recursive=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
