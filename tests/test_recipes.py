"""Every file in configs/, every study in experiments/, and every command in their docstrings loads and trains."""

import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.config import RunConfig
from posenc_jax.runs.grid import Study
from posenc_jax.runs.task_data import TaskData
from posenc_jax.schema import plain
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step

ROOT = Path(__file__).parent.parent
# Their settings come from a model: tests/runs/test_init_from_pretrained.py.
PRETRAINED = ("configs/pretrained.py", "experiments/pretrained_extension.py")
FILES = [
    path.relative_to(ROOT)
    for path in sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("experiments/*.py")])
    if "def get_config" in path.read_text(encoding="utf-8")
]


def commands(file):
    """The file itself, and the configs in its docstring, such as "configs/hybrid.py:form=drope"."""
    docstring = importlib.import_module(".".join(file.with_suffix("").parts)).__doc__
    return list(dict.fromkeys([str(file), *re.findall(rf"--config=({file}[^\s]*)", docstring)]))


COMMANDS = [command for file in FILES if str(file) not in PRETRAINED for command in commands(file)]


def load(command):
    file, _, argument = command.partition(":")
    get_config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config
    mapping = (get_config(argument) if argument else get_config()).to_dict()
    return Study.from_mapping(mapping) if "sweep" in mapping else RunConfig.from_mapping(mapping)


def tiny(config):
    """The same kind of model with few, narrow layers, on short windows of bytes."""
    settings = plain(config)
    model, training = settings["model"], settings["training"]
    model |= {"d_model": 16, "num_layers": len(model.get("pattern", "E")), "dtype": "float32"}
    if "num_heads" in model:
        grouped = model["num_kv_heads"] < model["num_heads"]
        model |= {"num_heads": 2, "num_kv_heads": 1 if grouped else 2, "head_dim": 8, "d_ff": 16}
        for own in (model, *settings["layers"].values()):
            own["window"] = min(own.get("window", 0), 4)
    settings["data"] |= {"tokenizer": "bytes", "vocab_size": 256}
    if settings["task"]:
        sizes = settings["task"]
        sizes |= {"min_size": min(sizes["min_size"], 3), "max_size": 3, "test_sizes": [3]}
    training |= {"length": 8, "batch_size": 2, "grad_accum_steps": min(training["grad_accum_steps"], 2)}
    settings["evaluation"] |= {"lengths": [8], "tail": 4, "copy_distances": []}
    if settings["task"]:
        training["length"] = settings["evaluation"]["lengths"] = None
        settings["evaluation"]["tail"] = 1
    return RunConfig.from_mapping(settings)


def loss_of_one_step(config):
    optimizer = optimizers.build(config.optimizer, total_steps=2, warmup_steps=1)
    graphdef, _ = abstract_model(config)
    token_bytes = None if config.task.name else jnp.ones(256, jnp.int32)
    step = jax.jit(make_train_step(config, graphdef, optimizer, token_bytes))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9), np.int32)
    if config.task.name:
        tokens = next(TaskData(config).batches(0, 0))
    state, metrics = step(initial_state(config, optimizer), jnp.asarray(tokens))
    assert state["step"] == 1
    assert metrics["gradient_norm"] > 0
    return metrics["loss"]


def kinds(command):
    """The runs of a command, made tiny. Runs that then differ only in their seeds are included once."""
    asked = load(command)
    configs = [asked] if isinstance(asked, RunConfig) else [spec.config for spec in asked.runs]
    own = {str(plain(config) | {"seed": 0}): config for config in map(tiny, configs)}
    return list(own.values())


def test_all_files_are_found():
    names = {str(file) for file in FILES}
    assert {"configs/base.py", "configs/bert.py", "experiments/rope_base.py"} <= names
    assert len(COMMANDS) > 2 * len(FILES)
    assert set(PRETRAINED) <= set(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_loads(command):
    assert isinstance(load(command), RunConfig if command.startswith("configs") else Study)


@pytest.mark.parametrize("file", [str(file) for file in FILES if str(file) not in PRETRAINED])
def test_every_file_trains(file):
    first, *_, last = kinds(file) * 2
    for config in (first, last) if first != last else (first,):
        assert 0.5 < loss_of_one_step(config) / math.log(config.vocab_size) < 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_run_of_every_command_trains(command):
    for config in kinds(command):
        assert 0.5 < loss_of_one_step(config) / math.log(config.vocab_size) < 2, config
