"""Loading a trained run: its settings, its tokenizer, and its model at the last checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from posenc_jax.config import RunConfig
from posenc_jax.data.pretrained_tokenizer import MAX_CHARACTERS
from posenc_jax.data.tokenizers import ByteTokenizer, Tokenizer
from posenc_jax.data.tokens import load_tokenizer
from posenc_jax.errors import one_line
from posenc_jax.files import atomic_write_text
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.runs import workdir as workdirs
from posenc_jax.schema import ConfigError
from posenc_jax.training import memory
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import read_newest, read_step
from posenc_jax.training.step import abstract_model, abstract_state
from posenc_jax.untrusted import check_form, damaged_if_invalid, read_bytes

TOKENIZER = "tokenizer.json"  # the tokenizer of a run, unless it reads bytes, as JSON of the library `tokenizers`


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


def read_tokenizer(workdir: Path) -> str:
    """The definition of the tokenizer of a run, "" for bytes.

    Raises ConfigError for a run on a task, and WorkdirError if the file is missing or damaged.
    """
    config, record = read_config(workdir), workdirs.read(workdir)
    if config.task.name:
        raise ConfigError("workdir", str(workdir), f"must be of a run on text, not on task {config.task.name!r}")
    if config.data.tokenizer == "bytes":
        return ByteTokenizer.definition
    try:
        check_form(record, {"data": {"tokenizer": str}}, "config.json")
        definition = read_bytes(workdir / TOKENIZER, MAX_CHARACTERS).decode()
        if load_tokenizer(config.data, definition).fingerprint != record["data"]["tokenizer"]:
            raise ValueError("it is not the tokenizer of the run")
    except OSError as error:
        raise workdirs.WorkdirError(f"workdir {workdir} has no {TOKENIZER}, the tokenizer of the run") from error
    except ValueError as error:
        raise workdirs.WorkdirError(f"workdir {workdir} has a damaged {TOKENIZER}: {one_line(error)}") from error
    return definition


def read_end_tokens(workdir: Path) -> frozenset[int]:
    """The tokens that end a text for the model that a run started from, if they are known."""
    initial = workdirs.read(workdir).get("initial_weights") or {}
    with damaged_if_invalid(workdir / "config.json"):
        check_form(initial, {"end_tokens": [int]} if "end_tokens" in initial else {})
        return frozenset(initial.get("end_tokens", ()))


def save_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Write the definition of the tokenizer into the folder of a run. Nothing is written for bytes."""
    if tokenizer.definition:
        atomic_write_text(workdir / TOKENIZER, tokenizer.definition)


def load(workdir: Path, mesh: Mesh | None = None, step: int | None = None) -> Trained:
    """The newest intact checkpoint of a run, on the devices of `mesh`, or on the first device without a mesh.

    The state of the optimizer is not read. With a `step`, the checkpoint is that of this step. Another process may be
    training the run. Nothing in the folder is changed, and no lock is taken. Raises ConfigError, WorkdirError and
    CheckpointError.
    """
    config = read_config(workdir)
    memory.check_fits(config, mesh, trains=False)
    with damaged_if_invalid(workdir / "config.json"):  # traces the model; arrays are created after the memory check
        graphdef, parameters = abstract_model(config, dropped=config.training.drope.amount > 0)
        # The pattern is left out: it is not needed, and an untrusted one may take very long to match.
        settings = replace(config.optimizer, weight_decay_mask="")
        optimizer = optimizers.build(settings, total_steps=1, warmup_steps=0)
        state = abstract_state(config, optimizer, mesh)
    memory.check_fits(config, mesh, parameters, trains=False)
    entries = ("params", "constants")
    if step is not None:
        found = read_step(workdir / "checkpoints", step, state, entries)
    elif restored := read_newest(workdir / "checkpoints", state, entries):
        found = restored[0]
    else:
        raise ConfigError("workdir", str(workdir), "must hold a checkpoint")
    return Trained(config, graphdef, found["params"], found["constants"])
