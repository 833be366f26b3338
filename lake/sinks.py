"""Gold for those without Delta, as it changes: on the console, or as plain Parquet files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol, TextIO

from pyspark.sql import SparkSession

from lake.parquet import arrow_table, encoded
from lake.tables import Column, Table

Row = tuple[object, ...]


class Sink(Protocol):
    """What is told of each change of a gold table, once it is committed."""

    def changed(self, table: Table, spans: Mapping[int, Sequence[Row]], rows: Sequence[Row]) -> None:
        """spans: all rows of the spans that changed; rows: those of them that are new or others than before."""


def is_of_the_contract(column: Column) -> bool:
    """Not one that only serves merging."""
    return not column.comment.startswith("for merging")


class Console:
    """A line for each row that changes: the table, then its columns."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out

    def changed(self, table: Table, spans: Mapping[int, Sequence[Row]], rows: Sequence[Row]) -> None:
        for row in rows:
            values = (
                f"{column.name}={_told(value)}"
                for column, value in zip(table.columns, row, strict=True)
                if is_of_the_contract(column) and column.name != "updated_at"
            )
            print(table.qualified_name, *values, file=self._out, flush=True)


def _told(value: object) -> str:
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.isoformat() if isinstance(value, datetime) else str(value)


class PlainParquet:
    """Files PATH/TABLE/SPAN.parquet, each replaced as a whole, with the contract's columns."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        jvm, gateway = spark._jvm, spark.sparkContext._gateway
        assert jvm is not None
        assert gateway is not None
        self._fs = jvm.org.apache.hadoop.fs
        self._path = path
        configuration = spark._jsc.hadoopConfiguration()
        self._files = self._fs.Path(path).getFileSystem(configuration)
        self._context = self._fs.FileContext.getFileContext(self._files.getUri(), configuration)
        rename = getattr(self._fs, "Options$Rename")
        self._overwrite = gateway.new_array(rename, 1)
        self._overwrite[0] = rename.OVERWRITE

    def changed(self, table: Table, spans: Mapping[int, Sequence[Row]], rows: Sequence[Row]) -> None:
        for number, content in spans.items():
            made = arrow_table(table, content)
            plain = made.select([column.name for column in table.columns if is_of_the_contract(column)])
            folder = f"{self._path}/{table.name}"
            # Hidden from readers until it is whole.
            draft = self._fs.Path(f"{folder}/.{number}.parquet")
            stream = self._files.create(draft, True)
            try:
                stream.write(encoded(plain))
            finally:
                stream.close()
            self._context.rename(draft, self._fs.Path(f"{folder}/{number}.parquet"), self._overwrite)
