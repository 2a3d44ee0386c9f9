"""A run traced before anything of it is written, so that one that cannot work leaves nothing behind."""

import jax
from jax.sharding import Mesh

from posenc_jax import positions
from posenc_jax.config import RunConfig
from posenc_jax.evaluation import extrapolation, retrieval
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.evaluation.attention_stats import AttentionStats
from posenc_jax.training import memory
from posenc_jax.distributed import sharding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.runs.train import Programs
from posenc_jax.training.schedule import Schedule
from posenc_jax.training.step import State, abstract_state


def rehearse(
    config: RunConfig,
    schedule: Schedule,
    mesh: Mesh,
    programs: Programs,
    scorers: list[Scorer],
    attention_stats: list[AttentionStats],
    *,
    validation_windows: int,
    windows: int,
) -> None:
    """Trace the steps of a run, its validation, its evaluation at the longest readable length, and its retrieval.

    No array of the run is made, and jax keeps what it traces: the programs are not traced again when they run.

    Args:
      config: the run, or any one of those that share its programs.
      schedule: of the run.
      mesh: its devices.
      programs: its training steps.
      scorers, attention_stats: of the model with its encoding, and without.
      validation_windows, windows: how many windows validation and evaluation read.

    Raises ConfigError if memory cannot hold the tokens of a dispatch.
    """
    optimizer = optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    state, training, K = abstract_state(config, optimizer, mesh), config.training, schedule.most_per_dispatch
    batches = sharding.abstract_rows((K, training.batch_size, training.length + 1), mesh, axis=1)
    memory.check_dispatch_fits(config, batches)
    dropping = [False] * (schedule.drope < schedule.total) + [True] * (schedule.drope > 0)
    for dropped in dropping:
        with jax.set_mesh(mesh):
            programs(dropped).eval_shape(state, batches, K)  # type: ignore[attr-defined]  # of a jitted function
        _score(config, scorers[dropped], state, validation_windows, training.length)
        attention_stats[dropped].trace(config, state["params"], state["constants"], training.length)
    scorer, evaluation = scorers[dropping[-1]], config.evaluation

    def can_read(length: int) -> bool:
        return extrapolation.can_read(config, scorer, state["params"], state["constants"], length)

    if readable := list(filter(can_read, evaluation.lengths)):
        _score(config, scorer, state, windows, readable[-1])
    for distance in evaluation.copy_distances if windows > 1 else ():
        if can_read(length := retrieval.window_length(config, distance)):
            _score(config, scorer, state, 2 * windows, length)  # each window with and without the first copy


def _score(config: RunConfig, scorer: Scorer, state: State, windows: int, length: int) -> None:
    places = positions.in_evaluation(config.positions, length, config.model.num_layers, config.training.length)
    scorer.trace(state["params"], state["constants"], windows, length, places, masks_tokens=config.masks_tokens)
