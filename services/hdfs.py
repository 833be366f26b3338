"""HDFS: a NameNode and a DataNode, with WebHDFS."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import requests
from hdfs import HdfsError, InsecureClient

from conf.settings import Settings
from services.daemon import LOOPBACK, Daemon, daemon_environment
from services.errors import DaemonDied
from services.java import jars, java_command, java_home
from services.service import Service, as_hadoop_xml, write_if_changed, write_logging_and_hosts

NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"


def service(settings: Settings) -> Service:
    folder = settings.state_dir / "services" / "hdfs"
    environment = daemon_environment(java_home())
    namenode = Daemon(
        name="namenode",
        folder=folder,
        command=java_command(folder, "namenode", jars_of="hadoop", heap="384m", main=NAMENODE),
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
    return Service(
        name="hdfs",
        address=default_fs(settings),
        daemons=(namenode, datanode),
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
        f"{java_home()}/bin/java", "-Xmx256m", "-cp", f"{folder}/conf:{jars('hadoop')}",
        NAMENODE, "-format", "-nonInteractive",
    ]  # fmt: skip
    run = subprocess.run(format_storage, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode != 0:
        raise DaemonDied(f"hdfs: the NameNode's storage in {folder}/data could not be formatted:\n{run.stdout.strip()}")
    formatted.touch()


def _waits_for(web: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{web}/jmx?qry=Hadoop:service=NameNode,name=*", timeout=5) as answer:
            beans = {bean["name"].rpartition("name=")[2]: bean for bean in json.load(answer)["beans"]}
        if "FSNamesystemState" not in beans or "NameNodeInfo" not in beans:
            return "the NameNode to load its image"
        if beans["FSNamesystemState"]["NumLiveDataNodes"] < 1:
            return "a live DataNode"
        if beans["NameNodeInfo"]["Safemode"]:
            return "the end of safe mode"
        InsecureClient(web, user=getpass.getuser(), timeout=5).list("/")
    except (urllib.error.URLError, OSError, ValueError, HdfsError, requests.RequestException) as error:
        return f"the NameNode at {web} ({type(error).__name__})"
    return None
