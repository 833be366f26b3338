"""Files of any store that Hadoop knows."""

from __future__ import annotations

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession


def content(spark: SparkSession, path: str) -> bytes | None:
    """What a file holds at this moment; None if there is none. Raises Py4JJavaError if it cannot be read."""
    jvm = spark._jvm
    assert jvm is not None
    file = jvm.org.apache.hadoop.fs.Path(path)
    files = file.getFileSystem(spark._jsc.hadoopConfiguration())
    try:
        stream = files.open(file)
    except Py4JJavaError as error:
        if is_a(error, "java.io.FileNotFoundException"):
            return None
        raise
    try:
        return bytes(stream.readAllBytes())
    finally:
        stream.close()


def is_a(error: Py4JJavaError, name: str) -> bool:
    """Whether what Java threw is of the class of that name."""
    return bool(error.java_exception.getClass().getName() == name)
