"""Name a lake's tables for SQL: databases bronze, silver, gold, quality in the Thrift Server's metastore.

Registering again changes nothing, and names what has appeared since. A metastore serves one lake: where a database of
that name lies under another root, nothing is changed and the exit code is 2.
"""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import impala.dbapi
from impala.error import Error as SqlError
from thrift.transport.TTransport import TTransportException

from conf.settings import USAGE_ERROR, Settings, arguments, from_command_line
from lake.reader import NoSuchTable, open_table
from lake.tables import GOLD_PRICE_1M, GOLD_TOP_MOVERS, TABLES, TOP_MOVERS, Table

# Of a database: the lake that it was registered for.
ROOT_PROPERTY = "tickhouse.root"
SETTINGS = ("sql_host", "sql_port", "lake_root")


class Cursor(Protocol):
    """As much of a DB-API cursor as is used here."""

    def execute(self, operation: str) -> object: ...

    def fetchall(self) -> list[tuple[object, ...]]: ...


class AnotherLake(RuntimeError):
    """The metastore already names a lake under another root."""


def sql_connection(settings: Settings) -> impala.dbapi.HiveServer2Connection:
    """A connection to the Thrift Server as the user of this process, whom HDFS lets read what is ours."""
    user = getpass.getuser()
    return impala.dbapi.connect(settings.sql_host, settings.sql_port, auth_mechanism="PLAIN", user=user, password="-")


def register(cursor: Cursor, root: str, tables: Sequence[Table]) -> None:
    """Name these tables of the lake at root, which must exist there. Raises AnotherLake before it changes anything."""
    databases = {table.database for table in TABLES}
    for database, registered in _roots(cursor, databases).items():
        if registered != root:
            raise AnotherLake(
                f"the metastore has a database {database} of {registered or 'something else'}; a metastore serves one "
                f"lake, and {root} is another: use a Thrift Server with a metastore of its own"
            )
    for database in sorted(databases):
        # Nothing of the database itself lies in the lake: creating a table would leave traces there.
        cursor.execute(f"CREATE DATABASE IF NOT EXISTS {database} WITH DBPROPERTIES ('{ROOT_PROPERTY}' = '{root}')")
    for table in tables:
        cursor.execute(f"CREATE TABLE IF NOT EXISTS {table.qualified_name} USING delta LOCATION '{table.path(root)}'")
    if GOLD_PRICE_1M in tables:
        cursor.execute(f"CREATE OR REPLACE VIEW {GOLD_TOP_MOVERS} AS {TOP_MOVERS.format(GOLD_PRICE_1M.qualified_name)}")


def _roots(cursor: Cursor, databases: set[str]) -> dict[str, str | None]:
    """The root of the lake that each existing database was registered for; None if for no lake."""
    cursor.execute("SHOW DATABASES")
    present = [str(row[0]) for row in cursor.fetchall() if row[0] in databases]
    roots: dict[str, str | None] = {}
    for database in present:
        cursor.execute(f"DESCRIBE DATABASE EXTENDED {database}")
        properties = {row[0]: str(row[1]) for row in cursor.fetchall()}.get("Properties", "")
        root = re.search(rf"\({re.escape(ROOT_PROPERTY)},([^)]*)\)", properties)
        roots[database] = root[1] if root else None
    return roots


def existing_tables(root: str, report: Callable[[str], None] = print) -> list[Table]:
    """The tables that have been written so far; reports the others."""
    tables = []
    for table in TABLES:
        try:
            open_table(root, table)
        except NoSuchTable as error:
            report(f"not registered: {error}")
        else:
            tables.append(table)
    return tables


def register_lake(settings: Settings, report: Callable[[str], None] = print) -> int:
    """Name all tables that the lake has. Returns their number. Raises AnotherLake, SqlError or TTransportException."""
    tables = existing_tables(settings.lake_root, report)
    with sql_connection(settings) as connection, connection.cursor() as cursor:
        register(cursor, settings.lake_root, tables)
    return len(tables)


def main(argv: Sequence[str] | None = None) -> int:
    settings, _ = from_command_line(arguments(__doc__, *SETTINGS), argv)
    server = f"{settings.sql_host}:{settings.sql_port}"
    try:
        number = register_lake(settings)
    except AnotherLake as error:
        print(f"register-tables: {error}", file=sys.stderr)
        return USAGE_ERROR
    except TTransportException as error:
        print(f"register-tables: no Thrift Server at {server} ({error}); scripts/services up sql", file=sys.stderr)
        return 1
    except SqlError as error:
        print(f"register-tables: the Thrift Server at {server} says: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{number} tables of {settings.lake_root} are registered at jdbc:hive2://{server}")
    return 0 if number else 1


if __name__ == "__main__":
    raise SystemExit(main())
