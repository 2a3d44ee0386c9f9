"""Train a small model on a task, and test it on larger samples than any in training.

python launch.py --config=configs/tasks.py                                    copy strings, with RoPE
python launch.py --config=configs/tasks.py:task=sort,encoding=alibi           any other task and encoding
python launch.py --config=configs/tasks.py:positions=randomized               random increasing positions in training
python launch.py --config=configs/tasks.py:task=addition,encoding=learned,positions=coupled
python launch.py --config=configs/tasks.py:form=encoder                       all answers at once, from both sides
python launch.py --config=configs/tasks.py:size=smoke                         less than a minute, to try everything
python launch.py --config=configs/tasks.py --config.task.max_size=20 --config.task.test_sizes="(20, 40)"

A sample has a random size in training, from task.min_size to task.max_size. The results have the share of the answers
that are right, by token and as a whole, in samples of each of task.test_sizes.
"""

from ml_collections import ConfigDict, config_dict

from configs import base
from posenc_jax import encodings, tasks

POSITIONS = ("contiguous", "offset", "randomized", "coupled", "abacus")
FORMS, SIZES = ("decoder", "encoder"), ("default", "smoke")


def get_config(argument: str = "") -> ConfigDict:
    names = ("rope", *(name for name in encodings.names() if name != "rope"))
    chosen = base.options(argument, task=tasks.names(), encoding=names, positions=POSITIONS, form=FORMS, size=SIZES)
    config = base.get_config()
    config.name = chosen["task"] if chosen["size"] == "default" else f"{chosen['task']}_smoke"
    config.task, config.encoding = base.task(chosen["task"]), base.encoding(chosen["encoding"])
    model, training, optimizer, evaluation = config.model, config.training, config.optimizer, config.evaluation
    model.num_layers, model.d_model, model.d_ff = 2, 64, 256
    model.num_heads, model.num_kv_heads, model.head_dim = 2, 2, 32
    model.causal = chosen["form"] == "decoder"
    config.positions.training = chosen["positions"]
    kind = tasks.load(chosen["task"])
    task, largest = kind(kind.Config()), config.task.test_sizes[-1]
    if chosen["positions"] in ("coupled", "abacus"):
        config.positions.evaluation = "drawn"
        config.positions.range = max(task.length(config.task.max_size), largest + 3)
    elif chosen["positions"] == "offset":
        config.positions.range = task.length(largest)
    training.batch_size, training.duration, training.warmup = 64, "5000 steps", "200 steps"
    training.log_every, training.validate_every, training.checkpoint_every = "100 steps", "500 steps", "500 steps"
    training.steps_per_dispatch = 20
    optimizer.learning_rate, optimizer.weight_decay = 1e-3, 0.0
    # In tokens, from the sizes of the task.
    training.length, evaluation.lengths = config_dict.placeholder(int), config_dict.placeholder(tuple)
    evaluation.windows, evaluation.tail, evaluation.validation_windows = 512, 1, 128  # windows are samples of each size
    if chosen["size"] == "smoke":
        largest = min(config.task.max_size, 8)
        config.task.min_size, config.task.max_size = min(config.task.min_size, largest), largest
        config.task.test_sizes = (largest, 2 * largest)
        training.duration, training.warmup, training.log_every = "60 steps", "10 steps", "20 steps"
        training.validate_every, training.checkpoint_every = "30 steps", "30 steps"
        evaluation.windows, evaluation.validation_windows = 32, 32
    return config
