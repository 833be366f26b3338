"""Spark's jars and those of its jobs in a folder on HDFS, from where YARN's nodes fetch them once.

    python -m submit.spark_jars WEBHDFS_URL [--name-only]

Prints the folder's path on HDFS; uploads the jars where it is not there yet.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from hdfs import HdfsError, InsecureClient

from services.java import JARS, SPARK_HOME

FOLDERS = (SPARK_HOME / "jars", JARS / "spark")


def jars() -> list[Path]:
    return sorted((jar for folder in FOLDERS for jar in folder.glob("*.jar")), key=lambda jar: jar.name)


def folder() -> str:
    """The folder's path on HDFS: another one for other jars."""
    listing = "\n".join(f"{jar.name} {jar.stat().st_size}" for jar in jars())
    return f"/user/{getpass.getuser()}/tickhouse-jars/{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def upload(client: InsecureClient, path: str) -> None:
    """Upload under another name and rename, so that nodes never see a half of it, and two uploads do not meet."""
    unfinished = f"{path}.{os.getpid()}"
    client.delete(unfinished, recursive=True)

    def one(jar: Path) -> None:
        with jar.open("rb") as data:
            client.write(f"{unfinished}/{jar.name}", data)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, jars()))
    if client.status(path, strict=False) is None:
        client.rename(unfinished, path)
    else:
        client.delete(unfinished, recursive=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webhdfs_url", help="address of WebHDFS")
    parser.add_argument("--name-only", action="store_true", help="upload nothing")
    options = parser.parse_args()
    path = folder()
    if not options.name_only:
        session = requests.Session()
        # As the lake's files: no proxy that the environment names.
        session.trust_env = False
        client = InsecureClient(options.webhdfs_url, user=getpass.getuser(), session=session)
        try:
            if client.status(path, strict=False) is None:
                print(f"spark-submit.sh: uploading Spark's jars to {options.webhdfs_url}{path}", file=sys.stderr)
                upload(client, path)
        except (HdfsError, requests.RequestException) as error:
            print(
                f"spark-submit.sh: HDFS at {options.webhdfs_url} does not take Spark's jars: {error}."
                " Does it run? scripts/services up hdfs",
                file=sys.stderr,
            )
            return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
