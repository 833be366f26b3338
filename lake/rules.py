"""The settings that decide what the tables hold."""

from __future__ import annotations

from conf.settings import Settings
from lake.alerts import Rule
from lake.metrics import GoldRules


def gold_rules(settings: Settings) -> GoldRules:
    """Those of gold."""
    alerts = Rule(settings.alert_threshold_pct, settings.alert_window_seconds, settings.alert_cooldown_seconds)
    return GoldRules(settings.gold_symbols, settings.future_tolerance_seconds, settings.volatility_seconds, alerts)
