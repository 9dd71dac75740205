"""Long work says how far it is: a bar on a terminal, elsewhere a line every ten seconds."""

import gc
import io
import re
import threading
import time
import types
from collections.abc import Callable

import pytest
from small import without_progress

from jlora import _progress
from jlora._progress import progress


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error that is a pipe, with a clock on which ten seconds are a hundredth of one."""
    monkeypatch.setattr(_progress, "SECONDS", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(_progress, "sys", types.SimpleNamespace(stderr=stream))
    return stream


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_pipe_gets_lines_within_a_step(piped: io.StringIO) -> None:
    """The second step lasts until three lines said that the first is done."""
    for i in progress(["a", "b"], "merge", unit="leaf"):
        if i == "b":
            wait_for(lambda: piped.getvalue().count("1/2") >= 3)
    assert without_progress(piped.getvalue()) == ""
    lines = piped.getvalue().splitlines()
    pattern = re.compile(r"merge: +\d+% \d/2 \[\d\d:\d\d<.*leaf.*\]")
    assert all(map(pattern.fullmatch, lines)), lines


def test_a_total_that_is_counted_by_hand(piped: io.StringIO) -> None:
    with progress(total=4e6, unit="B", unit_scale=True, desc="load") as bar:
        bar.update(1e6)
        wait_for(lambda: "load:  25% 1.00M/4.00M" in piped.getvalue())


@pytest.mark.parametrize("how", ["closed", "dropped", "broken off", "disabled"])
def test_no_lines_after_the_end(piped: io.StringIO, how: str) -> None:
    before = set(threading.enumerate())
    bar = progress(range(3), disable=how == "disabled")
    if how == "closed":
        bar.close()
    elif how == "broken off":
        for _ in bar:
            break
    del bar
    gc.collect(1)  # it is young; all that JAX has would be searched
    wait_for(lambda: set(threading.enumerate()) <= before)
    written = piped.getvalue()
    time.sleep(0.05)
    assert piped.getvalue() == written


def test_a_terminal_gets_a_bar(piped: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piped, "isatty", lambda: True, raising=False)
    before = threading.active_count()
    for _ in progress(range(3), mininterval=0, file=piped):
        assert threading.active_count() <= before + 1  # tqdm's own
    assert piped.getvalue().count("\r") >= 3
