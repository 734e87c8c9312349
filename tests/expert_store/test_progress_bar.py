"""What is shown of long work: speed and remaining time of this run, in a terminal and in a file."""

import io
import time

import pytest
from rich.console import Console

from expert_store.progress_bar import progress_bar


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console(width: int = 80, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_lines_in_a_file_now_and_then_and_at_the_end(clock: Clock) -> None:
    """Work that was done before, as by an interrupted run, says nothing about speed."""
    file = console(width=20)
    with progress_bar(file, "packing [x]") as progress:
        for second in range(25):
            progress(5_000_000_000 + second * 100_000_000, 10_000_000_000)
            clock.now += 1
    assert printed(file) == [
        "packing [x]: 60%, 6 GB of 10 GB, 100 MB/s, 40 s left",
        "packing [x]: 70%, 7 GB of 10 GB, 100 MB/s, 30 s left",
        "packing [x]: 74%, 7.4 GB of 10 GB, 96 MB/s, 27 s left",
    ]


def test_the_last_line_says_100_percent(clock: Clock) -> None:
    file = console()
    with progress_bar(file, "verifying") as progress:
        progress(0, 3000)
        clock.now += 2
        progress(3000, 3000)
    assert printed(file) == ["verifying: 100%, 3 kB of 3 kB, 1.5 kB/s"]


def test_nothing_to_do_and_failures_are_shown_as_they_are(clock: Clock) -> None:
    file = console()
    with progress_bar(file, "loading"):
        pass
    assert printed(file) == ["loading: 100%, 0 B of 0 B, 0 B/s"]
    with pytest.raises(ValueError, match="damaged"), progress_bar(file, "verifying"):
        raise ValueError("damaged")
    assert len(printed(file)) == 1


def test_a_bar_in_a_terminal() -> None:
    terminal = console(terminal=True)
    with progress_bar(terminal, "packing a model of some long name at 5 bits, dense 8") as progress:
        for done in (31_000_000_000, 31_000_000_001, 31_000_000_002):
            progress(done, 62_000_000_000)
            time.sleep(0.01)
    title, *_, last, _ = printed(terminal)
    assert title == "packing a model of some long name at 5 bits, dense 8"
    assert "50% 31.0/62.0 GB" in last and " bytes/s " in last, "not GB/s: those were there before"
