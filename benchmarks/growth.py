"""What the minutes of a soak say: the table, the verdict on growth, and what a day would leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

# A figure may be so many times as large at the end as in the middle.
GROWTH_BOUND = 1.3
# count(*) takes less than so many seconds, cold.
QUERY_LIMIT = 0.5
# Delays to gold may be so many times as long as in another run.
DELAY_BOUND = 1.1
# In a shorter run the middle and the end are the same.
FEWEST_MINUTES = 4
DAY_MINUTES = 1_440
# A file, its block and its name in the NameNode's heap: some 150 bytes an object, as HDFS's own guides reckon.
HEAP_BYTES_A_FILE = 500


@dataclass(frozen=True)
class Minute:
    """A minute of a soak.

    Delays, durations: seconds; None: there were none, or they were not measured. data_files: all in the tables'
    folders; live_files: those of the newest versions. commits, written_files, written_log_bytes: of this minute alone,
    by all tables. heap_mb: the least of the minute. Queries are cold.
    """

    minute: int
    micro_batches: int
    micro_batch_seconds: float | None
    frame_to_gold_p50: float | None
    frame_to_gold_p99: float | None
    files: int
    data_files: int
    live_files: int
    log_files: int
    log_bytes: int
    namenode_files: int
    heap_mb: float | None
    jvm_mb: float
    python_mb: float
    cpu_cores: float
    commits: int
    written_files: float
    written_log_bytes: float
    silver_seconds: float | None = None
    minutes_seconds: float | None = None

    @property
    def driver_mb(self) -> float:
        """Resident memory of the driver's JVM and Python."""
        return self.jvm_mb + self.python_mb


# Title and text of each column.
COLUMNS: dict[str, Callable[[Minute], str]] = {
    "minute": lambda row: str(row.minute),
    "batches": lambda row: f"{row.micro_batches:,}",
    "batch s": lambda row: _seconds(row.micro_batch_seconds),
    "p50 s": lambda row: _seconds(row.frame_to_gold_p50),
    "p99 s": lambda row: _seconds(row.frame_to_gold_p99),
    "files": lambda row: f"{row.files:,}",
    "data": lambda row: f"{row.data_files:,}",
    "live": lambda row: f"{row.live_files:,}",
    "log": lambda row: f"{row.log_files:,}",
    "log MB": lambda row: f"{row.log_bytes / 1e6:.1f}",
    "NN files": lambda row: f"{row.namenode_files:,}",
    "NN heap MB": lambda row: "-" if row.heap_mb is None else f"{row.heap_mb:.0f}",
    "JVM MB": lambda row: f"{row.jvm_mb:.0f}",
    "Python MB": lambda row: f"{row.python_mb:.0f}",
    "cores": lambda row: f"{row.cpu_cores:.2f}",
    "silver s": lambda row: _seconds(row.silver_seconds),
    "gold 1m s": lambda row: _seconds(row.minutes_seconds),
}
WIDTH = 11


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"


def header() -> str:
    return "".join(title.rjust(WIDTH) for title in COLUMNS)


def line(row: Minute) -> str:
    """A minute as a line of the table."""
    return "".join(text(row).rjust(WIDTH) for text in COLUMNS.values())


@dataclass(frozen=True)
class Verdict:
    """holds: None where the run was too short to tell."""

    what: str
    holds: bool | None
    why: str

    def __str__(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "----"}[self.holds]
        return f"{word}  {self.what}: {self.why}"


@dataclass(frozen=True)
class Series:
    """A figure that must not grow. of_window: makes one value of a window's."""

    what: str
    unit: str
    value: Callable[[Minute], float | None]
    of_window: Callable[[Sequence[float]], float] = median


FILES = Series("files in HDFS", "", lambda row: row.files)
# The heap saw-tooths between collections, so the least is nearest to what the NameNode needs.
HEAP = Series("NameNode's heap", " MB", lambda row: row.heap_mb, min)
DRIVER = Series("driver's memory", " MB", lambda row: row.driver_mb)
SILVER = Series("count(*) of silver.ticks", " s", lambda row: row.silver_seconds)
MINUTES = Series("count(*) of a day of gold.price_1m", " s", lambda row: row.minutes_seconds)
BOUNDED = (FILES, HEAP, DRIVER, SILVER, MINUTES)


def around(rows: Sequence[Minute], series: Series, until: int) -> float | None:
    """The series at a minute: of the tenth of the run that ends with it, or else the last value before."""
    width = max(1, len(rows) // 10)
    values = [(row.minute, value) for row in rows if row.minute <= until and (value := series.value(row)) is not None]
    window = [value for minute, value in values if minute > until - width] or [value for _, value in values[-1:]]
    return series.of_window(window) if window else None


def growth(rows: Sequence[Minute]) -> list[Verdict]:
    """For each figure whether it is at the end at most GROWTH_BOUND times that of the middle."""
    return [_growth_of(rows, series) for series in BOUNDED]


def _growth_of(rows: Sequence[Minute], series: Series) -> Verdict:
    if len(rows) < FEWEST_MINUTES:
        return Verdict(series.what, None, f"{len(rows)} minutes are too few to tell growth: {FEWEST_MINUTES} do")
    middle, end = len(rows) // 2, len(rows)
    before, after = around(rows, series, middle), around(rows, series, end)
    if before is None or after is None:
        return Verdict(series.what, False, "was not measured")
    times = after / before if before else float("inf") if after else 1.0
    why = (
        f"{after:,.4g}{series.unit} in minute {end}, {before:,.4g}{series.unit} in minute {middle}: x {times:.2f}"
        f" (bound {GROWTH_BOUND})"
    )
    return Verdict(series.what, times <= GROWTH_BOUND, why)


def fast_queries(rows: Sequence[Minute]) -> list[Verdict]:
    """For each query whether it takes less than QUERY_LIMIT at the end."""
    verdicts = []
    for series in (SILVER, MINUTES):
        seconds = around(rows, series, len(rows))
        why = "was not measured" if seconds is None else f"{seconds:.3f} s (below {QUERY_LIMIT})"
        verdicts.append(Verdict(f"{series.what}, cold", seconds is not None and seconds < QUERY_LIMIT, why))
    return verdicts


def as_fresh(rows: Sequence[Minute], others: Sequence[Minute]) -> list[Verdict]:
    """Whether p50 and p99 in the second half are at most DELAY_BOUND times another run's."""
    delays = (
        Series("p50 from frame to gold, beside the other run", " s", lambda row: row.frame_to_gold_p50),
        Series("p99 from frame to gold, beside the other run", " s", lambda row: row.frame_to_gold_p99),
    )
    return [_as_fresh(rows, others, series) for series in delays]


def _as_fresh(rows: Sequence[Minute], others: Sequence[Minute], series: Series) -> Verdict:
    ours, theirs = (
        [value for row in of[len(of) // 2 :] if (value := series.value(row)) is not None] for of in (rows, others)
    )
    if not ours or not theirs:
        return Verdict(series.what, False, "was not measured")
    times = median(ours) / median(theirs)
    why = f"{median(ours):.3f} s, {median(theirs):.3f} s there: x {times:.2f} (bound {DELAY_BOUND})"
    return Verdict(series.what, times <= DELAY_BOUND, why)


def cpu_seconds_a_million(rows: Sequence[Minute], rate: float) -> float:
    """The job's CPU seconds per million ticks, in the second half. rate: ticks a second."""
    return fmean(row.cpu_cores for row in rows[len(rows) // 2 :]) / rate * 1e6


@dataclass(frozen=True)
class Day:
    """What a day at this load leaves, if old versions stay readable for horizon_minutes; see `day`."""

    horizon_minutes: float
    data_files: int
    log_files: int
    other_files: int
    files: int
    log_bytes: int
    heap_mb: float | None
    files_if_growth_goes_on: int

    def __str__(self) -> str:
        heap = "-" if self.heap_mb is None else f"{self.heap_mb:,.0f} MB"
        return (
            f"A day at this load, if upkeep follows, old versions readable for {self.horizon_minutes:g} minutes: "
            f"{self.files:,} files "
            f"({self.data_files:,} of data, {self.log_files:,} of logs, {self.other_files:,} others), "
            f"{self.log_bytes / 1e6:,.1f} MB of log, NameNode's heap {heap}.\n"
            "  data files  = data files written a minute x horizon + live files at the end + their growth a minute x "
            "the day's minutes left\n"
            "  log files   = commits a minute x horizon; other files: those at the end and their growth\n"
            "  log bytes   = bytes of commits a minute x horizon + checkpoints x (horizon / the run's)^2: each holds "
            "the removed files of the horizon, and as many checkpoints are kept\n"
            f"  heap        = heap at the end + {HEAP_BYTES_A_FILE} bytes for each file more\n"
            f"  If files grow all day as from the run's middle to its end: {self.files_if_growth_goes_on:,} files."
        )


def day(rows: Sequence[Minute], run_horizon: float, horizon_minutes: float) -> Day:
    """Extrapolate to a day. run_horizon: the horizon of the run in minutes; rates are of its second half."""
    later, last = rows[len(rows) // 2 :], rows[-1]
    left = DAY_MINUTES - last.minute
    written = fmean(row.written_files for row in later)
    commits = fmean(row.commits for row in later)
    commit_bytes = fmean(row.written_log_bytes for row in later)

    def later_too(value: Callable[[Minute], float]) -> float:
        """The value at the day's end, if it grows as in the second half. Never less than at the run's end."""
        first = later[0]
        slope = (value(last) - value(first)) / (last.minute - first.minute) if last is not first else 0.0
        return value(last) + max(0.0, slope) * left

    data_files = round(written * horizon_minutes + later_too(lambda row: row.live_files))
    log_files = round(commits * horizon_minutes)
    other_files = round(later_too(lambda row: row.files - row.data_files - row.log_files))
    files = data_files + log_files + other_files
    checkpoints = max(0.0, last.log_bytes - commit_bytes * min(run_horizon, last.minute))
    log_bytes = commit_bytes * horizon_minutes + checkpoints * (horizon_minutes / run_horizon) ** 2
    heap = around(rows, HEAP, len(rows))
    return Day(
        horizon_minutes=horizon_minutes,
        data_files=data_files,
        log_files=log_files,
        other_files=other_files,
        files=files,
        log_bytes=round(log_bytes),
        heap_mb=None if heap is None else heap + max(0, files - last.files) * HEAP_BYTES_A_FILE / 1e6,
        files_if_growth_goes_on=round(later_too(lambda row: row.files)),
    )
