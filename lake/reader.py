"""Read the lake's tables without Spark, from notebooks, tests and scripts: DuckDB's SQL over Delta files.

Tables are named as in the lake, for example gold.price_1m; so is the view gold.top_movers. A read sees each
table's newest version.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

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
    """The result of a SELECT over the lake's tables, times in UTC. Raises NoSuchTable."""
    sql = sql.replace(GOLD_TOP_MOVERS, f"({TOP_MOVERS.format(GOLD_PRICE_1M.qualified_name)})")
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for table in TABLES:
            if table.qualified_name in sql:
                registered = f"{table.database}__{table.name}"
                connection.register(registered, open_table(root, table).to_pyarrow_dataset())
                connection.execute(f"CREATE SCHEMA IF NOT EXISTS {table.database}")
                connection.execute(f"CREATE VIEW {table.qualified_name} AS SELECT * FROM {registered}")
        return connection.sql(sql).to_arrow_table()


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
