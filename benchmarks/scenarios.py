"""A scenario of benchmarks/instruments.py: its load, its job from start to end, and its row of figures."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import batch_figures, find_difference, gold_figures, read_gold_commits
from benchmarks.job import Usage
from benchmarks.load import Shape
from benchmarks.run import JobFailed, Run
from conf.settings import Settings

ODD_SHARE, REPEAT_SHARE = 0.002, 0.01
SHARES = {
    None: (0.0, 0.0),
    "odd": (ODD_SHARE, 0.0),
    "repeats": (0.0, REPEAT_SHARE),
    "both": (ODD_SHARE, REPEAT_SHARE),
}
EXACT = "exact"


@dataclass(frozen=True)
class Scenario:
    name: str
    shape: Shape
    restart: bool


def parse_scenario(name: str) -> Scenario:
    """Raises ValueError."""
    match = re.fullmatch(r"(restart-)?([1-9]\d{0,5})(?:\+(odd|repeats|both))?", name)
    if match is None:
        raise ValueError(f"{name!r} is no scenario: write N, N+odd, N+repeats, N+both, or restart- before one of these")
    return Scenario(name, Shape(int(match[2]), *SHARES[match[3]]), restart=match[1] is not None)


class Measurement:
    """The measurement of a scenario with one checkout's job."""

    def __init__(
        self,
        scenario: Scenario,
        settings: Settings,
        project: Path,
        conf: Path,
        folder: Path,
        rate: float,
        seconds: float,
    ) -> None:
        self._scenario, self._settings, self._project = scenario, settings, project
        self._seconds = seconds
        self._run = Run(scenario.name, scenario.shape, settings, project, conf, folder, rate, seconds)

    def run(self) -> dict[str, Any]:
        """Run the scenario, and return its row. Raises LoadFailed."""
        run, load = self._run, self._run.load
        try:
            run.prepare()
            cpu_before = run.look().cpu_seconds
            load.begin()
            since, restarted_at, failure = load.began, None, None
            try:
                if self._scenario.restart:
                    run.watch(lambda: time.time() >= load.began + self._seconds / 2, "half of the load")
                    since = restarted_at = run.restart()
                run.watch(lambda: not load.is_alive(), "the end of the load")
                load.check()
                run.wait_for_all()
            except JobFailed as error:
                failure = error
            ended = time.time()
            load.stop()
            usage = run.look()
            cpu_seconds = run.cpu_of_killed + usage.cpu_seconds - cpu_before
            return self._row(since, ended, restarted_at, usage, cpu_seconds, failure)
        except JobFailed as error:
            return {**self._names(), "outcome": str(error), "log": run.last_lines()}
        finally:
            load.stop()
            run.stop_job()

    def _row(
        self,
        since: float,
        ended: float,
        restarted_at: float | None,
        usage: Usage,
        cpu_seconds: float,
        failure: JobFailed | None,
    ) -> dict[str, Any]:
        """End the job, read its tables, and make the row."""
        run, market, load = self._run, self._run.market, self._run.load
        log = run.last_lines() if failure else []
        if not run.stop_job() and failure is None:
            failure = JobFailed("not ended by SIGTERM")
        batches = run.jobs[-1].micro_batches()
        outcome = str(failure) if failure else find_difference(self._settings, market) or EXACT
        return {
            **self._names(),
            **batch_figures(batches, since, ended),
            **gold_figures(read_gold_commits(self._settings), since, load.ended, restarted_at),
            "cpu_seconds_per_1000": round(cpu_seconds / max(1, market.ticks) * 1_000, 3),
            "driver_jvm_mb": round(usage.jvm_mb),
            "driver_python_mb": round(usage.python_mb),
            "micro_batches": len(run.batches()),
            "ticks": market.ticks,
            "odd": market.non_ticks,
            "repeats": market.repeats,
            "load_seconds": round(load.ended - load.began, 1),
            "outcome": outcome,
            "log": log,
        }

    def _names(self) -> dict[str, Any]:
        return {"scenario": self._scenario.name, "job": str(self._project), **asdict(self._scenario.shape)}
