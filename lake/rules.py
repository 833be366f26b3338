"""The settings that decide what the tables hold."""

from __future__ import annotations

import json

from conf.settings import Settings
from lake.alerts import Rule
from lake.metrics import GoldRules


def gold_rules(settings: Settings) -> GoldRules:
    """Those of gold."""
    alerts = Rule(settings.alert_threshold_pct, settings.alert_window_seconds, settings.alert_cooldown_seconds)
    return GoldRules(settings.gold_symbols, settings.future_tolerance_seconds, settings.volatility_seconds, alerts)


# The property of silver.ticks that says by which settings the tables were made.
PROPERTY = "tickhouse.settings"
DECIDING = (
    *("future_tolerance_seconds", "gold_symbols", "volatility_seconds"),
    *("alert_threshold_pct", "alert_window_seconds", "alert_cooldown_seconds"),
)


def deciding(settings: Settings) -> str:
    """The settings that decide what silver and gold hold, as JSON."""
    return json.dumps({name: settings.model_dump(mode="json")[name] for name in DECIDING}, sort_keys=True)


def differences(stored: str, settings: Settings) -> list[str]:
    """Which settings are others than those that the tables were made by, in words."""
    before, now = json.loads(stored), json.loads(deciding(settings))
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in DECIDING if before.get(name) != now[name]]
