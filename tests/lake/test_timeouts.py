"""deltalake was seen to wait for ever: no start and no reader may."""

from __future__ import annotations

import threading

import pytest

from lake.timeouts import answered


def test_a_question_that_is_never_answered_is_asked_again_and_then_an_error() -> None:
    """A start that waits for ever would be worse than one that fails."""
    never, asked = threading.Event(), []

    def answers_the_second_time() -> str:
        asked.append(1)
        if len(asked) == 1:
            never.wait()
        return "an answer"

    def panics() -> None:
        raise GeneratorExit

    assert answered(answers_the_second_time, patience=[0.5, 30.0]) == "an answer"
    with pytest.raises(TimeoutError, match="2 times"):
        answered(never.wait, patience=[0.1, 0.1])
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 // 0)
    # As a panic of Rust is one: it is not waited for.
    with pytest.raises(GeneratorExit):
        answered(panics)
    never.set()
