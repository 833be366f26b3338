"""SQL: the Spark Thrift Server, with a metastore (Derby) inside it that nobody else can open."""

from __future__ import annotations

from pathlib import Path

from impala.dbapi import connect
from impala.error import Error
from thrift.Thrift import TException

from conf.settings import PROJECT, Settings
from services.daemon import LOOPBACK, Daemon, accepts, daemon_environment, mark, temporary
from services.java import SHARED_CLASSES, SPARK_HOME, java_home, logging_to_file, spark_class_path
from services.service import LOG4J2, Service, write_if_changed


def service(settings: Settings) -> Service:
    folder = settings.state_dir / "services" / "sql"
    server = Daemon(
        name="thriftserver",
        folder=folder,
        command=_command(settings, folder),
        ports={"sql_port": settings.sql_port},
        environment=daemon_environment(java_home())
        | {
            "SPARK_HOME": str(SPARK_HOME),
            "SPARK_CONF_DIR": str(PROJECT / "conf"),
            "SPARK_LOCAL_IP": LOOPBACK,
        },
    )
    return Service(
        name="sql",
        address=f"jdbc:hive2://{LOOPBACK}:{settings.sql_port}",
        daemons=(server,),
        prepare=lambda: _prepare(folder),
        waits_for=lambda: _waits_for(settings),
    )


def _command(settings: Settings, folder: Path) -> tuple[str, ...]:
    scratch = temporary(folder, "thriftserver")
    own_options = (
        mark(folder, "thriftserver"),
        *logging_to_file(folder, "thriftserver"),
        f"-Dlog4j2.configurationFile=file:{folder}/conf/log4j2.properties",
        f"-Djava.io.tmpdir={scratch}",
        f"-Dderby.stream.error.file={folder}/log/thriftserver.derby",
        "-Djava.net.preferIPv4Stack=true",
        "-XX:+ExitOnOutOfMemoryError",
    )
    # The Delta jars by the class path: with --jars the server's sessions cannot find Delta's catalog.
    configuration = {
        "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={folder}/data/metastore;create=true",
        "spark.sql.warehouse.dir": f"{folder}/data/warehouse",
        "spark.hadoop.hive.server2.thrift.bind.host": LOOPBACK,
        "spark.hadoop.hive.server2.thrift.port": str(settings.sql_port),
        # Scratch folders of sessions, else in /tmp for all users of the machine.
        "spark.hadoop.hive.exec.scratchdir": f"{scratch}/scratch",
        "spark.hadoop.hive.exec.local.scratchdir": str(scratch),
        "spark.hadoop.hive.downloaded.resources.dir": f"{scratch}/resources",
        "spark.local.dir": f"{scratch}/spark",
        "spark.driver.bindAddress": LOOPBACK,
        "spark.driver.host": LOOPBACK,
        # A web page less: what it would show is in the log, and its port would collide with the jobs' pages.
        "spark.ui.enabled": "false",
    }
    return (
        f"{SPARK_HOME}/bin/spark-submit",
        "--master",
        "local[2]",
        "--driver-memory",
        "1g",
        "--driver-class-path",
        spark_class_path(),
        "--driver-java-options",
        f"{SHARED_CLASSES} {' '.join(own_options)}",
        *(part for name, value in configuration.items() for part in ("--conf", f"{name}={value}")),
        "--class",
        "org.apache.spark.sql.hive.thriftserver.HiveThriftServer2",
        "spark-internal",
    )


def _prepare(folder: Path) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "conf" / "log4j2.properties", LOG4J2)


def _waits_for(settings: Settings) -> str | None:
    if not accepts(settings.sql_port):
        return f"port {settings.sql_port}"
    where = f"{LOOPBACK}:{settings.sql_port}"
    try:
        connection = connect(LOOPBACK, settings.sql_port, auth_mechanism="PLAIN", timeout=20, retries=1)
        try:
            with connection.cursor() as cursor:
                cursor.execute("select 1")
                return None if cursor.fetchall() == [(1,)] else f"a right answer of {where}"
        finally:
            connection.close()
    except (TException, Error, OSError) as error:
        return f"the server at {where} ({type(error).__name__})"
