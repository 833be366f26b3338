"""Read the lake's tables without Spark, from notebooks, tests and scripts: DuckDB's SQL over Delta files.

Tables are named as in the lake, for example gold.price_1m; so is the view gold.top_movers. A read sees each
table's newest version.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from lake.delta.overtaken import explained
from lake.delta.timeouts import answered
from lake.tables import GOLD_PRICE_1M, GOLD_TOP_MOVERS, TABLES, TOP_MOVERS, Table


class NoSuchTable(LookupError):
    """The lake has no such table: nothing has written it yet, or the root is wrong."""


def open_table(root: str, table: Table) -> DeltaTable:
    """The newest version of a table under a lake's root. Raises NoSuchTable, and TimeoutError after two minutes."""
    try:
        return answered(lambda: DeltaTable(table.path(root)))
    except TableNotFoundError:
        raise NoSuchTable(f"{table.qualified_name} is not in the lake {root}") from None


def query(root: str, sql: str) -> pa.Table:
    """The result of a SELECT over the lake's tables, times in UTC.

    Raises NoSuchTable; Overtaken if it takes longer than the tables keep replaced files (start again); FileLost if the
    lake is damaged; and duckdb.Error for a mistake in the query.
    """
    sql = sql.replace(GOLD_TOP_MOVERS, f"({TOP_MOVERS.format(GOLD_PRICE_1M.qualified_name)})")
    opened: dict[Table, DeltaTable] = {}
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for table in TABLES:
            if table.qualified_name in sql:
                registered = f"{table.database}__{table.name}"
                opened[table] = open_table(root, table)
                connection.register(registered, opened[table].to_pyarrow_dataset())
                connection.execute(f"CREATE SCHEMA IF NOT EXISTS {table.database}")
                connection.execute(f"CREATE VIEW {table.qualified_name} AS SELECT * FROM {registered}")
        try:
            return connection.sql(sql).to_arrow_table()
        except (duckdb.Error, OSError) as error:
            for table, version in opened.items():
                if cause := _cause(root, table, version, str(error)):
                    raise cause from error
            raise


def _cause(root: str, table: Table, read: DeltaTable, text: str) -> Exception | None:
    """The error of a failed read if it is about this table's files. text: of the failure."""
    newest = open_table(root, table)
    configuration = newest.metadata().configuration
    versions = (read.file_uris(), newest.file_uris())
    return explained(text, table.qualified_name, read.version(), *versions, configuration)


def read(root: str, table: Table, where: str = "true") -> pa.Table:
    """A table's rows that satisfy an SQL condition. Raises NoSuchTable."""
    return query(root, f"SELECT * FROM {table.qualified_name} WHERE {where}")


def row_count(root: str, table: Table) -> int:
    """How many rows the table has, from its log alone; 0 if nothing has written it yet."""
    try:
        files = open_table(root, table).get_add_actions(flatten=True)
    except NoSuchTable:
        return 0
    return sum(pa.table(files)["num_records"].to_pylist())
