"""Storage: files, Parquet and Delta's log, without Spark and without a JVM, and without knowledge of ticks.

Of a table this package knows lake.tables.Table. From the bottom up:

- timeouts.py: calls that end after some time, whatever is behind them.
- files.py: the one interface to files, on HDFS (over WebHDFS) and on the local disk; retries and errors.
- parquet.py, frames.py: rows as a Parquet file with Delta's statistics; rows as Polars frames.
- checkpoint.py, log.py: a Delta table's log: read commits and states, commit files as exactly one version, clean it.
- version.py, overtaken.py: errors: the table is of another version; a data file is missing.

The stream: lease.py (who writes a lake), live.py (the files of a table whose rows change), writer.py (the stream's only
way to commit), slices.py (rows that change).

Upkeep and maintenance: compact.py (join files), drop.py (old rows), inventory.py (a big table's files in columns),
beside.py (commit while the stream writes), rewrite.py (replace wrong rows).
"""
