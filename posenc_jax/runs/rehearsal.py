"""Tracing of a run before anything is written, so that a run that cannot work leaves no files."""

import jax

from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.evaluation import extrapolation, retrieval
from posenc_jax.evaluation.scoring import Scorer, TrainedModel, evaluation_positions
from posenc_jax.runs.program import Program
from posenc_jax.training import memory
from posenc_jax.training.step import State, abstract_state


def rehearse(program: Program, *, validation_windows: int, windows: int) -> None:
    """Trace train steps, validation, evaluation at the longest readable length, and retrieval.

    No array is allocated. jax caches the traces, so the programs are not traced again when they run.
    `validation_windows` and `windows` are the numbers of windows of validation and evaluation. Raises ConfigError if
    memory cannot hold the tokens of a dispatch.
    """
    config, schedule, mesh = program.config, program.schedule, program.mesh
    state, training, K = (
        abstract_state(config, program.optimizer(config), mesh),
        config.training,
        schedule.most_per_dispatch,
    )
    batches = sharding.abstract_rows((K, training.batch_size, training.length + 1), mesh, axis=1)
    memory.check_dispatch_fits(config, batches)
    dropping = [False] * (schedule.drope < schedule.total) + [True] * (schedule.drope > 0)
    for dropped in dropping:
        with jax.set_mesh(mesh):
            program.single.train_steps(dropped).eval_shape(state, batches, K)
        _score(config, program.scorers[dropped], state, validation_windows, training.length)
        program.attention_stats[dropped].trace(config, state["params"], state["constants"], training.length)
    scorer, evaluation = program.scorers[dropping[-1]], config.evaluation
    model = TrainedModel(config, scorer, state["params"], state["constants"])
    if readable := [length for length in evaluation.lengths if extrapolation.can_read(model, length)]:
        _score(config, scorer, state, windows, readable[-1])
    for distance in evaluation.copy_distances if windows > 1 else ():
        if extrapolation.can_read(model, length := retrieval.window_length(config, distance)):
            _score(config, scorer, state, 2 * windows, length)  # each window, with and without the first copy


def _score(config: RunConfig, scorer: Scorer, state: State, windows: int, length: int) -> None:
    places = evaluation_positions(config, length)
    scorer.trace(state["params"], state["constants"], windows, length, places, masks_tokens=config.masks_tokens)
