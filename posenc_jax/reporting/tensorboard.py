"""TensorBoard event files: scalars, hyper-parameters, figures and extrapolation curves, without TensorFlow."""

# pyright: reportAttributeAccessIssue=false
# Protocol buffers create their classes at run time.

import io
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text import metadata as texts
from tensorboard.summary.writer.record_writer import RecordWriter

from posenc_jax.results import METRICS, Result, interval
from posenc_jax.untrusted import printable

CURVES = "windows"  # group of the tags of curves over evaluation length; it comes after train/ and validation/


class TensorBoard:
    """Writes one event file in `logdir`, which is created if it does not exist. A context manager.

    A run that resumes after step k - 1 passes `purge_step=k`. TensorBoard then hides steps k and later of earlier event
    files in `logdir`. `purge_step=0` would hide all of their steps, so it removes these files. Characters of a tag
    other than letters, digits, "_", ".", "/" and "-" become "_". TensorBoard sorts tags by name.
    """

    def __init__(self, logdir: Path, purge_step: int | None = None):
        logdir.mkdir(parents=True, exist_ok=True)
        earlier = list(logdir.glob("events.out.tfevents.*")) if purge_step == 0 else []
        now = time.time_ns()  # TensorBoard reads files in the order of their names
        self._writer = RecordWriter((logdir / f"events.out.tfevents.{now // 10**9}.{now}").open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()
        for path in earlier:
            path.unlink()

    def scalars(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Write one number per tag. A list with one number per layer becomes TAG/layer_0 and so on."""
        flat = by_layer(values)
        self._summary([Summary.Value(tag=_clean(tag), simple_value=value) for tag, value in flat.items()], step)

    def hparams(self, settings: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Write a row of the HPARAMS tab: the settings, by dotted names, and the final metrics.

        The metrics are also written as scalars at step 0, so their tags must differ from the tags of curves.
        """
        infos, session = [], SessionStartInfo()
        for name, x in settings.items():
            # Values that the HPARAMS tab does not take are written as text.
            value = x if isinstance(x, bool | int | float) else printable(str(x))
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "float64"
            infos.append(api_pb2.HParamInfo(name=name, type=getattr(api_pb2, f"DATA_TYPE_{kind.upper()}")))
            setattr(session.hparams[name], {"float64": "number"}.get(kind, kind) + "_value", value)
        tagged = {_clean(tag): value for tag, value in metrics.items()}
        measured = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tagged]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=measured)
        end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
        for tag, data in (
            (hparams.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment)),
            (hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=session)),
            (hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end)),
        ):
            self._summary([Summary.Value(tag=tag, metadata=hparams.create_summary_metadata(data))])
        self.scalars(0, tagged)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Write a text of the TEXT tab."""
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
        metadata = texts.create_summary_metadata(display_name=tag, description="")
        self._summary([Summary.Value(tag=_clean(tag), metadata=metadata, tensor=tensor)], step)

    def plain_text(self, tag: str, text: str, step: int) -> None:
        """Write a text of the TEXT tab that is shown as it is, with its line breaks."""
        self.text(tag, textwrap.indent(printable(text), "    ", lambda line: True), step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a figure as an image."""
        png = io.BytesIO()
        figure.savefig(png, format="png")
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png.getvalue())
        self._summary([Summary.Value(tag=_clean(tag), image=image)], step)

    def extrapolation_charts(self, metrics: Iterable[str]) -> None:
        """Write the layout of the CUSTOM SCALARS tab: the metrics of `extrapolation_curves` and their intervals."""
        lines, intervals = [], []
        for metric in metrics:
            title, tag = METRICS[metric].title, f"{CURVES}/{metric}"
            line = layout_pb2.MultilineChartContent(tag=[f"{tag}$"])
            lines.append(layout_pb2.Chart(title=title, multiline=line))
            band = layout_pb2.MarginChartContent.Series(value=tag, lower=f"{tag}/low", upper=f"{tag}/high")
            intervals.append(layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[band])))
        categories = {"Over evaluation length or distance": lines, "With 95 % intervals": intervals}
        layout = layout_pb2.Layout(
            category=[layout_pb2.Category(title=title, chart=charts) for title, charts in categories.items()]
        )
        tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
        metadata = custom_scalars.create_summary_metadata()
        self._summary([Summary.Value(tag=custom_scalars.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)])

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

    def _summary(self, values: Sequence[Summary.Value], step: int = 0) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def extrapolation_by_rule(logdir: Path, results: Iterable[Result]) -> None:
    """Write the `extrapolation_curves` of each scaling rule as a separate TensorBoard run, "scaling-RULE".

    The run is named "windows" if there is only one rule.
    """
    rules = by_rule(results)
    for name, rows in rules.items():
        extrapolation_curves(logdir / (name if len(rules) > 1 else "windows"), rows)


def by_rule(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each scaling rule, by "scaling-RULE", a name that a folder can have."""
    rules: dict[str, list[Result]] = {}
    for row in results:
        rules.setdefault(_clean(f"scaling-{row.scaling}").replace("/", "_"), []).append(row)
    return rules


def extrapolation_curves(logdir: Path, results: Iterable[Result]) -> None:
    """Write the metrics of one curve and their intervals. The step is the evaluation length.

    Removes the files of earlier calls.
    """
    with TensorBoard(logdir, purge_step=0) as board:
        for length, values in curve_points(results):
            board.scalars(length, values)


def curve_points(results: Iterable[Result]) -> Iterator[tuple[int, dict[str, float]]]:
    """The evaluation length of each result of a curve, with its value and the ends of its interval by tag."""
    for row in results:
        if row.metric in METRICS and row.value is not None:
            tag = f"{CURVES}/{row.metric}"
            ends = dict(zip((f"{tag}/low", f"{tag}/high"), interval(row) or (), strict=False))
            yield row.eval_length, {tag: row.value, **ends}


def by_layer(values: Mapping[str, float | Sequence[float]]) -> dict[str, float]:
    """One number per tag. A list with one number per layer becomes TAG/layer_0 and so on."""
    flat: dict[str, float] = {}
    for tag, value in values.items():
        if isinstance(value, Sequence):
            flat |= {f"{tag}/layer_{i}": x for i, x in enumerate(value)}
        else:
            flat[tag] = value
    return flat


def _clean(tag: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "_", tag).lstrip("/")
