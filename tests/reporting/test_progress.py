"""Terminal output during training, with and without a progress bar."""

import io
import re

import pytest
from rich.console import Console

from posenc_jax.reporting.progress import Progress

METRICS = {"loss": 2.345, "bits_per_byte": 3.383, "tokens_per_second": 12345.4, "step_seconds": 0.1383}


def console(*, terminal=False, width=80):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def test_a_line_holds_step_loss_speed_and_time_left():
    screen = console()
    with Progress(700, console=screen) as progress:
        progress.update(100, METRICS)
    assert screen.file.getvalue() == ("step 100/700  loss 2.345 nats  3.38 bits/byte  12,345 tokens/s  01:23 left\n")


def test_a_line_without_speed_has_no_time_left():
    screen = console()
    with Progress(700, console=screen) as progress:
        progress.update(1, {"loss": 5.5, "bits_per_byte": 8.0})
    assert screen.file.getvalue() == "step 1/700  loss 5.500 nats  8.00 bits/byte\n"


@pytest.mark.parametrize(
    ("step_seconds", "left"), [(0.0, "00:00"), (0.5, "05:00"), (10.0, "1:40:00"), (100, "16:40:00")]
)
def test_time_left_is_that_of_the_steps_left(step_seconds, left):
    screen = console()
    with Progress(700, console=screen) as progress:
        progress.update(100, METRICS | {"step_seconds": step_seconds})
    assert screen.file.getvalue().endswith(f"  {left} left\n")


def test_long_lines_are_not_wrapped_and_brackets_are_no_markup():
    screen = console(width=20)
    with Progress(700, console=screen) as progress:
        progress.message("validation [bold] of a line longer than the console")
    assert screen.file.getvalue() == "validation [bold] of a line longer than the console\n"


def test_a_terminal_shows_a_bar_that_moves():
    screen = console(terminal=True, width=100)
    with Progress(700, start_step=350, console=screen) as progress:
        progress.update(700, METRICS)
    frames = [line for line in re.split(r"[\r\n]", screen.file.getvalue()) if "step" in line]
    assert "step 350/700" in frames[0]
    assert "step 700/700  loss 2.345 nats  3.38 bits/byte  12,345 tokens/s  00:00 left" in frames[-1]
    assert "━" in frames[0]
    assert frames[0].endswith(" ")  # half full
    assert frames[-1].endswith("━")


def test_an_80_column_terminal_shows_the_time_left():
    screen = console(terminal=True)
    with Progress(700, console=screen) as progress:
        progress.update(100, METRICS)
    assert "01:23 left" in screen.file.getvalue()


def test_a_message_is_kept_above_the_bar():
    screen = console(terminal=True)
    with Progress(700, console=screen) as progress:
        progress.message("validation [1.9]")
        progress.update(100, METRICS)
    assert "validation [1.9]\n" in screen.file.getvalue()


def test_the_cursor_comes_back_when_training_fails():
    screen = console(terminal=True)
    with pytest.raises(RuntimeError), Progress(700, console=screen):
        raise RuntimeError
    assert screen.file.getvalue().rindex("\x1b[?25h") > screen.file.getvalue().rindex("\x1b[?25l")
