"""Settings show no secret: in no message, no listing and no flag."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.settings import PROJECT, Settings, SettingsError, arguments, is_secret, read_settings
from conf.text import redacted

CANARY = "canary-51c0ffee"
NUMBER = "98765432"
SECRETS = [name for name, field in Settings.model_fields.items() if is_secret(field.annotation)]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    file = tmp_path / "settings.toml"
    file.touch(mode=0o600)
    return file


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{NUMBER}@h:99999/",
        f"https://:{NUMBER}@h:0/",
        f"https://user:{NUMBER}@/ x",
        f"https://user:{NUMBER}/x@h/",
        f"https://user:a b:{NUMBER}@h/",
        f"redis://:{NUMBER}@h",
        f"ftp://user:{NUMBER}@h",
    ],
)
@pytest.mark.parametrize("name", ["webhook_url", "webhdfs_url", "url", "checkpoint", "lake_root"])
@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_a_message_about_a_url_has_no_password(name: str, url: str, source: str, conf: Path) -> None:
    exported, flags = {}, {}
    if source == "file":
        conf.write_text(f'{name} = "{url}"')
    elif source == "environment":
        exported = {f"TICKHOUSE_{name.upper()}": url}
    else:
        flags = {name: url}
    message = ""
    try:
        message = redacted(str(read_settings(flags, exported, conf)))
    except SettingsError as wrong:
        message = str(wrong)
    assert name in message.lower().replace("-", "_")
    assert NUMBER not in message


def test_a_port_of_a_url_is_checked_behind_its_user_and_its_ipv6_address(conf: Path) -> None:
    for url in (
        f"wss://user:{NUMBER}@h:443/x",
        "wss://[::1]/x",
        "wss://[fe80::99999:0]/",
        "wss://h/stream?s=a@b:99999",
    ):
        assert read_settings({}, {"TICKHOUSE_URL": url}, conf).url == url
    for url in ("wss://[::1]:99999/", "wss://user:1@h:70000", "wss://h:0", "wss://h:" + "9" * 5_000):
        with pytest.raises(SettingsError, match="its port is not between 1 and 65535"):
            read_settings({}, {"TICKHOUSE_URL": url}, conf)
    with pytest.raises(SettingsError, match="its port"):
        read_settings({}, {"TICKHOUSE_KAFKA_BOOTSTRAP_SERVERS": "a:1,b:99999,c:2"}, conf)


def test_the_listing_of_settings_has_no_secret(conf: Path) -> None:
    conf.write_text(
        f'webhook_url = "https://h/{CANARY}"\nsmtp_password = "{CANARY}"\ncoincap_api_key = "{CANARY}"\n'
        f'url = "wss://user:{CANARY}@h/"\nrest_urls = {{ coinbase = "https://user:{CANARY}@h/" }}\n'
    )
    command = [sys.executable, "-m", "conf.settings", "--conf", str(conf)]
    ran = subprocess.run(command, cwd=PROJECT, env={}, capture_output=True, text=True, check=True)
    assert CANARY not in ran.stdout + ran.stderr
    assert '"wss://***@h/"' in ran.stdout


def test_no_program_has_a_flag_for_a_secret() -> None:
    assert {"webhook_url", "smtp_password", "coincap_api_key"} <= set(SECRETS)
    for name in SECRETS:
        with pytest.raises(ValueError, match="secret"):
            arguments(None, name)
    for program in ("conf.settings", "notifier", "alerting", "ingestion"):
        shown = subprocess.run(
            [sys.executable, "-m", program, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout
        flags = set(re.findall(r"--[a-z-]+", shown))
        assert "--kafka-bootstrap-servers" in flags
        assert not flags & {"--" + name.replace("_", "-") for name in SECRETS}


def test_a_password_in_a_flag_is_refused(conf: Path) -> None:
    with pytest.raises(SettingsError, match="TICKHOUSE_REST_URLS") as error:
        read_settings({"rest_urls": f"coinbase=https://user:{CANARY}@h/"}, {}, conf)
    assert CANARY not in str(error.value)
    url = "wss://h/ws/btcusdt@trade?streams=ethusdt@trade"
    assert read_settings({"url": url}, {}, conf).url == url


@pytest.mark.parametrize(
    ("text", "mode", "warns"),
    [
        ('smtp_password = "x"', 0o644, True),
        ('smtp_password = "x"', 0o640, True),
        ('smtp_password = "x"', 0o600, False),
        ('rest_urls = { coinbase = "https://user:x@h/" }', 0o644, True),
        ('ticks_topic = "x"', 0o644, False),
    ],
)
def test_a_settings_file_with_secrets_that_others_may_read_deserves_a_warning(
    text: str, mode: int, warns: bool, conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf.write_text(text)
    conf.chmod(mode)
    with caplog.at_level(logging.WARNING):
        read_settings({}, {}, conf)
    assert (f"chmod 600 {conf}" in caplog.text) == warns


def test_a_flag_that_is_on_by_default_can_be_turned_off() -> None:
    parser = arguments(None, "upkeep", "once")
    assert [parser.parse_args(words).upkeep for words in ([], ["--upkeep"], ["--no-upkeep"])] == [None, True, False]
    assert [parser.parse_args(words).once for words in ([], ["--once"])] == [None, True]
