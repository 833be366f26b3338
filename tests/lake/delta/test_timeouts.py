"""deltalake was seen to wait for ever: no start and no reader may."""

from __future__ import annotations

import threading

import pytest

from lake.delta.timeouts import answered


def test_a_call_that_never_returns_is_made_again_and_then_an_error() -> None:
    """A start that waits for ever would be worse than one that fails."""
    never, calls = threading.Event(), []

    def returns_the_second_time() -> str:
        calls.append(1)
        if len(calls) == 1:
            never.wait()
        return "an answer"

    def panics() -> None:
        raise GeneratorExit

    assert answered(returns_the_second_time, patience=[0.5, 30.0]) == "an answer"
    with pytest.raises(TimeoutError, match="the store has not answered 2 times"):
        answered(never.wait, patience=[0.1, 0.1], who="the store")
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 // 0)
    # As a panic of Rust is one: we do not wait for it.
    with pytest.raises(GeneratorExit):
        answered(panics)
    never.set()


def test_a_time_out_of_the_call_itself_is_not_retried() -> None:
    calls = []

    def times_out() -> None:
        calls.append(1)
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        answered(times_out)
    assert len(calls) == 1
