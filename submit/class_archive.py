"""An archive of the classes that Spark's drivers load: Java maps it into memory, and need not read and check each one.

    python -m submit.class_archive

Runs two micro-batches on a lake in a temporary folder and has Java write what it loaded (class data sharing, JEP 350).
Java looks whether an archive is of the jars that it is given, and does without one that is not.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from py4j.protocol import Py4JJavaError
from pyspark import SparkContext
from pyspark.sql import SparkSession

from conf.settings import PROJECT, Settings
from ingestion.ticks import Tick
from lake.contract import RECORD
from lake.tables import BRONZE_TICKS
from services.java import CLASS_ARCHIVE, java_home, spark_class_path
from streaming.lakehouse import resume
from submit.spark_jars import jars

TICKS = 2_000
# What a job has of a service that does not run here: the clients of Kafka and of HDFS, by name.
CLIENTS = re.compile(
    r"org/apache/(kafka/(clients/(consumer/|admin/Kafka|[A-Z])|common/)|spark/sql/kafka010/"
    r"|hadoop/(hdfs/(client/|protocol/[A-Z]|protocolPB/|[A-Z])|ipc/))"
)


def messages(at: datetime) -> Iterator[bytes]:
    """A hundred ticks a second, and a record that is none."""
    for number in range(1, TICKS + 1):
        at_ns = int(at.timestamp()) * 10**9 + number * 10**7
        tick = Tick(at_ns, "bitcoin", f"{60_000 + number % 50}", "USD", "binance", "BTCUSDT", at_ns, "0.5", number)
        yield tick.to_json("archive", number)
    yield b"no tick"


def micro_batches(spark: SparkSession, folder: Path) -> None:
    """Do what the streaming job does, with records from files."""
    at = datetime.now(UTC)
    rows = [(None, value, "ticks", 0, offset, at, at, at.date()) for offset, value in enumerate(messages(at))]
    for part in (rows[: TICKS // 2], rows[TICKS // 2 :]):
        frame = spark.createDataFrame(part, BRONZE_TICKS.schema)
        frame.coalesce(1).write.mode("append").parquet(f"{folder}/records")
    settings = Settings(lake_root=f"file:{folder}/lake", checkpoint=f"file:{folder}/checkpoint")
    lakehouse = resume(spark, settings)
    records = spark.readStream.schema(BRONZE_TICKS.schema).option("maxFilesPerTrigger", 1).parquet(f"{folder}/records")
    records = records.select(*RECORD)
    writing = records.writeStream.foreachBatch(lakehouse.write_batch)
    writing = writing.option("checkpointLocation", settings.checkpoint_location).trigger(availableNow=True)
    writing.start().awaitTermination()
    lakehouse.finish()
    lakehouse.writer.close()


def client_classes() -> Iterator[str]:
    for jar in jars():
        if jar.name.startswith(("kafka-clients-", "spark-sql-kafka-", "hadoop-client-api-")):
            with zipfile.ZipFile(jar) as files:
                classes = [name for name in files.namelist() if CLIENTS.match(name) and name.endswith(".class")]
            yield from (name.removesuffix(".class").replace("/", ".") for name in classes)


def load(spark: SparkSession, names: Iterator[str]) -> None:
    """Have Java load these classes, where what they need is there."""
    jvm = spark._jvm
    assert jvm is not None
    loader = jvm.java.lang.ClassLoader.getSystemClassLoader()
    for name in names:
        try:
            jvm.java.lang.Class.forName(name, False, loader)
        except Py4JJavaError:
            continue


def main() -> int:
    # Beside the archive, to be renamed to it when it is whole.
    with TemporaryDirectory(dir=CLASS_ARCHIVE.parent, prefix="classes.") as name:
        folder = Path(name)
        draft = folder / CLASS_ARCHIVE.name
        os.environ |= {
            "JAVA_HOME": str(java_home()),
            # Not conf/: Java makes no archive for a class path with a folder that has files.
            "SPARK_CONF_DIR": f"{folder}/absent",
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": sys.executable,
            "PYSPARK_SUBMIT_ARGS": f"--properties-file '{PROJECT}/conf/spark-defaults.conf' pyspark-shell",
        }
        spark = (
            SparkSession.builder.master("local[2]")
            .config("spark.driver.extraClassPath", spark_class_path())
            .config("spark.driver.extraJavaOptions", f"-XX:ArchiveClassesAtExit={draft} -Xlog:cds*=error")
            .config("spark.sql.warehouse.dir", f"file:{folder}/warehouse")
            .config("spark.ui.enabled", "false")
            .config("spark.executorEnv.PYTHONPATH", str(PROJECT))
            .getOrCreate()
        )
        gateway = SparkContext._gateway
        assert gateway is not None
        java = gateway.proc
        micro_batches(spark, folder)
        load(spark, client_classes())
        spark.stop()
        java.stdin.close()
        java.wait()
        draft.replace(CLASS_ARCHIVE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
