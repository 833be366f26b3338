"""What goes to a cluster's nodes is all that a job imports, and not what they have."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from submit import code, packages


def test_the_packages_of_a_job_and_what_they_need() -> None:
    streaming, batch = (packages.needed(packages.IMPORTED[folder]) for folder in ("streaming", "batch"))
    assert {"pydantic", "pydantic-core", "urllib3", "tenacity", "polars"} <= set(streaming)
    # Without which Spark runs no function over Arrow.
    assert {"pyarrow", "pandas", "numpy"} <= set(streaming)
    assert {"great-expectations", "marshmallow"} <= set(batch) - set(streaming)
    assert not packages.SHIPPED_BY_SPARK & {*streaming, *batch}


def test_a_python_with_nothing_of_ours_imports_them_from_the_archive(tmp_path: Path) -> None:
    if not packages.archive("streaming").exists():
        packages.make("streaming")
    with tarfile.open(packages.archive("streaming")) as archive:
        archive.extractall(tmp_path / "packages", filter="data")
    code.make()
    program = (
        "import pydantic, urllib3, tenacity, pandas, polars, pyarrow.parquet, importlib.metadata as m; "
        "from conf.settings import Settings; print(Settings().sql_port)"
    )
    ran = subprocess.run(
        # -S: without the site-packages of the environment that the tests run in.
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": f"{tmp_path}/packages:{code.SHIPPED}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().isdigit()


def test_the_code_is_that_of_the_jobs_only() -> None:
    code.make()
    with zipfile.ZipFile(code.SHIPPED) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == set(code.FOLDERS)
