"""TensorBoard event files: scalars, hyper-parameters, figures and extrapolation curves, without TensorFlow."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

from posenc_jax.results import METRICS, Result, interval
from posenc_jax.untrusted import printable


class TensorBoard:
    """Writes one event file in `logdir`, which is created if it does not exist. A context manager.

    A run that resumes after step k - 1 passes `purge_step=k`. TensorBoard then hides steps k and later of earlier event
    files in `logdir`. `purge_step=0` would hide all of their steps, so it removes these files. Characters of a tag
    other than letters, digits, "_", ".", "/" and "-" become "_".

    Events are written by the calling thread. The SummaryWriter of tensorboardX writes in another thread, and its
    flush() does not wait for that thread.
    """

    def __init__(self, logdir: Path, purge_step: int | None = None):
        logdir.mkdir(parents=True, exist_ok=True)
        earlier = list(logdir.glob("events.out.tfevents.*")) if purge_step == 0 else []
        # tensorboardX file names have a resolution of one second: a file opened in the same second is overwritten.
        self._writer = EventsWriter(str(logdir / "events"), filename_suffix=f".{time.time_ns()}")
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
            self.flush()
        for path in earlier:
            path.unlink()

    def scalars(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Write one number per tag. A list with one number per layer becomes TAG/layer_0 and so on."""
        flat: dict[str, Any] = {}
        for tag, value in values.items():
            of_layers = isinstance(value, Sequence)
            flat |= {f"{tag}/layer_{i}": x for i, x in enumerate(value)} if of_layers else {tag: value}
        items = [Summary.Value(tag=_clean(tag), simple_value=value) for tag, value in flat.items()]
        self._write(Event(step=step, summary=Summary(value=items)))

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write a row of the HPARAMS tab: the settings, by dotted names, and the final metrics.

        The metrics are also written as scalars at step 0, so their tags must differ from the tags of curves.
        """
        # Values that the HPARAMS tab does not take are written as text.
        shown = {name: x if isinstance(x, bool | int | float) else printable(str(x)) for name, x in settings.items()}
        tagged = {_clean(tag): value for tag, value in metrics.items()}
        for part in summary.hparams(shown, tagged):
            self._write(Event(summary=part))
        self.scalars(0, tagged)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a figure as an image."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # [height, width, red green blue]
        self._write(Event(step=step, summary=summary.image(_clean(tag), pixels, dataformats="HWC")))

    def extrapolation_charts(self, metrics: Iterable[str]) -> None:
        """Write the layout of the CUSTOM SCALARS tab: the metrics of `extrapolation_curves` and their intervals."""
        tags = {METRICS[metric].title: f"extrapolation/{metric}" for metric in metrics}
        intervals = {title: ["Margin", [tag, f"{tag}/low", f"{tag}/high"]] for title, tag in tags.items()}
        lines = {title: ["Multiline", [f"{tag}$"]] for title, tag in tags.items()}
        layout = {"Over evaluation length or distance": lines, "With 95 % intervals": intervals}
        self._write(Event(summary=summary.custom_scalars(layout)))

    def flush(self) -> None:
        """Return once everything written is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def extrapolation_by_rule(logdir: Path, results: Iterable[Result]) -> None:
    """Write the `extrapolation_curves` of each scaling rule as a separate TensorBoard run, "scaling-RULE"."""
    results = list(results)
    for scaling in dict.fromkeys(result.scaling for result in results):
        own = logdir / _clean(f"scaling-{scaling}").replace("/", "_")
        extrapolation_curves(own, [row for row in results if row.scaling == scaling])


def extrapolation_curves(logdir: Path, results: Iterable[Result]) -> None:
    """Write the metrics of one curve and their intervals. The step is the evaluation length.

    Removes the files of earlier calls.
    """
    with TensorBoard(logdir, purge_step=0) as board:
        for row in results:
            if row.metric in METRICS and row.value is not None:
                tag = f"extrapolation/{row.metric}"
                ends = dict(zip((f"{tag}/low", f"{tag}/high"), interval(row) or (), strict=False))
                board.scalars(row.eval_length, {tag: row.value, **ends})


def _clean(tag: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "_", tag).lstrip("/")
