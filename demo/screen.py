"""The demo's figures as a page for a terminal, or as plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from demo.figures import Figures, Row

# Column -> what stands over it.
CURRENT_PRICE = {"asset": "asset", "price_usd": "price_usd", "source": "source", "event_time": "event_time"}
PRICE_1M = {
    "asset": "asset",
    "window_start": "minute",
    "open": "open",
    "high": "high",
    "low": "low",
    "close": "close",
    "average": "average",
    "tick_count": "ticks",
}


def page(figures: Figures, title: str, notes: Sequence[str]) -> RenderableType:
    """Everything at once."""
    return Group(
        Panel(_flow(figures), title=title, box=box.ROUNDED),
        _table("gold.current_price", figures.prices, CURRENT_PRICE),
        _table("gold.price_1m, the last minutes", figures.minutes, PRICE_1M),
        *notes,
    )


def _flow(figures: Figures) -> str:
    fresh = "no price yet" if figures.freshness is None else f"newest price {figures.freshness:.1f} s old"
    return (
        f"received {figures.received:,} -> published {figures.published:,} -> Kafka {figures.in_kafka:,}"
        f" -> bronze {figures.bronze:,} -> silver {figures.silver:,} (quarantine {figures.quarantine:,})\n"
        f"lag {figures.lag:,} records; {fresh}"
    )


def _table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name, label in columns.items():
        right = bool(rows) and isinstance(rows[0][name], Decimal | int)
        table.add_column(label, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_format_value(row[name]) for name in columns))
    return table


def _format_value(value: object) -> str:
    if isinstance(value, Decimal):
        # Without the zeros that fill it up to twelve decimals, and of an average's decimals what tells something.
        digits = f"{value:,.{2 if value >= 1000 else 4 if value >= 1 else 8}f}"
        return digits.rstrip("0").rstrip(".")
    if isinstance(value, datetime):
        return f"{value:%H:%M:%S}"
    return "" if value is None else str(value)
