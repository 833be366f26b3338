"""What one connection follows, for venues that are told so on the connection itself.

A venue may refuse an instrument, and some refuse a whole request because of one of its instruments. The others are then
asked for again; the refused one is left out of later requests until `ask_refused`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from ingestion.instruments import Instrument
from ingestion.ticks import Control

Method = Literal["subscribe", "unsubscribe"]
# Every venue takes so many in one request.
NAMES_IN_REQUEST = 100
# A refusal that is about load and not about an instrument is answered by asking again, so much later and so often.
AGAIN_SECONDS = 5.0
MOST_REPEATS = 5

_passing = re.compile(
    r"\brate\b|too many|\blimit|busy|internal|temporar|unavailable|try again|time.?out|maintenance|overload",
    re.IGNORECASE,
).search


class Subscription:
    """Instruments by the names that requests and frames have for them."""

    def __init__(
        self,
        instruments: Sequence[Instrument],
        name_of: Callable[[Instrument], str],
        request: Callable[[Method, list[str], int], dict[str, object]],
    ) -> None:
        """`request` is the venue's way to ask for these names; its last argument numbers the requests."""
        self._name_of = name_of
        self._request = request
        self._numbers = itertools.count(1)
        self._all: dict[str, Instrument] = {}
        self._subscribed: dict[str, Instrument] = {}
        self._requests: dict[int, list[str]] = {}
        """The names of each request to subscribe since the last connection was opened."""
        self._repeats = 0
        self._refused: dict[str, str] = {}
        self._want(instruments)

    @property
    def names(self) -> list[str]:
        """Of what is wanted, without what the venue has refused; where it has refused all of it, all."""
        return [name for name in self._subscribed if name not in self._refused] or list(self._subscribed)

    @property
    def refused(self) -> dict[str, str]:
        """The venue's reason for each symbol that is wanted and that it refuses."""
        return {
            self._subscribed[name].symbol: reason
            for name, reason in tuple(self._refused.items())
            if name in self._subscribed
        }

    def find(self, name: object) -> Instrument | None:
        """What a frame is about. What was left may still send what was under way."""
        return self._all.get(name) if isinstance(name, str) else None

    def opening(self, names: Sequence[str]) -> list[str]:
        """The frames that ask for these on a new connection."""
        self._requests.clear()
        self._repeats = 0
        return self.frames("subscribe", names)

    def frames(self, method: Method, names: Sequence[str]) -> list[str]:
        texts = []
        for at in range(0, len(names), NAMES_IN_REQUEST):
            number, part = next(self._numbers), list(names[at : at + NAMES_IN_REQUEST])
            if method == "subscribe":
                self._requests[number] = part
            texts.append(json.dumps(self._request(method, part, number), separators=(",", ":")))
        return texts

    def add(self, instruments: Sequence[Instrument]) -> list[str]:
        """The frames that ask for these too."""
        return self.frames("subscribe", self._want(instruments))

    def remove(self, instruments: Iterable[Instrument]) -> list[str]:
        """The frames that ask for these no more."""
        names = [self._name_of(instrument) for instrument in instruments]
        for name in names:
            self._subscribed.pop(name, None)
            self._refused.pop(name, None)
        return self.frames("unsubscribe", names)

    def ask_refused(self) -> list[str]:
        """The frames that ask once more for what was refused, each name in a request of its own."""
        names = [name for name in self._refused if name in self._subscribed]
        self._refused.clear()
        return [text for name in names for text in self.frames("subscribe", [name])]

    # What an error reply means

    def refuse(self, names: Sequence[str], reason: str, *, others_too: bool) -> Control:
        """The venue refuses these; `others_too`: and with them the other names of their requests, for now."""
        others: dict[str, None] = {}
        for number, part in tuple(self._requests.items()) if others_too else ():
            if not set(part).isdisjoint(names):
                del self._requests[number]
                others |= dict.fromkeys(part)
        if _passing(reason):
            return self._again([*others] or names, reason)
        for name in names:
            if name in self._subscribed:
                self._refused[name] = reason
        rest = [name for name in others if name in self._subscribed and name not in self._refused]
        symbol = self._all[names[0]].symbol if names else None
        return Control("error", reason, symbol, frames=tuple(self.frames("subscribe", rest)))

    def refuse_request(self, number: object, reason: str) -> Control:
        """The venue refuses the request with this number, whatever in it may be why: its halves are asked for."""
        part = self._requests.pop(number, []) if isinstance(number, int) else []
        if _passing(reason):
            return self._again(part, reason)
        if len(part) == 1:
            return self.refuse(part, reason, others_too=False)
        half = len(part) // 2
        texts = [*self.frames("subscribe", part[:half]), *self.frames("subscribe", part[half:])]
        return Control("error", reason, frames=tuple(texts))

    def refuse_unnamed(self, reason: str, confirmed: Iterable[str]) -> Control:
        """The venue refuses a request and does not say which: what it has not confirmed is asked for one by one."""
        settled = {*confirmed, *self._refused}
        parts = [[name for name in part if name not in settled] for part in self._requests.values()]
        if _passing(reason):
            return self._again([name for part in parts for name in part], reason)
        self._requests.clear()
        singles = [name for part in parts if len(part) > 1 for name in part]
        return Control(
            "error", reason, frames=tuple(text for one in singles for text in self.frames("subscribe", [one]))
        )

    def _again(self, names: Sequence[str], reason: str) -> Control:
        self._repeats += 1
        if not names or self._repeats > MOST_REPEATS:
            return Control("error", reason)
        return Control("error", reason, frames=tuple(self.frames("subscribe", names)), delay=AGAIN_SECONDS)

    def _want(self, instruments: Sequence[Instrument]) -> list[str]:
        added = {self._name_of(instrument): instrument for instrument in instruments}
        self._all |= added
        self._subscribed |= added
        return list(added)
