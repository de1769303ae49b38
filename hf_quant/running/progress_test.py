import io
from contextlib import contextmanager, redirect_stderr

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from hf_quant.running.progress import track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextmanager
def terminal():
    """Inside the test's body: pytest itself sets sys.stderr between the fixtures and the body."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(Terminal()) as screen:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        yield screen


def test_shows_description_count_and_remaining_time_on_a_terminal():
    with terminal() as screen:
        assert list(track(iter(range(3)), description="solving blocks", total=3)) == [0, 1, 2]
    shown = screen.getvalue()
    assert "solving blocks" in shown
    assert "3/3" in shown
    assert "left" in shown


def test_takes_the_total_from_the_iterable():
    with terminal() as screen:
        assert list(track([1, 2], description="windows")) == [1, 2]
    assert "2/2" in screen.getvalue()


def test_silent_when_asked():
    with terminal() as screen:
        assert list(track(range(3), description="x", enabled=False)) == [0, 1, 2]
    assert screen.getvalue() == ""


def test_silent_when_hugging_face_bars_are_off():
    disable_progress_bars()
    try:
        with terminal() as screen:
            assert list(track(range(3), description="x")) == [0, 1, 2]
    finally:
        enable_progress_bars()
    assert screen.getvalue() == ""


def test_silent_without_a_terminal():
    with redirect_stderr(io.StringIO()) as stream:
        assert list(track(range(3), description="x")) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_items_are_taken_one_at_a_time():
    taken = []

    def items():
        for i in range(3):
            taken.append(i)
            yield i

    tracked = track(items(), description="x", enabled=False)
    next(tracked)
    assert taken == [0]
