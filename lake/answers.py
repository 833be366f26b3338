"""Questions to deltalake with a limit to how long they may take."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def answered(ask: Callable[[], Answer], tries: int = 3, seconds: float = 30.0) -> Answer:
    """What a question to deltalake gives. Raises what it raises, and TimeoutError if it never answers.

    Of some hundreds of questions to HDFS one was seen to wait for ever inside the library, while
    other processes had their answers at once.
    """
    for number in range(1, tries + 1):
        answer: Future[Answer] = Future()
        threading.Thread(target=_answer, args=(ask, answer), name="deltalake", daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError:
            logger.warning("deltalake does not answer for %g s (%d of %d)", seconds, number, tries)
    raise TimeoutError(f"deltalake has not answered {tries} times, {seconds:g} s each: try again")


def _answer(ask: Callable[[], Answer], answer: Future[Answer]) -> None:
    try:
        answer.set_result(ask())
    except Exception as error:  # noqa: BLE001 - raised where it was asked
        answer.set_exception(error)
