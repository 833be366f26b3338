"""What a lake is for HDFS: files in its folders, files in its tables' logs, and the NameNode's memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from urllib.parse import quote, urlsplit

import hdfs

import services
from benchmarks.figures import WEBHDFS_LIMIT
from benchmarks.follow import existing_actions
from conf.settings import Settings
from lake.delta.files import Files, files_of
from lake.delta.log import TableLog, added_by
from lake.tables import STREAMED, Table
from services.java import java_home

THREADS = 4
# So many of a table's last commits say what a commit adds.
COMMITS = 5
JMX_LIMIT, COLLECTION_LIMIT = 10.0, 30.0


@dataclass(frozen=True)
class TableFiles:
    """data_files: all in the table's folder; live_files: those of its newest version, as of the log's last checkpoint.

    commit_files, commit_bytes: data files that a micro-batch's commit adds, and its length, both as means.
    """

    version: int
    data_files: int
    live_files: int
    log_files: int
    log_bytes: int
    commit_files: float
    commit_bytes: float


@dataclass(frozen=True)
class LakeFiles:
    """files: of the whole lake, also of Spark's checkpoint. tables: by qualified name, those that exist."""

    files: int
    tables: Mapping[str, TableFiles]

    def total(self, name: str) -> int:
        """The sum of a count of TableFiles over the tables."""
        return sum(getattr(table, name) for table in self.tables.values())

    def commits_since(self, earlier: LakeFiles) -> dict[str, int]:
        """The number of commits to each table since."""
        return {
            name: table.version - (earlier.tables[name].version if name in earlier.tables else -1)
            for name, table in self.tables.items()
        }


def lake_files(settings: Settings) -> LakeFiles:
    """Count the lake's files by some hundred requests, however many files there are. Raises StoreError, HdfsError."""
    client = hdfs.InsecureClient(settings.webhdfs_url, timeout=WEBHDFS_LIMIT)
    files = files_of(settings.lake_root, str(settings.webhdfs_url))

    def count(table: Table) -> TableFiles | None:
        return _table_files(client, files, table.path(settings.lake_root))

    with ThreadPoolExecutor(THREADS) as threads:
        counted = dict(zip((table.qualified_name for table in STREAMED), threads.map(count, STREAMED), strict=True))
    whole, _ = _content(client, settings.lake_root)
    return LakeFiles(whole, {name: table for name, table in counted.items() if table})


def _table_files(client: hdfs.Client, files: Files, url: str) -> TableFiles | None:
    log, folder = TableLog(files, url), f"{url}/_delta_log"
    version = log.newest()
    if version < 0:
        return None
    log_files, log_bytes = _content(client, folder)
    hidden, _ = _content(client, f"{url}/_seen")
    whole, _ = _content(client, url)
    try:
        live = int(json.loads(files.read(f"{folder}/_last_checkpoint"))["numOfAddFiles"])
    except (FileNotFoundError, ValueError, KeyError):
        # There is no checkpoint yet, so the log is short.
        live = len(log.files())
    first = max(0, version - COMMITS)
    names = files.list(folder, f"{first:020d}.json", 2 * COMMITS)
    sizes = [status.size for status in names if status.name.endswith(".json")]
    commits = [existing_actions(log, number) for number in range(first + 1, version + 1)]
    added = [len(added_by(actions)) for actions in commits if actions]
    return TableFiles(
        version=version,
        data_files=whole - log_files - hidden,
        live_files=live,
        log_files=log_files,
        log_bytes=log_bytes,
        commit_files=fmean(added) if added else 0.0,
        commit_bytes=fmean(sizes) if sizes else 0.0,
    )


def _content(client: hdfs.Client, url: str) -> tuple[int, int]:
    """The number of files below a folder and their bytes; 0, 0 if it is absent."""
    summary = client.content(urlsplit(url).path, strict=False)
    return (summary["fileCount"], summary["length"]) if summary else (0, 0)


class NameNode:
    """The memory of the NameNode at webhdfs_url, by its JMX page."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.webhdfs_url.partition(";")[0].rstrip("/")
        pids = {state.daemon: state.pid for state in services.states(settings, ["hdfs"])}
        self._pid = pids.get("namenode")
        tool = java_home() / "bin" / "jcmd"
        self._jcmd = str(tool) if tool.exists() else shutil.which("jcmd")

    def collect(self) -> None:
        """Collect garbage, so that the heap in use is what the NameNode needs.

        Does nothing if the NameNode is not this checkout's, or there is no JDK.
        """
        if self._pid is not None and self._jcmd is not None:
            command = [self._jcmd, str(self._pid), "GC.run"]
            # Without a collection the heap in use is only larger.
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, check=False, timeout=COLLECTION_LIMIT)

    def heap_mb(self) -> float | None:
        """Heap in use, with the garbage since the last collection; None if the page does not answer."""
        memory = self._bean("java.lang:type=Memory")
        return memory["HeapMemoryUsage"]["used"] / 1e6 if memory else None

    def files(self) -> int:
        """Files and folders in all of HDFS; 0 if the page does not answer."""
        system = self._bean("Hadoop:service=NameNode,name=FSNamesystem")
        return int(system["FilesTotal"]) if system else 0

    def _bean(self, name: str) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"{self._url}/jmx?qry={quote(name)}", timeout=JMX_LIMIT) as answer:
                beans: list[dict[str, Any]] = json.load(answer)["beans"]
        except (OSError, ValueError):
            return None
        return beans[0] if beans else None
