"""Files of any store that Hadoop knows."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


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


class Opened(io.RawIOBase):
    """A file, to be read in parts. Raises Py4JJavaError if it cannot be read."""

    def __init__(self, spark: SparkSession, path: str, size: int) -> None:
        """size: of the file, in bytes."""
        jvm = spark._jvm
        assert jvm is not None
        file = jvm.org.apache.hadoop.fs.Path(path)
        self._stream: JavaObject = file.getFileSystem(spark._jsc.hadoopConfiguration()).open(file)
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer) as room:
            self._stream.seek(self._at)
            told = bytes(self._stream.readNBytes(min(len(room), self._size - self._at)))
            room[: len(told)] = told
        self._at += len(told)
        return len(told)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def is_a(error: Py4JJavaError, name: str) -> bool:
    """Whether what Java threw is of the class of that name."""
    return bool(error.java_exception.getClass().getName() == name)
