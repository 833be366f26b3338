"""A clock that is set while we run moves no tick."""

from ingestion.clock import Clock


class Machine:
    """A machine's two clocks, in nanoseconds."""

    wall = 1_700_000_000_000_000_000
    elapsed = 5_000_000_000

    def pass_time(self, nanoseconds: int) -> None:
        self.wall += nanoseconds
        self.elapsed += nanoseconds


def test_a_stepped_clock_is_noticed_once_and_moves_no_receipt_time() -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed)
    machine.pass_time(1_000_000_000)
    assert clock.now_ns() == 1_700_000_001_000_000_000
    assert clock.check() == 0

    machine.wall -= 3_600_000_000_000
    machine.pass_time(1_000_000_000)
    assert clock.now_ns() == 1_700_000_002_000_000_000
    assert clock.check() == -3_600_000_000_000
    assert clock.check() == 0


def test_a_clock_that_is_slowly_kept_right_is_no_step() -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed)
    for _ in range(100):
        machine.pass_time(5_000_000_000)
        machine.wall += 20_000_000
        assert clock.check() == 0


def test_the_real_clock_tells_the_present() -> None:
    clock = Clock()
    first = clock.now_ns()
    assert first <= clock.now_ns()
    assert clock.check() == 0
