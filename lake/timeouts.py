"""Calls of deltalake that end after some time, whatever the library does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def answered(ask: Callable[[], Answer], patience: Sequence[float] = (5.0, 15.0, 30.0, 60.0)) -> Answer:
    """What a question to deltalake gives. Raises what it raises, and TimeoutError if it does not answer.

    patience: for how many seconds it is waited each time that the question is asked. An answer takes some hundredths
    of a second. One in a hundred questions to HDFS was seen to wait for ever inside the library, at the starts of jobs
    that had been killed; asked once more it was answered at once.
    """
    for number, seconds in enumerate(patience, 1):
        answer: Future[Answer] = Future()
        threading.Thread(target=_answer, args=(ask, answer), name="deltalake", daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError:
            logger.warning("deltalake does not answer for %g s (%d of %d)", seconds, number, len(patience))
    raise TimeoutError(f"deltalake has not answered {len(patience)} times, in {sum(patience):g} s: try again")


def _answer(ask: Callable[[], Answer], answer: Future[Answer]) -> None:
    try:
        answer.set_result(ask())
    except BaseException as error:  # noqa: BLE001 - raised where it was asked, a panic of the library's Rust too
        answer.set_exception(error)
