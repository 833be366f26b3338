"""From Kafka to the lake, exactly once: bronze, silver and gold in one query.

In:  Kafka topics of ticks, rejects and gaps.
Out: bronze.ticks, silver.ticks, silver.quarantine, silver.gaps, gold.price_5s, price_1m, price_5m, price_1h,
     price_1d, rolling_price, current_price, alerts.

    ./spark-submit.sh streaming/ticks.py
    ./spark-submit.sh streaming/ticks.py --once        # process what Kafka holds now, then end
    ./spark-submit.sh streaming/ticks.py --sink console                     # and print gold's rows as they change
    ./spark-submit.sh streaming/ticks.py --sink parquet file:/tmp/gold      # and keep gold as plain Parquet files
    ./spark-submit.sh streaming/ticks.py --rebuild     # recompute silver and gold from bronze, then go on from Kafka
    ./spark-submit.sh streaming/ticks.py --accept-loss # go on although Kafka no longer has all records that follow

A micro-batch appends its records to bronze, its new valid ticks to silver and invalid records to quarantine, and
updates gold by its ticks' summaries. If the job dies in between, the next one replays the micro-batch: tables that
have it skip it, the others are written. SIGTERM and SIGINT end the job after the current micro-batch.

Exit codes: 0 ended by a signal or --once; 1 the query failed; 2 a wrong setting, or other settings made the tables, or
the tables have another version, or features of Delta that the job cannot write; 3 the tables belong to another
checkpoint, or it or their log is damaged or lost, or Kafka no longer has the records that follow; 4 another writer has
the lake, or has taken it over.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from kafka.errors import KafkaError
from pyspark.errors import StreamingQueryException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.query import StreamingQuery

from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake.contract import RECORD
from lake.delta.drop import UnknownTable, kept_for
from lake.delta.files import Files, QuotaExceeded, StoreError, UnknownStore, WebHdfs, files_of
from lake.delta.lease import LakeInUse, Lease
from lake.delta.log import CannotWrite, LogDamaged
from lake.delta.slices import Sink
from lake.delta.version import OtherVersion
from lake.delta.writer import Fenced
from lake.gold.sinks import Console, PlainParquet
from lake.rules import DECIDING
from lake.silver.stage import RECORDS_A_TASK
from lake.silver.state import StateLost
from lake.tables import SILVER_TICKS
from streaming.checkpoint import CheckpointError, Offsets, position_of
from streaming.lakehouse import Lakehouse, SettingsChanged, resume
from streaming.losses import LIFE, Expired, require_none, topics_in_kafka
from streaming.rebuild import RowsDropped, rebuild
from streaming.status import Subject, jvm_of, served

logger = logging.getLogger("streaming.ticks")

WRONG_CHECKPOINT, FENCED = 3, 4
# Errors of a micro-batch whose message says what to do.
NAMED = (CheckpointError, Fenced, CannotWrite, LogDamaged, StoreError)
# WebHDFS answers so soon after the NameNode's own port.
START_SECONDS = 10


def start(
    spark: SparkSession, settings: Settings, lakehouse: Lakehouse, follows: Offsets | None = None
) -> StreamingQuery:
    """Start the query. follows: the offsets where a new checkpoint begins; default: Kafka's first."""
    topics = (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.kafka_bootstrap_servers)
        # A pattern: the query waits for topics that do not exist yet. Anchored: Spark searches for it within names.
        .option("subscribePattern", f"^(?:{'|'.join(re.escape(topic) for topic in topics)})$")
        .option("startingOffsets", json.dumps(follows) if follows else "earliest")
        # An executor reads a partition only up to a known offset, so it need not wait for more records.
        .option("kafka.fetch.max.wait.ms", "5")
        # After each poll Spark seeks to find the partition's limits. That drops records fetched but not polled yet, and
        # Kafka's client fetches them again: so one poll should return all.
        .option("kafka.max.poll.records", "100000")
        .option("failOnDataLoss", "true")
        .option("maxRecordsPerPartition", str(RECORDS_A_TASK))
        .option("maxOffsetsPerTrigger", str(settings.max_offsets_per_trigger))
        .load()
        .withColumnRenamed("timestamp", "kafka_timestamp")
        .select(*RECORD)
    )
    for topic, lives in lakehouse.topics.lives.items():
        shifted = F.when(F.col("topic") == topic, F.col("partition") + LIFE * lives).otherwise(F.col("partition"))
        records = records.withColumn("partition", shifted.cast("int"))
    writing = (
        records.writeStream.queryName("ticks")
        .foreachBatch(lakehouse.write_batch)
        .option("checkpointLocation", settings.checkpoint_location)
    )
    if settings.once:
        return writing.trigger(availableNow=True).start()
    return writing.trigger(processingTime=f"{settings.trigger_seconds} seconds").start()


def go_on(lakehouse: Lakehouse, settings: Settings, *, accept_loss: bool) -> Offsets | None:
    """Check that Kafka has all records that follow. Returns where a new checkpoint begins; None: Spark knows.

    accept_loss: go on without records that Kafka no longer has. Raises Expired, CheckpointError, KafkaError.
    """
    position, topics = position_of(lakehouse.writer.files, settings.checkpoint_location), lakehouse.topics
    read = position.offsets if position else topics.begins
    kafka = topics_in_kafka(settings)
    losses = topics.losses_in(kafka, read)
    if not losses:
        lakehouse.topics = topics.noted(kafka)
        return None if position else topics.starting(kafka)
    if not accept_loss:
        require_none(losses)
    if position and position.batch != lakehouse.writer.batch(SILVER_TICKS):
        raise CheckpointError(
            f"micro-batch {position.batch + 1} is not in all tables, and Kafka lacks some of its records: give "
            "--rebuild and --accept-loss, which make silver and gold anew from bronze first."
        )
    lakehouse.accept(topics.without(losses, kafka, read))
    logger.warning("accepted: %s", "; ".join(map(str, losses)))
    return lakehouse.topics.starting(kafka)


def check_what_kafka_has(lakehouse: Lakehouse, settings: Settings) -> None:
    """After a failure of the query: raises Expired if it lies in lost records, or CheckpointError."""
    try:
        kafka = topics_in_kafka(settings)
    except KafkaError:
        return
    if position := position_of(lakehouse.writer.files, settings.checkpoint_location):
        require_none(lakehouse.topics.losses_in(kafka, position.offsets))


def run(query: StreamingQuery, lakehouse: Lakehouse, stop: threading.Event) -> None:
    """Wait until the query ends, or until `stop` is set and the current micro-batch is written. Raises Fenced."""
    lakehouse.start()
    while not query.awaitTermination(1):
        if stop.is_set():
            lakehouse.ending.set()
        # Stopping a query while its callback runs would fill the log with the callback's errors.
        if (stop.is_set() or lakehouse.fenced) and lakehouse.idle.wait(60):
            query.stop()
            break
    lakehouse.finish()
    lakehouse.writer.close()
    if lakehouse.fenced:
        raise lakehouse.fenced


def sink_of(settings: Settings, choice: Sequence[str] | None) -> Sink | None:
    if not choice:
        return None
    if choice[0] == "console":
        return Console()
    return PlainParquet(files_of(choice[1], str(settings.webhdfs_url)), choice[1])


def spark_sees(spark: SparkSession, url: str) -> bool:
    """Whether Spark sees the file too: Spark uses lake_root's own address, not webhdfs_url."""
    jvm = spark._jvm
    assert jvm is not None
    path = jvm.org.apache.hadoop.fs.Path(url)
    return bool(path.getFileSystem(spark._jsc.hadoopConfiguration()).exists(path))


def complaint_about(spark: SparkSession, files: Files, root: str) -> str | None:
    """Why webhdfs_url does not lead to the lake's file system although Spark reaches that; None if it does."""
    if not isinstance(files, WebHdfs):
        return None
    try:
        replace(files, patience_seconds=0).exists(root)
        return None
    except StoreError:
        # Spark's client waits for a NameNode that starts.
        spark_sees(spark, root)
    try:
        replace(files, patience_seconds=START_SECONDS).exists(root)
    except StoreError as error:
        return f"it does not answer ({error})"
    return None


def end_on_signals(stop: threading.Event) -> None:
    """Let SIGINT and SIGTERM set `stop`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *(
            "kafka_bootstrap_servers",
            "ticks_topic",
            "rejects_topic",
            "gaps_topic",
            "lake_root",
            "checkpoint",
            "webhdfs_url",
            "trigger_seconds",
        ),
        *(
            "max_offsets_per_trigger",
            "once",
            "rebuild",
            "upkeep",
            "upkeep_seconds",
            "history_minutes",
            "keep_days",
            "debt_files",
            *DECIDING,
        ),
        *("state_dir", "stream_metrics_port", "stream_stale_seconds"),
    )
    parser.add_argument(
        "--sink", nargs="+", metavar="SINK", help="gold elsewhere too, as it changes: console, or parquet PATH"
    )
    parser.add_argument(
        "--accept-loss",
        action="store_true",
        help="go on although Kafka no longer has all records; silver.gaps gets a row of each loss",
    )
    settings, own = from_command_line(parser, argv)
    if own.sink and (own.sink[0], len(own.sink)) not in (("console", 1), ("parquet", 2)):
        parser.error(f"--sink {' '.join(own.sink)}: write console, or parquet and a path")
    try:
        files = files_of(settings.lake_root, str(settings.webhdfs_url))
        sink = sink_of(settings, own.sink)
        kept_for(settings.keep_days)
    except (UnknownStore, UnknownTable) as error:
        parser.error(str(error))
    stop = threading.Event()
    end_on_signals(stop)
    spark = SparkSession.builder.appName("tickhouse ticks").getOrCreate()
    # Spark has replaced our handler by its own.
    end_on_signals(stop)
    lease = Lease(files, settings.lake_root)
    try:
        complaint = complaint_about(spark, files, settings.lake_root)
        if not complaint:
            lease.acquire()
            if not spark_sees(spark, lease.url):
                complaint = f"what is written there is not at {lease.url}"
        if complaint:
            logger.error(
                "webhdfs_url is %s, and %s: it must be WebHDFS of the file system that lake_root is on",
                *(settings.webhdfs_url, complaint),
            )
            return USAGE_ERROR
        if settings.rebuild:
            rebuild(spark, settings, accept_loss=own.accept_loss)
        lakehouse = resume(spark, settings, sink)
        follows = go_on(lakehouse, settings, accept_loss=own.accept_loss)
        logger.info("%s -> %s", settings.kafka_bootstrap_servers, settings.lake_root)
        try:
            with served(settings, Subject(settings, lakehouse, lease, jvm_of(spark))):
                run(start(spark, settings, lakehouse, follows), lakehouse, stop)
        except StreamingQueryException:
            # It has only the message of an error in a micro-batch.
            failure = lakehouse.fenced or lakehouse.failure
            if isinstance(failure, NAMED):
                raise failure from None
            if failure is None:
                check_what_kafka_has(lakehouse, settings)
            raise
    except (SettingsChanged, OtherVersion, CannotWrite) as error:
        logger.error("%s", error)
        return USAGE_ERROR
    except (CheckpointError, StateLost, LogDamaged, Expired, RowsDropped) as error:
        logger.error("%s", error)
        return WRONG_CHECKPOINT
    except KafkaError as error:
        logger.error("Kafka at %s does not answer: %r", settings.kafka_bootstrap_servers, error)
        return 1
    except LakeInUse as error:
        logger.error("%s", error)
        return FENCED
    except Fenced as error:
        logger.error("%s; this one wrote nothing since", error)
        return FENCED
    except QuotaExceeded as error:
        logger.error("%s", error)
        return 1
    except StoreError as error:
        logger.error("the lake's files cannot be reached (lake_root, webhdfs_url): %s", error)
        return 1
    except StreamingQueryException as error:
        # Spark's own files, the checkpoint, may meet the quota too.
        quota = re.search(r"The \w+ quota [^\n]*is exceeded[^\n]*", str(error))
        if quota:
            logger.error("%s: the quota is used up: %s", settings.checkpoint_location, quota[0])
        else:
            logger.error("the query failed: %s", error)
        return 1
    finally:
        lease.release()
        spark.stop()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    # /healthz says if Kafka does not answer.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    sys.exit(main())
