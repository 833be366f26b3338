"""What the demo shows fits a terminal of 80 columns and says what it should."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from decimal import Decimal

from rich.console import Console

from demo.figures import Figures
from demo.screen import page

NOON = datetime(2024, 8, 9, 12, 0, tzinfo=UTC)


def shown(figures: Figures) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(page(figures, "title", ["a note"]))
    return captured.get()


def test_prices_keep_their_digits_but_not_the_zeros_that_fill_them_up() -> None:
    prices = [
        {"asset": asset, "price_usd": Decimal(price), "source": "binance", "event_time": NOON}
        for asset, price in (("bitcoin", "61685.990000000000"), ("shiba-inu", "0.000013920000"), ("gold", "2400.0"))
    ]
    text = shown(Figures(received=12345, lag=7, freshness=0.51, prices=prices))
    assert "61,685.99 " in text
    assert "0.00001392 " in text
    assert "2,400 " in text
    assert "12:00:00" in text
    assert "received 12,345" in text
    assert "lag 7 records; newest price 0.5 s old" in text
    assert text.rstrip().endswith("a note")


def test_a_minute_fits_80_columns() -> None:
    price = Decimal("61685.991234567891")
    minute = dict.fromkeys(("open", "high", "low", "close", "average"), price)
    text = shown(Figures(minutes=[{"asset": "bitcoin", "window_start": NOON, "tick_count": 1234, **minute}]))
    assert "…" not in text
    assert text.count("61,685.99 ") == 5
