"""Storage: files, Parquet and Delta's log, without Spark and without a JVM, and without a word of ticks.

What this room knows of a table is lake.tables.Table. From the bottom up:

- timeouts.py: calls that end after some time, whatever is behind them.
- files.py: the one interface to files, on HDFS (over WebHDFS) and on the local disk; retries and errors.
- parquet.py: rows as a Parquet file with Delta's statistics; a table's schema for Arrow and for Delta.
- log.py: a Delta table's log: read commits and states, commit files as exactly one version.
- lease.py: who writes a lake, as a file that the writer renews.
"""
