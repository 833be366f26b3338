"""The settings that decide what the tables hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

from conf.settings import Settings
from lake.contract import TickRules
from lake.times import BUCKET_SECONDS


@dataclass(frozen=True)
class AlertRule:
    """An episode opens at a change above threshold_pct within window_seconds, except during the cooldown."""

    threshold_pct: Decimal = Decimal(2)
    window_seconds: int = 10
    cooldown_seconds: int = 60

    @property
    def threshold(self) -> Fraction:
        return Fraction(self.threshold_pct) / 100

    @property
    def reach(self) -> int:
        """How many earlier buckets a tick's window reaches into."""
        return -(-self.window_seconds // BUCKET_SECONDS)


@dataclass(frozen=True)
class GoldRules:
    """Rules of gold. symbols, quotes: see lake.contract.feeds."""

    symbols: Mapping[str, str] = field(default_factory=dict)
    quotes: Mapping[str, str] = field(default_factory=dict)
    future_tolerance_seconds: float = 5.0
    volatility_seconds: int = 60
    alerts: AlertRule = field(default_factory=AlertRule)

    @property
    def volatility_buckets(self) -> int:
        return self.volatility_seconds // BUCKET_SECONDS


def tick_rules(settings: Settings) -> TickRules:
    """The rules of a tick, from the settings."""
    return TickRules(
        rejects_topic=settings.rejects_topic,
        gaps_topic=settings.gaps_topic,
        future_tolerance_seconds=settings.future_tolerance_seconds,
        receipt_tolerance_seconds=settings.receipt_tolerance_seconds,
    )


def gold_rules(settings: Settings) -> GoldRules:
    """The rules of gold, from the settings."""
    alerts = AlertRule(settings.alert_threshold_pct, settings.alert_window_seconds, settings.alert_cooldown_seconds)
    tolerance = settings.future_tolerance_seconds
    return GoldRules(settings.gold_symbols, settings.gold_quotes, tolerance, settings.volatility_seconds, alerts)


# The property of silver.ticks that records the settings that made the tables.
PROPERTY = "tickhouse.settings"
DECIDING = (
    *("future_tolerance_seconds", "receipt_tolerance_seconds", "gold_symbols", "gold_quotes"),
    "volatility_seconds",
    *("alert_threshold_pct", "alert_window_seconds", "alert_cooldown_seconds"),
)


def deciding(settings: Settings) -> str:
    """The settings that decide what silver and gold hold, as JSON."""
    return json.dumps({name: settings.model_dump(mode="json")[name] for name in DECIDING}, sort_keys=True)


def differences(stored: str, settings: Settings) -> list[str]:
    """The settings that differ from those that made the tables, in words."""
    # Before there was the setting, every quote fed gold.
    before, now = {"gold_quotes": {}, **json.loads(stored)}, json.loads(deciding(settings))
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in DECIDING if before.get(name) != now[name]]
