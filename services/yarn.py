"""YARN: a ResourceManager and a NodeManager."""

from __future__ import annotations

import getpass
import re
from pathlib import Path

import psutil

from conf.settings import Settings
from services.daemon import LOOPBACK, Daemon, daemon_environment
from services.hdfs import core_site, web_address, webhdfs
from services.java import java_command, java_home
from services.service import Report, Service, as_hadoop_xml, in_units, write_if_changed, write_logging_and_hosts
from services.web import ask

RESOURCEMANAGER = "org.apache.hadoop.yarn.server.resourcemanager.ResourceManager"
NODEMANAGER = "org.apache.hadoop.yarn.server.nodemanager.NodeManager"
# Three small Spark applications; nothing is reserved, it only bounds what YARN hands out.
MEMORY_MB = 8192


def service(settings: Settings) -> Service:
    folder = settings.state_dir / "services" / "yarn"
    environment = daemon_environment(java_home())
    resourcemanager = Daemon(
        name="resourcemanager",
        folder=folder,
        command=java_command(folder, "resourcemanager", jars_of="hadoop", heap="384m", main=RESOURCEMANAGER),
        ports={
            "resourcemanager_port": settings.resourcemanager_port,
            "resourcemanager_port + 1": settings.resourcemanager_port + 1,
            "resourcemanager_port + 2": settings.resourcemanager_port + 2,
            "resourcemanager_port + 3": settings.resourcemanager_port + 3,
            "resourcemanager_http_port": settings.resourcemanager_http_port,
        },
        environment=environment,
    )
    nodemanager = Daemon(
        name="nodemanager",
        folder=folder,
        command=java_command(folder, "nodemanager", jars_of="hadoop", heap="256m", main=NODEMANAGER),
        ports={
            "nodemanager_port": settings.nodemanager_port,
            "nodemanager_port + 1": settings.nodemanager_port + 1,
            "nodemanager_http_port": settings.nodemanager_http_port,
        },
        environment=environment,
    )
    return Service(
        name="yarn",
        address=f"{LOOPBACK}:{settings.resourcemanager_port}",
        daemons=(resourcemanager, nodemanager),
        prepare=lambda: _prepare(settings, folder),
        waits_for=lambda: _waits_for(f"http://{LOOPBACK}:{settings.resourcemanager_http_port}"),
        report=lambda report: _report(f"http://{LOOPBACK}:{settings.resourcemanager_http_port}", report),
        tidy=lambda: _remove_staging(settings, f"http://{LOOPBACK}:{settings.resourcemanager_http_port}"),
        leftovers=lambda: _containers(folder),
    )


def _yarn_site(settings: Settings, folder: Path) -> dict[str, str]:
    rm = settings.resourcemanager_port
    return {
        "yarn.resourcemanager.hostname": LOOPBACK,
        "yarn.resourcemanager.address": f"{LOOPBACK}:{rm}",
        "yarn.resourcemanager.scheduler.address": f"{LOOPBACK}:{rm + 1}",
        "yarn.resourcemanager.resource-tracker.address": f"{LOOPBACK}:{rm + 2}",
        "yarn.resourcemanager.admin.address": f"{LOOPBACK}:{rm + 3}",
        "yarn.resourcemanager.webapp.address": f"{LOOPBACK}:{settings.resourcemanager_http_port}",
        "yarn.nodemanager.hostname": LOOPBACK,
        "yarn.nodemanager.address": f"{LOOPBACK}:{settings.nodemanager_port}",
        "yarn.nodemanager.localizer.address": f"{LOOPBACK}:{settings.nodemanager_port + 1}",
        "yarn.nodemanager.webapp.address": f"{LOOPBACK}:{settings.nodemanager_http_port}",
        "yarn.nodemanager.local-dirs": f"{folder}/data/local",
        # Absolute, or containers fail with "Stdout path must be absolute".
        "yarn.nodemanager.log-dirs": f"{folder}/log/containers",
        "yarn.nodemanager.resource.memory-mb": str(MEMORY_MB),
        # Two or three small Spark applications side by side; cores are shared, not handed out.
        "yarn.nodemanager.resource.cpu-vcores": "8",
        "yarn.scheduler.minimum-allocation-mb": "256",
        "yarn.scheduler.maximum-allocation-mb": str(MEMORY_MB),
        # A JVM's address space is no sign of its memory, and on a small machine a burst must not kill a container.
        "yarn.nodemanager.vmem-check-enabled": "false",
        "yarn.nodemanager.pmem-check-enabled": "false",
        # As for WebHDFS: a web page must not start or end applications.
        "yarn.resourcemanager.webapp.rest-csrf.enabled": "true",
        "yarn.nodemanager.webapp.rest-csrf.enabled": "true",
        # At the default of 90 % a node leaves the cluster because its disk is fairly full.
        "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": "99.5",
        # Allocations and ends of containers are passed on at each heartbeat.
        "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": "200",
        # Finished containers' logs stay for a day: somebody may ask why a job failed. The default is three hours.
        "yarn.nodemanager.log.retain-seconds": "86400",
        # A job on YARN logs to a file that nothing rotates. A job that writes so much is ended before the disk is full,
        # and its supervisor starts it again. Bytes of a container, and of all of an application's.
        "yarn.nodemanager.container-log-monitor.enable": "true",
        "yarn.nodemanager.container-log-monitor.dir-size-limit-bytes": str(512 << 20),
        "yarn.nodemanager.container-log-monitor.total-size-limit-bytes": str(2 << 30),
        # What jobs have shipped stays for the next ones. A version of code, packages and jars has 0.6 GB.
        "yarn.nodemanager.localizer.cache.target-size-mb": "4096",
        # The ResourceManager keeps what it shows of old applications in memory.
        "yarn.resourcemanager.max-completed-applications": "50",
    }


# One queue, and all of it may be ApplicationMasters: in cluster mode they are the drivers.
_CAPACITY_SCHEDULER = {
    "yarn.scheduler.capacity.root.queues": "default",
    "yarn.scheduler.capacity.root.default.capacity": "100",
    "yarn.scheduler.capacity.maximum-am-resource-percent": "1",
}


def _prepare(settings: Settings, folder: Path) -> None:
    write_if_changed(folder / "conf" / "core-site.xml", as_hadoop_xml(core_site(settings, folder)))
    write_if_changed(folder / "conf" / "yarn-site.xml", as_hadoop_xml(_yarn_site(settings, folder)))
    write_if_changed(folder / "conf" / "capacity-scheduler.xml", as_hadoop_xml(_CAPACITY_SCHEDULER))
    write_logging_and_hosts(folder)


def _waits_for(web: str) -> str | None:
    try:
        nodes = ask(f"{web}/ws/v1/cluster/nodes?states=RUNNING")["nodes"]
    except (OSError, ValueError) as error:
        return f"the ResourceManager at {web} ({type(error).__name__})"
    return None if nodes and nodes.get("node") else "a running NodeManager"


def _containers(folder: Path) -> list[int]:
    """Processes of containers, which work below the NodeManager's local folder and outlive it when it is killed."""
    inside = []
    for process in psutil.process_iter(["cwd"]):
        if (process.info["cwd"] or "").startswith(f"{folder}/data/local/"):
            inside.append(process.pid)
    return inside


def _remove_staging(settings: Settings, web: str) -> None:
    """Delete what killed jobs have left on HDFS, code and packages of 150 MB each. Others delete their own.

    A job has ended if YARN says so, or was started again since: the job's name has the time of YARN's start.
    No other YARN uses an HDFS on loopback. Raises OSError or ValueError.
    """
    start = ask(f"{web}/ws/v1/cluster/info")["clusterInfo"]["startedOn"]
    ended = ask(f"{web}/ws/v1/cluster/apps?states=FINISHED,FAILED,KILLED")["apps"] or {}
    ended_names = {application["id"] for application in ended.get("app", ())}
    staging = f"/user/{getpass.getuser()}/.sparkStaging"
    for entry in webhdfs(web_address(settings), staging, "LISTSTATUS")["FileStatuses"]["FileStatus"]:
        name = entry["pathSuffix"]
        of_start = re.fullmatch(r"application_(\d+)_\d+", name)
        if of_start and (int(of_start[1]) != start or name in ended_names):
            webhdfs(web_address(settings), f"{staging}/{name}", "DELETE&recursive=true", "DELETE")


def _report(web: str, report: Report) -> None:
    """Applications and nodes."""
    try:
        metrics = ask(f"{web}/ws/v1/cluster/metrics")["clusterMetrics"]
        nodes = (ask(f"{web}/ws/v1/cluster/nodes")["nodes"] or {}).get("node", [])
    except (OSError, ValueError, KeyError) as error:
        report.unknown.append(f"applications and nodes ({type(error).__name__})")
        return
    running, waiting = metrics["appsRunning"], metrics["appsPending"]
    report.figures |= {
        "applications_running": running,
        "applications_waiting": waiting,
        "nodes_active": metrics["activeNodes"],
        "nodes_unhealthy": metrics["unhealthyNodes"],
        "memory_free_bytes": metrics["availableMB"] << 20,
    }
    report.lines.append(
        f"{running} applications run, {waiting} wait; {metrics['activeNodes']} nodes, {metrics['unhealthyNodes']} of "
        f"them unhealthy; {in_units(metrics['availableMB'] << 20)} of memory to give"
    )
    report.warnings += [
        f"the node {node['id']} takes no work: {node['healthReport']}" for node in nodes if node["state"] == "UNHEALTHY"
    ]
    if waiting and not running:
        report.warnings.append(
            f"{waiting} applications wait though none runs: they ask for more memory than the node has"
        )
