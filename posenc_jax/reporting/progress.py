"""Training progress: a bar on a terminal, otherwise one line per logged step."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text


class Progress:
    """Shows the step, the loss, the speed and the remaining time of a run from `start_step` to `total_steps`."""

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None):
        self._total_steps = total_steps
        self._console = console or Console()
        self._bar: Bar | None = None
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=None)
            self._bar = Bar(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task(f"step {start_step}/{total_steps}", total=total_steps, completed=start_step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a logged step, counted from 1, and its metrics. They have the names of metrics.jsonl.

        The speed is shown if "tokens_per_second" is given, and the remaining time if "step_seconds" is given.
        """
        parts = [f"step {step}/{self._total_steps}", f"loss {metrics['loss']:.3f} nats"]
        if "bits_per_byte" in metrics:
            parts.append(f"{metrics['bits_per_byte']:.2f} bits/byte")
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if "step_seconds" in metrics:
            parts.append(f"{clock((self._total_steps - step) * metrics['step_seconds'])} left")
        line = "  ".join(parts)
        if self._bar is None:
            self.message(line)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """A duration in the form 1:02:03, or 02:03 below one hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
