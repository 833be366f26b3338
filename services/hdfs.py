"""HDFS: a NameNode and a DataNode, with WebHDFS."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from pathlib import Path

from conf.settings import Settings
from services.daemon import LOOPBACK, Daemon, daemon_environment
from services.errors import DaemonDied
from services.java import LOGGING_TO_STDOUT, jars, java_command, java_home
from services.service import Service, as_hadoop_xml, write_if_changed, write_logging_and_hosts
from services.web import ask, beans

NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"
SECONDARY = "org.apache.hadoop.hdfs.server.namenode.SecondaryNameNode"
# Measured with 300,000 files of one block, names as long as the lake's: a file takes 310 bytes of the NameNode's heap, and
# 64 of the DataNode's; without files they take 30 and 20 MB. The lake keeps some 250,000 files at the default horizons.
# At 512 MB there is room for twice as many, for what is being made, and for block reports: the part of the heap for
# what lives long has two thirds.
NAMENODE_HEAP = "512m"
BYTES_PER_FILE = 310
CHECKPOINT_SECONDS = 3600


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
    # It merges the NameNode's log of changes into its image, hourly. Without it, the log grows until the NameNode starts
    # again, and that start reads all of it. It has the same files in memory as the NameNode.
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
        waits_for=lambda: _waits_for(f"http://{LOOPBACK}:{settings.namenode_http_port}"),
    )


def default_fs(settings: Settings) -> str:
    return f"hdfs://{LOOPBACK}:{settings.namenode_port}"


def core_site(settings: Settings, folder: Path) -> dict[str, str]:
    return {
        "fs.defaultFS": default_fs(settings),
        "hadoop.tmp.dir": str(folder / "tmp"),
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
        # Seconds between two merges. A file of the lake makes some 900 bytes of log, from its creation to its deletion.
        "dfs.namenode.checkpoint.period": str(CHECKPOINT_SECONDS),
        # Changes that are in both images are kept for a standby NameNode; there is none. The default is a million.
        "dfs.namenode.num.extra.edits.retained": "0",
        # Every six hours the DataNode compares its files with its memory: in a tenth of the time, instead of at once.
        "dfs.datanode.directoryscan.throttle.limit.ms.per.sec": "100",
        # There is one DataNode.
        "dfs.replication": "1",
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
    shutil.rmtree(folder / "data" / "name", ignore_errors=True)
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
        ask(f"{web}/webhdfs/v1/?op=GETFILESTATUS&user.name={getpass.getuser()}")
    except (OSError, ValueError) as error:
        return f"the NameNode at {web} ({type(error).__name__})"
    return None
