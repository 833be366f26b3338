"""What one connection follows, for venues that are told so on the connection itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from ingestion.instruments import Instrument

Method = Literal["subscribe", "unsubscribe"]
# Every venue takes so many in one request.
NAMES_IN_REQUEST = 100


class Subscription:
    """Instruments by the names that requests and frames have for them."""

    def __init__(
        self,
        instruments: Sequence[Instrument],
        name_of: Callable[[Instrument], str],
        request: Callable[[Method, list[str]], dict[str, object]],
    ) -> None:
        """`request` is the venue's way to ask for these names."""
        self._name_of = name_of
        self._request = request
        self._all: dict[str, Instrument] = {}
        self._subscribed: dict[str, Instrument] = {}
        self._want(instruments)

    @property
    def names(self) -> list[str]:
        """Of what is wanted."""
        return list(self._subscribed)

    def find(self, name: object) -> Instrument | None:
        """What a frame is about. What was left may still send what was under way."""
        return self._all.get(name) if isinstance(name, str) else None

    def frames(self, method: Method, names: Sequence[str]) -> list[str]:
        return [
            json.dumps(self._request(method, list(names[at : at + NAMES_IN_REQUEST])), separators=(",", ":"))
            for at in range(0, len(names), NAMES_IN_REQUEST)
        ]

    def add(self, instruments: Sequence[Instrument]) -> list[str]:
        """The frames that ask for these too."""
        return self.frames("subscribe", self._want(instruments))

    def remove(self, instruments: Iterable[Instrument]) -> list[str]:
        """The frames that ask for these no more."""
        names = [self._name_of(instrument) for instrument in instruments]
        for name in names:
            self._subscribed.pop(name, None)
        return self.frames("unsubscribe", names)

    def _want(self, instruments: Sequence[Instrument]) -> list[str]:
        added = {self._name_of(instrument): instrument for instrument in instruments}
        self._all |= added
        self._subscribed |= added
        return list(added)
