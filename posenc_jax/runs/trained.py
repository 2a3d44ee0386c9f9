"""Loading a trained run: its settings, and its model at the last checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from posenc_jax.config import RunConfig
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.runs import workdir as workdirs
from posenc_jax.schema import ConfigError
from posenc_jax.training import memory
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import read_newest
from posenc_jax.training.step import abstract_model, abstract_state
from posenc_jax.untrusted import damaged_if_invalid


@dataclass(frozen=True)
class Trained:
    """Settings, and the structure and arrays of the trained model."""

    config: RunConfig
    graphdef: nnx.GraphDef
    params: Any
    constants: Any

    @property
    def model(self) -> LanguageModel:
        return nnx.merge(self.graphdef, self.params, self.constants)


def read_config(workdir: Path) -> RunConfig:
    """The settings of the run in a folder. Raises ConfigError if there is none."""
    if not (workdir / "config.json").exists():
        raise ConfigError("workdir", str(workdir), "must be the folder of a run")
    workdirs.refuse_links(workdir)
    return RunConfig.from_mapping(workdirs.read(workdir)["config"])


def load(workdir: Path, mesh: Mesh | None = None) -> Trained:
    """The newest intact checkpoint of a run, on the devices of `mesh`, or on the first device without a mesh.

    Another process may be training the run. Nothing in the folder is changed, and no lock is taken. Raises ConfigError,
    WorkdirError and CheckpointError.
    """
    config = read_config(workdir)
    memory.check_fits(config, mesh)
    with damaged_if_invalid(workdir / "config.json"):  # traces the model; arrays are created after the memory check
        graphdef, parameters = abstract_model(config, dropped=config.training.drope.amount > 0)
        # The pattern is left out: it is not needed, and an untrusted one may take very long to match.
        settings = replace(config.optimizer, weight_decay_mask="")
        optimizer = optimizers.build(settings, total_steps=1, warmup_steps=0)
        state = abstract_state(config, optimizer, mesh)
    memory.check_fits(config, mesh, parameters)
    restored = read_newest(workdir / "checkpoints", state)
    if restored is None:
        raise ConfigError("workdir", str(workdir), "must hold a checkpoint")
    return Trained(config, graphdef, restored[0]["params"], restored[0]["constants"])
