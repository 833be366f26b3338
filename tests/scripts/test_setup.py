"""scripts/setup: says what is missing, refuses what is not what was agreed on, and does nothing twice."""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from conf.settings import PROJECT

NO_SYSTEM_PACKAGE, NOT_FETCHED = 3, 4


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up needs of a checkout, with this one's Python environment."""
    made = tmp_path / "checkout"
    shutil.copytree(PROJECT / "scripts", made / "scripts")
    shutil.copytree(PROJECT / "conf", made / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "requirements.txt", made)
    (made / ".venv").symlink_to(PROJECT / ".venv")
    return made


def setup(checkout: Path, **exported: str) -> subprocess.CompletedProcess[str]:
    command = [checkout / "scripts" / "setup"]
    return subprocess.run(command, cwd="/", env=os.environ | exported, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def processor_seconds() -> float:
    """Of all that this process started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_second_run_takes_less_than_two_seconds() -> None:
    """Of the processor, which a busy machine does not make longer."""
    assert setup(PROJECT).returncode == 0
    before = processor_seconds()
    ran = setup(PROJECT)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert processor_seconds() - before < 2


def test_jars_that_are_not_the_agreed_ones_are_refused_and_the_next_run_goes_on(checkout: Path) -> None:
    agreed = checkout / "conf" / "jars.sha256"
    text = agreed.read_text()
    agreed.write_text(re.sub(r"\b[0-9a-f]{64}(?=  spark/delta-storage)", "0" * 64, text))
    ran = setup(checkout)
    assert ran.returncode == NOT_FETCHED
    assert f"> {'0' * 64}  spark/delta-storage" in ran.stderr
    assert list((checkout / ".tickhouse").iterdir()) == []

    agreed.write_text(text)
    # What a run that was killed half way leaves.
    (checkout / ".tickhouse" / "jars").mkdir()
    ran = setup(checkout)
    assert ran.returncode == 0, ran.stderr
    # This checkout lacks what makes them.
    assert "an archive of the classes that Spark's jobs load" in ran.stderr
    assert "it could not be made (see .tickhouse/spark-classes.log)" in ran.stderr
    found = {
        str(jar.relative_to(checkout / ".tickhouse" / "jars")) for jar in checkout.rglob(".tickhouse/jars/*/*.jar")
    }
    assert found == {line.split()[1] for line in text.splitlines()}


def test_build_tools_have_pinned_hashes_and_build_the_source_packages(checkout: Path) -> None:
    (checkout / ".venv").unlink()
    calls = checkout / "calls"
    # Has every module, installs nothing, and writes down what it is given.
    shows_tools = f'[[ $* != *-r\\ /dev/fd/* ]] || cat "${{@: -1}}" >>{calls}'
    script(checkout / ".venv" / "bin" / "python", f'echo "$@" >>{calls}\n{shows_tools}')
    setup(checkout)
    text = calls.read_text()
    tools, _, everything = text.partition("--no-compile")
    assert sorted(re.findall(r"(?m)^([a-z-]+)==", tools)) == ["pip", "setuptools"]
    assert tools.count("==") == 2
    assert tools.count("--hash=sha256:") >= 2
    assert re.search("install.*--require-hashes.*--no-build-isolation", tools)
    assert everything.startswith(" -r requirements.txt")


def test_a_missing_java_is_named_where_there_is_no_apt(checkout: Path, tmp_path: Path) -> None:
    script(checkout / "scripts" / "java-home", "exit 1")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "basename", "readlink"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "python3.11").symlink_to(sys.executable)
    ran = setup(checkout, PATH=str(tools))
    assert ran.returncode == NO_SYSTEM_PACKAGE
    assert "missing: openjdk-17-jre-headless" in ran.stderr
    assert "install Java 17" in ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs without asking")
def test_root_installs_a_missing_java_and_says_so(checkout: Path, tmp_path: Path) -> None:
    script(checkout / "scripts" / "java-home", f"[[ -e {tmp_path}/installed ]] && echo {tmp_path}")
    script(tmp_path / "bin" / "apt-get", f"[[ $1 != install ]] || echo $@ >{tmp_path}/installed")
    script(tmp_path / "bin" / "apt-cache", "true")
    ran = setup(checkout, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert "setup: installing system packages: openjdk-17-jre-headless" in ran.stderr
    assert (tmp_path / "installed").read_text().split()[-1] == "openjdk-17-jre-headless"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else")
def test_who_may_not_install_is_told_the_command(checkout: Path, tmp_path: Path) -> None:
    script(checkout / "scripts" / "java-home", "exit 1")
    script(tmp_path / "bin" / "sudo", "exit 1")
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(0o755)
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(checkout / "scripts" / "setup")]
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    ran = subprocess.run(as_nobody, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == NO_SYSTEM_PACKAGE
    assert "Type: sudo apt-get install -y openjdk-17-jre-headless" in ran.stderr


def test_an_older_default_java_does_not_matter(tmp_path: Path) -> None:
    """A JAVA_HOME and a java in PATH of version 11 are passed over for a newer one that is installed."""
    old = tmp_path / "java-11"
    script(old / "bin" / "java", "echo 11")
    (old / "release").write_text('JAVA_VERSION="11.0.2"\n')
    found = subprocess.run(
        [PROJECT / "scripts" / "java-home"],
        env=os.environ | {"JAVA_HOME": str(old), "PATH": f"{old}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    version = re.search(r'JAVA_VERSION="(\d+)', (Path(found.stdout.strip()) / "release").read_text())
    assert version
    assert int(version[1]) >= 17


def test_every_python_package_is_pinned_with_hashes_and_no_index() -> None:
    text = (PROJECT / "requirements.txt").read_text()
    entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", text).strip())
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert not re.search(r"https?://|--index|--find-links|file:|(?m:^/)", text)
