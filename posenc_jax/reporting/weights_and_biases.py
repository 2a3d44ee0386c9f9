"""Weights & Biases: runs with the scalars, texts, figures and curves that TensorBoard has."""

import html
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from matplotlib.figure import Figure

from posenc_jax.errors import one_line
from posenc_jax.files import sha256_of
from posenc_jax.reporting.tensorboard import CURVES, TensorBoard, by_layer, by_rule, curve_points
from posenc_jax.results import Result
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import check_form, damaged_if_invalid, printable, read_json

logger = logging.getLogger(__name__)

FIELD = "config.logging.wandb"
OFFLINE = "; WANDB_MODE=offline in the environment needs no login and no network"
RECORD = {"config": {"name": str}, "sessions": [{"started": str}]}  # the parts of a run's record that are read
LENGTH = "eval_length"  # the horizontal axis of curves over evaluation length, in tokens
AXES = {"train": "step", "validation": "step", "validation_attention": "step", "figures": "step", CURVES: LENGTH}
SETTINGS = {"silent": True, "console": "off", "symlink": False, "use_dot_wandb": False}
SETTINGS |= {"disable_code": True, "disable_git": True, "save_code": False, "x_save_requirements": False}
SETTINGS |= {"init_timeout": 60.0, "finish_timeout": 60.0}  # seconds for which the server is waited for


def check(project: str) -> None:
    """Raise ConfigError, naming `config.logging.wandb`, if wandb is not installed, or needs a login. Asks nothing."""
    try:
        wandb = _wandb()
        logs_in = wandb.setup().settings.mode in ("online", "shared")
        ready = not logs_in or wandb.login(prompt=False, verify=False)
    except ModuleNotFoundError:
        raise ConfigError(FIELD, project, "needs wandb: pip install wandb") from None
    except Exception as error:  # of any kind, for example for a key of the wrong form
        raise ConfigError(FIELD, project, f"cannot be used: {one_line(error)}{OFFLINE}") from error
    if not ready:
        raise ConfigError(FIELD, project, f"needs a login: wandb login{OFFLINE}")


class WeightsAndBiases:
    """Sends a run to Weights & Biases. A context manager.

    The run has the name of its folder, and its group the name of the recipe or study. Its id follows from the time of
    its first start and from the name of its folder, so a resumed run continues it. The first failure is logged, and
    nothing is sent after it.

    Args:
      workdir: the folder of a run with its config.json. wandb writes into its folder `wandb`.
      project: the project of the run.
      first_step: earlier steps are not sent, because an earlier process has sent them.
    """

    def __init__(self, workdir: Path, project: str, first_step: int = 0):
        self._first_step, self._run = first_step, None
        record = read_json(workdir / "config.json")
        with damaged_if_invalid(workdir / "config.json"):
            check_form(record, RECORD)
            run_id = sha256_of([workdir.name, record["sessions"][0]["started"]])[:12]
        try:
            self._run = _wandb().init(
                project=project,
                id=run_id,
                name=workdir.name,
                group=record["config"]["name"],
                config=record["config"],
                dir=str(workdir),
                resume="allow",
                reinit="create_new",
            )
        except Exception as error:
            self._fail(error)
        for path in workdir.glob("wandb/*/logs/*"):
            if path.is_symlink():  # to a log of wandb's process; a workdir holds no links
                path.unlink()
        for group, axis in AXES.items():
            self._send(lambda run, group=group, axis=axis: run.define_metric(f"{group}/*", step_metric=axis))

    @property
    def place(self) -> str:
        """Where the run can be seen: its address, or the folder for `wandb sync`. Empty after a failure."""
        if self._run is None:
            return ""
        return printable(self._run.url or f"offline, in {Path(self._run.dir).parent}")

    def scalars(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Send one number per tag, or one per layer."""
        self._log(step, lambda: by_layer(values))

    def plain_text(self, tag: str, text: str, step: int) -> None:
        """Send a text that is shown as it is, with its line breaks."""
        page = f"<pre>{html.escape(printable(text))}</pre>"
        self._log(step, lambda: {tag: _wandb().Html(page, inject=False, data_is_not_path=True)})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Send a figure as an image."""
        png = io.BytesIO()
        figure.savefig(png, format="png")
        self._log(step, lambda: {tag: _wandb().Image(PIL.Image.open(png))})

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Send the final metrics."""
        self._send(lambda run: run.summary.update(metrics))

    def extrapolation_curves(self, results: Iterable[Result]) -> None:
        """Send curves over evaluation length. Those under a scaling rule are in the group windows/scaling-RULE."""
        for rule, rows in by_rule(results).items():
            group = CURVES if rule == "scaling-none" else f"{CURVES}/{rule}"
            for length, values in curve_points(rows):
                values = {tag.replace(CURVES, group, 1): value for tag, value in values.items()}
                self._send(lambda run, point={LENGTH: length, **values}: run.log(point))

    def flush(self) -> None:
        """Do nothing: wandb's process sends and saves what it has received."""

    def close(self, exit_code: int = 0) -> None:
        """Wait until everything is sent, at most a minute. What is not sent is in the folder, for `wandb sync`."""
        self._send(lambda run: run.finish(exit_code=exit_code))

    def __enter__(self) -> "WeightsAndBiases":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _log(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if step >= self._first_step:
            self._send(lambda run: run.log({"step": step, **values()}))

    def _send(self, call: Callable[[Any], object]) -> None:
        if self._run is not None:
            try:
                call(self._run)
            except Exception as error:  # of any kind: no failure may end the run
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._run = None
        logger.warning("Weights & Biases: %s; the run goes on without it", one_line(error))


Board = TensorBoard | WeightsAndBiases


def _wandb() -> Any:
    import wandb

    wandb.setup(wandb.Settings(**SETTINGS))
    return wandb
