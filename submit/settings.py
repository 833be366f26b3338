"""The settings that a Spark job takes, as a file for a driver on another machine: no other setting leaves this one.

    python -m submit.settings [--name-only] [job's arguments]

Prints the file's path. The file holds what the settings file and the environment say. It does not hold the job's flags:
they go along as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from conf.settings import ENVIRONMENT_PREFIX, PROJECT, USAGE_ERROR, Settings, SettingsError, read_settings

SHIPPED = PROJECT / ".tickhouse" / "ship"
# The allow-list: what lake/, streaming/ and batch/ read.
JOB_SETTINGS = (
    *("kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic"),
    *("lake_root", "checkpoint", "webhdfs_url"),
    *("future_tolerance_seconds", "receipt_tolerance_seconds", "gold_symbols", "gold_quotes"),
    *("volatility_seconds", "alert_threshold_pct", "alert_window_seconds", "alert_cooldown_seconds"),
    *("trigger_seconds", "max_offsets_per_trigger", "rebuild", "once"),
    *("upkeep", "upkeep_seconds", "history_minutes", "keep_days", "debt_files"),
    *("stream_metrics_port", "stream_stale_seconds"),
)


def withheld() -> list[str]:
    """The environment's variables of settings that no job takes."""
    names = sorted(Settings.model_fields.keys() - set(JOB_SETTINGS))
    return [variable for name in names if (variable := ENVIRONMENT_PREFIX + name.upper()) in os.environ]


def toml(settings: Settings) -> str:
    """The settings of a job that are not the defaults, as TOML."""
    values = settings.model_dump(mode="json", include=set(JOB_SETTINGS), exclude_defaults=True)
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(name)} = {_toml_value(text)}" for name, text in value.items()) + "}"
    # JSON's texts, numbers, flags and lists are TOML's.
    return json.dumps(value, ensure_ascii=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("--name-only", action="store_true", help="make nothing")
    parser.add_argument("--conf", type=Path, help="the job's settings file")
    options, _ = parser.parse_known_args()
    try:
        text = toml(read_settings(file=options.conf))
    except SettingsError as error:
        print(f"spark-submit.sh: {error}", file=sys.stderr)
        return USAGE_ERROR
    # Another name for other settings: two jobs that are being submitted do not change places.
    path = SHIPPED / f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
    if not options.name_only:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
