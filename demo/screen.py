"""The demo's figures as a page for a terminal, or as plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from demo.figures import Figures, Row


def page(figures: Figures, title: str, notes: Sequence[str]) -> RenderableType:
    """Everything at once."""
    return Group(
        Panel(_flow(figures), title=title, box=box.ROUNDED),
        _table("gold.current_price", figures.prices, ("asset", "price_usd", "source", "event_time")),
        _table(
            "gold.price_1m, the last minutes",
            figures.minutes,
            ("asset", "window_start", "open", "high", "low", "close", "average", "volume", "tick_count"),
        ),
        *notes,
    )


def _flow(figures: Figures) -> str:
    fresh = "no price yet" if figures.freshness is None else f"newest price {figures.freshness:.1f} s old"
    return (
        f"received {figures.received:,} -> published {figures.published:,} -> Kafka {figures.in_kafka:,}"
        f" -> bronze {figures.bronze:,} -> silver {figures.silver:,} (quarantine {figures.quarantine:,})\n"
        f"lag {figures.lag:,} records; {fresh}"
    )


def _table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = bool(rows) and isinstance(rows[0][name], Decimal | int)
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in columns))
    return table


def _shown(value: object) -> str:
    if isinstance(value, Decimal):
        # Exact, without the zeros that fill it up to twelve decimals; an average has all twelve: eight say enough.
        return f"{round(value, 8).normalize():,f}"
    if isinstance(value, datetime):
        return f"{value:%H:%M:%S}"
    return "" if value is None else str(value)
