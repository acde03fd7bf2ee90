from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from qdexport.cli.progress import Progress
from qdexport.core.progress import SilentProgress

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(progress: ProgressSink, clock: Clock, steps: int, seconds: float) -> None:
    with progress.stage("calibrate"), progress.track(steps, "sampling") as advance:
        for _ in range(steps):
            clock.now += seconds
            advance(1)


def test_plain_lines_come_at_most_every_five_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    work(Progress(console=Console(file=stream, width=80), clock=clock), clock, 30, 0.5)
    assert stream.getvalue().splitlines() == [
        "calibrate ...",
        "  sampling: 10 of 30, about 10.0 s left",
        "  sampling: 20 of 30, about 5.0 s left",
        "calibrate: 15.0 s",
    ]


def test_nothing_beside_json() -> None:
    clock, stream = Clock(), io.StringIO()
    work(Progress(quiet=True, console=Console(file=stream, force_terminal=True), clock=clock), clock, 30, 5)
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_and_keeps_one_line() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(
        file=stream, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"}
    )
    work(Progress(console=console, clock=clock), clock, 3, 40)
    assert "sampling" in stream.getvalue()
    assert stream.getvalue().count("calibrate: 2 min 0 s\n") == 1


def test_a_stage_that_fails_says_so_and_passes_the_error_on() -> None:
    stream = io.StringIO()
    progress = Progress(console=Console(file=stream, width=80), clock=Clock())
    with pytest.raises(KeyError), progress.stage("export"):
        raise KeyError("x")
    assert stream.getvalue().splitlines()[-1] == "export: stopped after 0.0 s"


def test_names_are_no_markup() -> None:
    stream = io.StringIO()
    with Progress(console=Console(file=stream, width=80), clock=Clock()).stage("[red]x[/red]"):
        pass
    assert "[red]x[/red] ..." in stream.getvalue()


def test_the_silent_one_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    work(SilentProgress(), Clock(), 3, 10)
    assert capfd.readouterr() == ("", "")
