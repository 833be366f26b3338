"""Draw the minutes of a soak as small charts, one below the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.growth import Minute

# Title of each chart, and the curves in it.
CHARTS: Mapping[str, Mapping[str, Callable[[Minute], float | None]]] = {
    "files": {
        "in HDFS": lambda row: row.files,
        "data": lambda row: row.data_files,
        "live": lambda row: row.live_files,
        "log": lambda row: row.log_files,
    },
    "NameNode's heap, MB": {"least of a minute": lambda row: row.heap_mb},
    "driver's memory, MB": {"JVM": lambda row: row.jvm_mb, "Python": lambda row: row.python_mb},
    "cold query, s": {
        "count of silver.ticks": lambda row: row.silver_seconds,
        "count of a day of gold.price_1m": lambda row: row.minutes_seconds,
    },
    "frame to gold, s": {"p50": lambda row: row.frame_to_gold_p50, "p99": lambda row: row.frame_to_gold_p99},
    "processor cores": {"job": lambda row: row.cpu_cores},
}


def draw(rows: Sequence[Minute], title: str, path: Path) -> None:
    """Write the charts to a PNG file, in folders that this makes."""
    figure = Figure(figsize=(11, 1.9 * len(CHARTS)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(CHARTS), 1, sharex=True)
    for chart, (name, curves) in zip(axes, CHARTS.items(), strict=True):
        for label, value in curves.items():
            points = [(row.minute, measured) for row in rows if (measured := value(row)) is not None]
            chart.plot([minute for minute, _ in points], [y for _, y in points], marker=".", label=label)
        chart.set_ylabel(name)
        chart.set_ylim(0, 1.1 * max(chart.dataLim.y1, 1e-3))
        chart.grid(alpha=0.3)
        chart.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes[-1].set_xlabel("minute")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
