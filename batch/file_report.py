"""The files of a lake's tables by size and day: as text, as JSON, and as a picture."""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import hdfs
import polars as pl

from lake.delta.checkpoint import listed
from lake.delta.files import Files, StoreUnavailable, WebHdfs
from lake.delta.inventory import Inventory
from lake.delta.log import TableLog
from lake.tables import Table

SIZES = ((64 << 10, "< 64 KiB"), (1 << 20, "< 1 MiB"), (8 << 20, "< 8 MiB"), (32 << 20, "< 32 MiB"))
LARGER = "larger"
LABELS = (*(label for _, label in SIZES), LARGER)
COLOURS = ("#b2182b", "#ef8a62", "#fddbc7", "#92c5de", "#2166ac")
# A picture shows the newest days.
DAYS_SHOWN = 60


@dataclass(frozen=True)
class TableFiles:
    """A table's files. days: by day of its rows (ISO; empty if it is unknown) and size label, the number of files."""

    table: str
    files: int
    bytes: int
    days: dict[str, dict[str, int]]
    # With replaced files, log files and what killed processes left; bytes without replicas.
    stored_files: int
    stored_bytes: int

    def of_size(self, label: str) -> int:
        """The number of live files of a size."""
        return sum(sizes.get(label, 0) for sizes in self.days.values())


def surveyed(files: Files, root: str, table: Table) -> TableFiles:
    """The files of a table. Raises StoreError, CannotWrite."""
    url = table.path(root)
    inventory = Inventory(TableLog(files, url), table)
    stored_files, stored_bytes = _stored(files, url)
    by_day: dict[str, dict[str, int]] = {}
    size = pl.lit(LARGER)
    for below, label in reversed(SIZES):
        size = pl.when(pl.col("size") < below).then(pl.lit(label)).otherwise(size)
    counts = inventory.files.group_by(inventory.day.alias("day"), size.alias("label")).len().sort("day")
    for day, label, count in counts.iter_rows():
        by_day.setdefault(day, {})[label] = count
    total = inventory.files["size"].sum()
    return TableFiles(table.qualified_name, inventory.files.height, int(total), by_day, stored_files, stored_bytes)


def _stored(files: Files, url: str) -> tuple[int, int]:
    """The number and bytes of all files under a folder."""
    if isinstance(files, WebHdfs):
        # HDFS counts by itself: a listing of a big lake would take minutes.
        client = hdfs.InsecureClient(files.webhdfs_url, user=os.environ.get("HADOOP_USER_NAME") or getpass.getuser())
        try:
            summary = client.content(urlsplit(url).path)
        except (hdfs.HdfsError, OSError) as error:
            raise StoreUnavailable(f"{url}: {error}") from error
        return int(summary["fileCount"]), int(summary["length"])
    count = size = 0
    folders = [url]
    while folders:
        folder = folders.pop()
        for status in listed(files, folder):
            if status.is_folder:
                folders.append(f"{folder}/{status.name}")
            else:
                count, size = count + 1, size + status.size
    return count, size


def render(tables: Sequence[TableFiles]) -> str:
    """The report as text, a line a table."""
    header = ("table", "files", "MiB", *LABELS, "days", "stored", "MiB")
    rows = [header]
    for table in tables:
        sizes = (f"{table.of_size(label):,}" for label in LABELS)
        live, stored = f"{table.bytes / 2**20:,.1f}", f"{table.stored_bytes / 2**20:,.1f}"
        rows.append(
            (table.table, f"{table.files:,}", live, *sizes, str(len(table.days)), f"{table.stored_files:,}", stored)
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def draw(tables: Sequence[TableFiles], path: Path) -> None:
    """Draw the live files by size and day, a row of bars per table, to a PNG file. Raises OSError, ImportError."""
    # Not shipped to the nodes of a cluster.
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")

    shown = [table for table in tables if table.files]
    figure, axes = pyplot.subplots(max(1, len(shown)), figsize=(12, 2.2 * max(1, len(shown))), squeeze=False)
    try:
        for axis, table in zip(axes[:, 0], shown, strict=False):
            days = sorted(table.days)[-DAYS_SHOWN:]
            bottom = [0] * len(days)
            for label, colour in zip(LABELS, COLOURS, strict=True):
                heights = [table.days[day].get(label, 0) for day in days]
                axis.bar([day or "unknown" for day in days], heights, bottom=bottom, color=colour, label=label)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            axis.set_title(f"{table.table}: {table.files:,} files, {table.bytes / 2**20:,.1f} MiB", loc="left")
            axis.set_ylabel("files")
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.tick_params(axis="x", labelrotation=45, labelsize=7)
        if shown:
            axes[0, 0].legend(ncols=len(LABELS), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(path, format="png", dpi=100)
    finally:
        pyplot.close(figure)
