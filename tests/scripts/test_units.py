"""scripts/install-units: dry run first, and units that systemd understands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conf.settings import PROJECT

NAMES = {f"tickhouse-{name}.service" for name in ("services", "ingestion", "streaming", "alerting", "notifier")}
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze"
)


def install(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / "scripts" / "install-units"), "--into", str(folder / "root"), *words]
    environment = {**os.environ, "HOME": "/home/somebody"}
    environment.pop("XDG_CONFIG_HOME", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def written(folder: Path) -> set[str]:
    return {str(file.relative_to(folder / "root")) for file in (folder / "root").rglob("*") if file.is_file()}


def test_without_execute_nothing_is_written_and_all_is_shown(tmp_path: Path) -> None:
    ran = install(tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert written(tmp_path) == set()
    assert "--execute does it" in ran.stderr
    assert f"+ExecStart={PROJECT}/.venv/bin/python -m notifier" in ran.stdout


def test_execute_writes_the_units_and_a_second_run_finds_them(tmp_path: Path) -> None:
    assert install(tmp_path, "--execute").returncode == 0
    files = written(tmp_path)
    assert {Path(file).name for file in files if file.endswith(".service")} == NAMES
    assert "etc/systemd/journald@tickhouse.conf" in files
    for file in files:
        assert not re.search("@[A-Z]+@", (tmp_path / "root" / file).read_text()), file
    again = install(tmp_path)
    assert (again.stdout, again.returncode) == ("", 0)
    assert "everything is there already" in again.stderr


def test_a_unit_can_be_left_out_and_a_user_s_units_are_in_the_home(tmp_path: Path) -> None:
    assert install(tmp_path, "--user", "--without", "services", "--execute").returncode == 0
    files = written(tmp_path)
    assert {Path(file).name for file in files if file.endswith(".service")} == NAMES - {"tickhouse-services.service"}
    assert all(file.startswith("home/somebody/.config/systemd/user/") for file in files)
    assert not [file for file in files if file.endswith("20-system.conf")], "what only the system's manager can do"


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--nonsense"], "is no option"), (["--as"], "lacks its value"), (["--without", "x"], "there are services"),
     (["--as", "no-such-user"], "no such user")],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(words: list[str], says: str, tmp_path: Path) -> None:
    ran = install(tmp_path, *words)
    assert ran.returncode == 2
    assert says in ran.stderr.splitlines()[-1]
    assert written(tmp_path) == set()


def test_units_may_write_where_the_settings_say_and_a_wrong_setting_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TICKHOUSE_STATE_DIR", "/srv/state")
    monkeypatch.setenv("TICKHOUSE_SPOOL_DIR", "/srv/spool")
    assert f"+ReadWritePaths=-{PROJECT}/.tickhouse -/srv/state -/srv/spool\n" in install(tmp_path).stdout
    monkeypatch.setenv("TICKHOUSE_NONSENSE", "1")
    ran = install(tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.endswith("install-units: TICKHOUSE_NONSENSE: there is no such setting\n")


def analyze(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze, which finds the units in `folder` first."""
    # The colon at the end: and then systemd's own.
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:", "XDG_RUNTIME_DIR": "/run"}
    command = ["systemd-analyze", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_systemd
@pytest.mark.parametrize("kind", ["system", "user"])
def test_systemd_understands_the_units(kind: str, tmp_path: Path) -> None:
    assert install(tmp_path, *(["--user"] if kind == "user" else []), "--execute").returncode == 0
    units = sorted((tmp_path / "root").rglob("tickhouse*.*"))
    files = [str(unit) for unit in units if unit.is_file()]
    ran = analyze(Path(files[-1]).parent, "verify", f"--{kind}", *files)
    assert "tickhouse-" not in ran.stderr, "it warns of nothing"
    assert ran.returncode == 0, ran.stderr
    broken = Path(files[-1]).with_name("tickhouse-broken.service")
    broken.write_text("[Service]\nExecStart=/absent/program\nKillMode=nonsense\n")
    assert analyze(broken.parent, "verify", f"--{kind}", str(broken)).returncode != 0, "it would see an error"


@needs_systemd
def test_the_system_s_units_may_do_little(tmp_path: Path) -> None:
    """systemd's own measure of exposure, from 0 to 10: below 3."""
    assert install(tmp_path, "--as", "nobody", "--execute").returncode == 0
    folder = tmp_path / "root" / "etc" / "systemd" / "system"
    for name in NAMES:
        ran = analyze(folder, "security", "--offline=true", "--threshold=30", "--no-pager", str(folder / name))
        assert ran.returncode == 0, ran.stdout.splitlines()[-1]


def test_what_a_unit_starts_is_there_and_its_exit_codes_that_need_somebody_are_not_retried(tmp_path: Path) -> None:
    assert install(tmp_path, "--execute").returncode == 0
    folder = tmp_path / "root" / "etc" / "systemd" / "system"
    common = (folder / "tickhouse-.service.d" / "10-common.conf").read_text()
    assert "\nRestart=on-failure\n" in common
    assert "\nRestartPreventExitStatus=2 3 4 6\n" in common
    for name in NAMES:
        [command] = re.findall(r"(?m)^ExecStart=(.*)$", (folder / name).read_text())
        words = command.split()
        asked = [*words[:-1], "--help"] if words[-1] in ("up", "streaming/ticks.py") else [*words, "--help"]
        ran = subprocess.run(asked, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert (PROJECT / words[-1]).exists() or words[-1] in ("up", "ingestion", "alerting", "notifier")
