"""HDFS: a NameNode and a DataNode, with WebHDFS."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conf.settings import Settings
from lake.tables import TABLES, Table
from services.daemon import LOOPBACK, Daemon, daemon_environment
from services.errors import DaemonDied
from services.java import LOGGING_TO_STDOUT, jars, java_command, java_home
from services.service import Report, Service, as_hadoop_xml, in_units, write_if_changed, write_logging_and_hosts
from services.web import ask, beans

NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"
SECONDARY = "org.apache.hadoop.hdfs.server.namenode.SecondaryNameNode"
# Measured with 300,000 files of one block (python -m benchmarks.heap): a file takes 300 bytes of the NameNode's heap
# and 68 of the DataNode's; without files they take 37 and 24 MB. At the default horizons the lake has some 250,000
# files. 512 MB suffice for twice as many: what lives long has two thirds of the heap, and needs room for garbage.
NAMENODE_HEAP = "512m"
BYTES_PER_FILE, BYTES_WITHOUT_FILES = 300, 37 << 20
# Seconds between two merges of the NameNode's log of changes into its image.
CHECKPOINT_SECONDS = 3600
# Entries of a folder: the default of dfs.namenode.fs-limits.max-directory-items.
MAX_ENTRIES = 1 << 20


def service(settings: Settings) -> Service:
    folder = settings.state_dir / "services" / "hdfs"
    environment = daemon_environment(java_home())
    namenode = Daemon(
        name="namenode",
        folder=folder,
        command=java_command(folder, "namenode", jars_of="hadoop", heap=NAMENODE_HEAP, main=NAMENODE),
        ports={"namenode_port": settings.namenode_port, "namenode_http_port": settings.namenode_http_port},
        environment=environment,
    )
    datanode = Daemon(
        name="datanode",
        folder=folder,
        command=java_command(folder, "datanode", jars_of="hadoop", heap="384m", carries_data=True, main=DATANODE),
        ports={
            "datanode_port": settings.datanode_port,
            "datanode_http_port": settings.datanode_http_port,
            "datanode_ipc_port": settings.datanode_ipc_port,
        },
        environment=environment,
    )
    # It merges the NameNode's log of changes into its image. Without it, the log grows until the NameNode starts again,
    # and that start reads all of it. It has the same files in memory as the NameNode.
    secondary = Daemon(
        name="secondarynamenode",
        folder=folder,
        command=java_command(folder, "secondarynamenode", jars_of="hadoop", heap=NAMENODE_HEAP, main=SECONDARY),
        ports={"secondarynamenode_http_port": settings.secondarynamenode_http_port},
        environment=environment,
    )
    return Service(
        name="hdfs",
        address=default_fs(settings),
        daemons=(namenode, datanode, secondary),
        prepare=lambda: _prepare(settings, folder),
        waits_for=lambda: _waits_for(web_address(settings)),
        report=lambda report: _report(settings, report),
    )


def default_fs(settings: Settings) -> str:
    return f"hdfs://{LOOPBACK}:{settings.namenode_port}"


def web_address(settings: Settings) -> str:
    return f"http://{LOOPBACK}:{settings.namenode_http_port}"


def core_site(settings: Settings, folder: Path) -> dict[str, str]:
    return {
        "fs.defaultFS": default_fs(settings),
        "hadoop.tmp.dir": str(folder / "tmp"),
        # What people delete by `hdfs dfs -rm` stays in their trash for a day. Deletions by jobs, over WebHDFS, do not.
        "fs.trash.interval": "1440",
        # Web pages and WebHDFS show what the person who runs this may see; the default user owns nothing.
        "hadoop.http.staticuser.user": getpass.getuser(),
    }


def _hdfs_site(settings: Settings, folder: Path) -> dict[str, str]:
    return {
        "dfs.namenode.rpc-address": f"{LOOPBACK}:{settings.namenode_port}",
        "dfs.namenode.http-address": f"{LOOPBACK}:{settings.namenode_http_port}",
        "dfs.datanode.address": f"{LOOPBACK}:{settings.datanode_port}",
        "dfs.datanode.http.address": f"{LOOPBACK}:{settings.datanode_http_port}",
        "dfs.datanode.ipc.address": f"{LOOPBACK}:{settings.datanode_ipc_port}",
        # WebHDFS sends clients to this name; the machine's own may resolve to an address that nobody listens on.
        "dfs.datanode.hostname": LOOPBACK,
        # The DataNode comes as 127.0.0.1, which need not resolve back to a name.
        "dfs.namenode.datanode.registration.ip-hostname-check": "false",
        "dfs.namenode.name.dir": f"file://{folder}/data/name",
        "dfs.datanode.data.dir": f"file://{folder}/data/blocks",
        "dfs.namenode.secondary.http-address": f"{LOOPBACK}:{settings.secondarynamenode_http_port}",
        "dfs.namenode.checkpoint.dir": f"file://{folder}/data/checkpoint",
        # A file of the lake makes some 900 bytes of log, from its creation to its deletion.
        "dfs.namenode.checkpoint.period": str(CHECKPOINT_SECONDS),
        # Changes that are in both images are kept for a standby NameNode; there is none. The default is a million.
        "dfs.namenode.num.extra.edits.retained": "0",
        # Every six hours the DataNode compares its files with its memory: in a tenth of the time, instead of at once.
        "dfs.datanode.directoryscan.throttle.limit.ms.per.sec": "100",
        # There is one DataNode.
        "dfs.replication": "1",
        # A web page that somebody opens on this machine must not change files: its script reaches loopback. The filter
        # refuses requests of browsers other than reads, unless they have a header that a foreign page cannot set.
        "dfs.webhdfs.rest-csrf.enabled": "true",
        # WebHDFS writes through a client in the DataNode: as in conf/spark-defaults.conf.
        "dfs.client.block.write.locateFollowingBlock.initial.delay.ms": "5",
        "dfs.client.block.write.locateFollowingBlock.retries": "12",
        # A start waits for the block report, not for 30 s more.
        "dfs.namenode.safemode.extension": "0",
        # The DataNode is seen to be alive or dead in seconds: 2 * recheck + 10 * heartbeat.
        "dfs.heartbeat.interval": "1",
        "dfs.namenode.heartbeat.recheck-interval": "5000",
        "dfs.namenode.stale.datanode.interval": "10000",
    }


def _prepare(settings: Settings, folder: Path) -> None:
    write_if_changed(folder / "conf" / "core-site.xml", as_hadoop_xml(core_site(settings, folder)))
    write_if_changed(folder / "conf" / "hdfs-site.xml", as_hadoop_xml(_hdfs_site(settings, folder)))
    write_logging_and_hosts(folder)
    # Written last, so that a format which was cut short is done again.
    formatted = folder / "data" / "formatted"
    if formatted.exists():
        return
    for of_another_format in ("name", "checkpoint"):
        shutil.rmtree(folder / "data" / of_another_format, ignore_errors=True)
    format_storage = [
        f"{java_home()}/bin/java", "-Xmx256m", LOGGING_TO_STDOUT, "-cp", f"{folder}/conf:{jars('hadoop')}",
        NAMENODE, "-format", "-nonInteractive",
    ]  # fmt: skip
    run = subprocess.run(format_storage, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode != 0:
        raise DaemonDied(f"hdfs: the NameNode's storage in {folder}/data could not be formatted:\n{run.stdout.strip()}")
    formatted.touch()


def _waits_for(web: str) -> str | None:
    try:
        figures = beans(web, "Hadoop:service=NameNode,name=*")
        if "FSNamesystemState" not in figures or "NameNodeInfo" not in figures:
            return "the NameNode to load its image"
        if figures["FSNamesystemState"]["NumLiveDataNodes"] < 1:
            return "a live DataNode"
        if figures["NameNodeInfo"]["Safemode"]:
            return "the end of safe mode"
        webhdfs(web, "/", "GETFILESTATUS")
    except (OSError, ValueError) as error:
        return f"the NameNode at {web} ({type(error).__name__})"
    return None


def webhdfs(web: str, path: str, operation: str, method: str = "GET") -> Any:
    """WebHDFS's answer to this user. Raises OSError (FileNotFoundError: there is no such path) or ValueError."""
    return ask(f"{web}/webhdfs/v1{quote(path)}?op={operation}&user.name={quote(getpass.getuser())}", method=method)


def most_files(heap_bytes: int) -> int:
    """The files of one block that fill seven tenths of what a NameNode's heap has for what lives long."""
    return max(0, int(heap_bytes * 2 / 3 * 0.7) - BYTES_WITHOUT_FILES) // BYTES_PER_FILE


def _report(settings: Settings, report: Report) -> None:
    """Files and blocks against the NameNode's heap, blocks in danger, the last merge, the folders of the lake."""
    try:
        figures = beans(web_address(settings), "Hadoop:service=NameNode,name=FSNamesystem*")
        # The first bean renews its figures every ten seconds, the second at once.
        current = {name: figures["FSNamesystemState"][name] for name in ("FilesTotal", "BlocksTotal")}
        names = figures["FSNamesystem"] | current
        memory = beans(web_address(settings), "java.lang:type=Memory")["java.lang:type=Memory"]
    except (OSError, ValueError, KeyError) as error:
        report.unknown.append(f"files and blocks ({type(error).__name__})")
        return
    files, most = names["FilesTotal"], most_files(memory["HeapMemoryUsage"]["max"])
    merged = time.time() - names["LastCheckpointTime"] / 1000
    report.figures |= {
        "files": files,
        "files_limit": most,
        "blocks": names["BlocksTotal"],
        "blocks_bytes": names["CapacityUsed"],
        "remaining_bytes": names["CapacityRemaining"],
        "missing_blocks": names["MissingBlocks"],
        "corrupt_blocks": names["CorruptBlocks"],
        "under_replicated_blocks": names["LowRedundancyBlocks"],
        "last_merge_seconds": int(merged),
        "changes_since_merge": names["TransactionsSinceLastCheckpoint"],
    }
    report.lines.append(
        f"{files:,} files and folders of some {most:,} that the NameNode's heap has room for; "
        f"{names['BlocksTotal']:,} blocks; {names['TransactionsSinceLastCheckpoint']:,} changes since the last merge, "
        f"{merged / 60:,.0f} min ago"
    )
    report.warnings += _dangers(names, files, most, merged)
    _report_lake(settings, report)


def _dangers(names: dict[str, Any], files: int, most: int, merged: float) -> list[str]:
    warnings = []
    if files > 0.8 * most:
        warnings.append(
            f"{files:,} files, and the NameNode's heap has room for some {most:,}: compact the tables "
            "(upkeep, batch/maintain.py), or raise NAMENODE_HEAP in services/hdfs.py"
        )
    if names["MissingBlocks"] or names["CorruptBlocks"]:
        warnings.append(
            f"{names['MissingBlocks']:,} blocks are missing and {names['CorruptBlocks']:,} corrupt: files cannot be "
            "read; see whether the DataNode's disk and folder are whole (scripts/services logs hdfs)"
        )
    if names["LowRedundancyBlocks"]:
        warnings.append(
            f"{names['LowRedundancyBlocks']:,} blocks have fewer replicas than their files ask for: there is one "
            "DataNode, and a client asked for more; set dfs.replication=1 there, and hdfs dfs -setrep 1 on those files"
        )
    if merged > 3 * CHECKPOINT_SECONDS and names["TransactionsSinceLastCheckpoint"] > 10_000:
        warnings.append(
            f"the last merge of the NameNode's log was {merged / 3600:,.0f} h ago; the log grows, and a start reads "
            "all of it: see why the SecondaryNameNode does not merge (scripts/services logs hdfs)"
        )
    return warnings


def _report_lake(settings: Settings, report: Report) -> None:
    """The files of each table and of the checkpoint, and the fullest of their folders: a folder has a limit."""
    if not settings.lake_root.startswith(default_fs(settings) + "/"):
        report.lines.append(f"the lake is elsewhere: {settings.lake_root}")
        return
    tables: dict[str, dict[str, int]] = {}
    fullest = ("", 0)
    try:
        for table in TABLES:
            whole = _content(settings, table.path(settings.lake_root))
            if whole is None:
                continue
            log = _content(settings, table.path(settings.lake_root) + "/_delta_log") or {"fileCount": 0}
            data_files = whole["fileCount"] - log["fileCount"]
            tables[table.qualified_name] = {
                "files": data_files,
                "log_files": log["fileCount"],
                "bytes": whole["length"],
            }
            folders = {f"{table.qualified_name}/_delta_log": log["fileCount"]}
            folders |= _data_folders(settings, table, data_files)
            fullest = max(fullest, *folders.items(), key=lambda item: item[1])
    except (OSError, ValueError, KeyError) as error:
        report.unknown.append(f"the files of the lake's tables ({error})")
        return
    report.figures |= {"tables": tables, "fullest_folder": fullest[0], "fullest_folder_entries": fullest[1]}
    report.lines.append(
        f"lake: {sum(table['files'] for table in tables.values()):,} data files, "
        f"{sum(table['log_files'] for table in tables.values()):,} log files, "
        f"{in_units(sum(table['bytes'] for table in tables.values()))}; fullest folder: {fullest[0] or '-'} with "
        f"{fullest[1]:,} of {MAX_ENTRIES:,} entries"
    )
    if fullest[1] > 0.8 * MAX_ENTRIES:
        report.warnings.append(
            f"the folder {fullest[0]} has {fullest[1]:,} entries, and HDFS takes no more than {MAX_ENTRIES:,}: then "
            "the stream stops; compact the table and clean its log (upkeep, batch/maintain.py)"
        )


def _data_folders(settings: Settings, table: Table, files: int) -> dict[str, int]:
    """The folders of a table's data with their files. Partitions are looked at only where one may be too full."""
    whole = {table.qualified_name: files}
    if not table.partitioned_by or files < 0.8 * MAX_ENTRIES:
        return whole if not table.partitioned_by else {}
    path = table.path(settings.lake_root)
    entries = webhdfs(web_address(settings), path.removeprefix(default_fs(settings)), "LISTSTATUS")["FileStatuses"][
        "FileStatus"
    ]
    partitions = [entry["pathSuffix"] for entry in entries if "=" in entry["pathSuffix"]]
    contents = {name: _content(settings, f"{path}/{name}") for name in partitions}
    return {f"{table.qualified_name}/{name}": content["fileCount"] for name, content in contents.items() if content}


def _content(settings: Settings, url: str) -> dict[str, int] | None:
    """The number of files below a folder and their bytes; None where there is none. Raises OSError or ValueError."""
    try:
        summary: dict[str, int] = webhdfs(
            web_address(settings), url.removeprefix(default_fs(settings)), "GETCONTENTSUMMARY"
        )["ContentSummary"]
    except FileNotFoundError:
        return None
    return summary
