"""Bars estimate the time left without what came before the first step; preparations that take long are named."""

import io
import time

import pytest
from rich.console import Console

from moextend_jax import progress
from moextend_jax.progress import counting, preparing


class Clock:
    """Time as rich and we read it, set by hand."""

    def __init__(self, patch):
        self.now = 100.0
        patch.setattr(progress, "monotonic", lambda: self.now)
        patch.setattr(progress, "LONG", 1.0)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def no_terminal() -> Console:
    return Console(file=io.StringIO())


def test_plain_lines_are_few_and_end_with_the_last_step(capsys):
    with counting("align", 1000, out=no_terminal()) as bar:
        for step in range(1, 1001):
            bar.update(step, note="loss 2.0000  1,234 tokens/s")
    assert capsys.readouterr().out == "align 1000/1000  loss 2.0000  1,234 tokens/s  0:00 left\n"


def test_time_left_does_not_count_compiling(clock, capsys):
    """Five minutes until the first step is done, then one a second: 60 are left, not five hours."""
    with counting("align", 71, out=no_terminal()) as bar:
        clock.now += 300
        bar.update(1, note="loss 5")
        for step in range(2, 12):
            clock.now += 1
            bar.update(step, note="loss 4")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "align 1/71  loss 5"  # nobody knows yet
    assert second == "align 11/71  loss 4  1:00 left"


def test_time_left_of_a_run_that_goes_on_and_of_questions(clock, capsys):
    with counting("answers", 100, unit="questions", done=50, out=no_terminal()) as bar:
        for seconds in (40, 20, 20):  # the first batch compiles
            clock.now += seconds
            bar.add(10)
    assert capsys.readouterr().out.splitlines() == [
        "answers 60/100",
        "answers 70/100  0.5 questions/s  1:00 left",
        "answers 80/100  0.5 questions/s  0:40 left",
    ]


def test_a_terminal_gets_a_bar_with_numbers_and_time_left():
    screen = io.StringIO()
    with counting("align", 10, out=Console(file=screen, force_terminal=True, width=100)) as bar:
        bar.update(4, note="loss 2.5000  1,234 tokens/s")
    text = screen.getvalue()
    assert "4/10" in text and "loss 2.5000" in text and "1,234 tokens/s" in text and "-:--:--" in text


def test_other_processes_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "first", lambda: False)
    monkeypatch.setattr(progress, "LONG", 0.0)
    with counting("align", 2, out=no_terminal()) as bar, preparing("nothing"):
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_something_quick_is_not_shown_where_it_is_a_preparation(clock, capsys):
    for seconds in (0.5, 5.0):
        with counting("features", 3, unit="images", quick=False, out=no_terminal()) as bar:
            clock.now += seconds
            bar.update(3)
    assert capsys.readouterr().out == "features 3/3  0:00 left\n"


def test_only_preparations_that_take_long_are_named_while_they_do(capsys, monkeypatch):
    with preparing("opening nothing"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LONG", 0.05)
    with preparing("compiling align"):
        deadline = time.monotonic() + 10
        while not (begun := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert begun == "compiling align ...\n"
    assert capsys.readouterr().err.startswith("compiling align: 0.")


def test_what_a_bar_waits_for_at_first_is_named(clock, capsys):
    with counting("evaluate", 2000, unit="questions", out=no_terminal()) as bar:
        clock.now += 12.5
        bar.add(1000)
        clock.now += 1
        bar.add(1000)
    assert capsys.readouterr().err.endswith("evaluate: the first of 2,000 questions: 12.5 s\n")


def test_a_preparation_that_fails_says_nothing_at_its_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LONG", 0.0)
    with pytest.raises(ValueError), preparing("reading"):
        raise ValueError
    assert "reading: " not in capsys.readouterr().err  # that it began may have been said
