"""Copies of gold for readers without Delta: lines on the console, or plain Parquet files."""

from __future__ import annotations

import sys
from collections.abc import Collection
from datetime import datetime
from decimal import Decimal
from typing import TextIO

import polars as pl

from lake.delta.files import Files
from lake.delta.parquet import as_stored, encoded
from lake.tables import Column, Table


def is_of_the_contract(column: Column) -> bool:
    """Whether readers may rely on the column; other columns only serve merging."""
    return not column.comment.startswith("for merging")


class Console:
    """Prints a line for each changed row: the table, then its columns."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out

    def changed(self, table: Table, pieces: dict[int, pl.DataFrame], gone: Collection[int], rows: pl.DataFrame) -> None:
        columns = [c.name for c in table.columns if is_of_the_contract(c) and c.name != "updated_at"]
        for row in rows.select(columns).rows():
            values = (f"{name}={_format_value(value)}" for name, value in zip(columns, row, strict=True))
            print(table.qualified_name, *values, file=self._out, flush=True)


def _format_value(value: object) -> str:
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.isoformat() if isinstance(value, datetime) else str(value)


class PlainParquet:
    """Files PATH/TABLE/SPAN.parquet, each replaced as a whole, with the contract's columns."""

    def __init__(self, files: Files, path: str) -> None:
        self._files, self._path = files, path

    def changed(self, table: Table, pieces: dict[int, pl.DataFrame], gone: Collection[int], rows: pl.DataFrame) -> None:
        names = [column.name for column in table.columns if is_of_the_contract(column)]
        for span, piece in pieces.items():
            content = encoded(as_stored(table, piece.to_arrow()).select(names))
            self._files.replace(f"{self._path}/{table.name}/{span}.parquet", content)
        for span in gone:
            self._files.delete(f"{self._path}/{table.name}/{span}.parquet")
