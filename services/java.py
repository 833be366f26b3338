"""Where Java and the jars are, and how a Java daemon's command begins."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pyspark

from conf.settings import PROJECT
from services.daemon import mark, temporary
from services.errors import NotSetUp

SPARK_HOME = Path(pyspark.__file__).parent
JARS = PROJECT / ".tickhouse" / "jars"
# Made by submit/class_archive.py. A Java that cannot use it says why on stderr, for stdout is a job's own.
CLASS_ARCHIVE = PROJECT / ".tickhouse" / "spark-classes.jsa"
SHARED_CLASSES = f"-XX:SharedArchiveFile={CLASS_ARCHIVE} -Xlog:disable -Xlog:all=warning:stderr"
# For a command that ends, such as a format: its log is its output.
LOGGING_TO_STDOUT = "-Dtickhouse.log=/dev/stdout"


@cache
def java_home() -> Path:
    """The home of Java 17, else of a newer one, whichever is the default. Raises NotSetUp."""
    result = subprocess.run([PROJECT / "scripts" / "java-home"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise NotSetUp("There is no Java 17 or newer on this machine: run scripts/setup.")
    return Path(result.stdout.strip())


def jars(conf: str) -> str:
    """The class path of a conf of conf/ivy.xml. Raises NotSetUp where scripts/setup has not fetched it."""
    if not (JARS / ".stamp").exists():
        raise NotSetUp(f"The jars are not in {JARS}: run scripts/setup.")
    return f"{JARS}/{conf}/*"


def spark_class_path() -> str:
    """Of Spark's drivers: all jars, in the order of CLASS_ARCHIVE. Raises NotSetUp."""
    return f"{SPARK_HOME}/jars/*:{jars('spark')}"


def logging_to_file(folder: Path, name: str) -> tuple[str, str]:
    """Options of a daemon's Java. The first is used by the logging that services/service.py sets up."""
    return f"-Dtickhouse.log={folder}/log/{name}.log", f"-XX:ErrorFile={folder}/log/{name}.crash"


def java_command(
    folder: Path,
    name: str,
    *,
    jars_of: str,
    heap: str,
    carries_data: bool = False,
    main: str,
    arguments: Sequence[str] = (),
) -> tuple[str, ...]:
    """The command of the daemon `name` with `folder/conf` first on its class path. heap: as in -Xmx, such as 256m.

    carries_data: compile for speed in the long run. The others only compile for an early start, which takes a third of
    the processor time off it.
    """
    return (
        f"{java_home()}/bin/java",
        mark(folder, name),
        *logging_to_file(folder, name),
        f"-Djava.io.tmpdir={temporary(folder, name)}",
        f"-Xmx{heap}",
        # Small heaps on few cores: the parallel collectors' threads would cost more than they bring.
        "-XX:+UseSerialGC",
        *(() if carries_data else ("-XX:TieredStopAtLevel=1",)),
        # Better dead, and seen to be, than half alive.
        "-XX:+ExitOnOutOfMemoryError",
        "-Djava.net.preferIPv4Stack=true",
        # Hadoop looks up this machine's own name and fails where the name has no address, as in some containers.
        f"-Djdk.net.hosts.file={folder}/conf/hosts",
        "-cp",
        f"{folder}/conf:{jars(jars_of)}",
        main,
        *arguments,
    )
