"""Time limits for calls that may never return."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def answered(
    ask: Callable[[], Answer], patience: Sequence[float] = (5.0, 15.0, 30.0, 60.0), who: str = "deltalake"
) -> Answer:
    """Return what `ask()` returns. Raises what it raises, and TimeoutError if no call returns in time.

    patience: seconds to wait for each attempt, one number per attempt. who: the name in messages.

    A call of deltalake takes some hundredths of a second. When jobs started after a kill, one in a hundred calls to
    HDFS never returned, and the second attempt returned at once.
    """
    for number, seconds in enumerate(patience, 1):
        answer: Future[Answer] = Future()
        threading.Thread(target=_call, args=(ask, answer), name=who, daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError:
            if answer.done():  # It answered just now, or raised TimeoutError itself.
                return answer.result()
            logger.warning("%s does not answer for %g s (%d of %d)", who, seconds, number, len(patience))
    raise TimeoutError(f"{who} has not answered {len(patience)} times, in {sum(patience):g} s: try again")


def _call(ask: Callable[[], Answer], answer: Future[Answer]) -> None:
    try:
        answer.set_result(ask())
    except BaseException as error:  # noqa: BLE001 - the caller raises it again, a panic of the library's Rust too
        answer.set_exception(error)
