"""Study: which positional encodings let a small model do a task on samples larger than any in training?

python launch.py --config=experiments/length_generalization.py                            copy strings
python launch.py --config=experiments/length_generalization.py:task=sort                  any other task
python launch.py --config=experiments/length_generalization.py:size=smoke                 every encoding for 60 steps
python launch.py --config=experiments/length_generalization.py --dry_run                  runs, programs, FLOPs, time

Encodings of positions are trained twice: with positions that count from 0, and with random increasing positions of a
larger range (Ruoss et al. 2023), which are also drawn in the evaluation. Learned positions, which end with their table,
are instead also trained with a random first position (Huang et al. 2024). Encodings whose effect does not depend on
positions are trained once.
"""

from ml_collections import ConfigDict

from configs import base, tasks
from posenc_jax import tasks as table

BY_POSITION = ("sinusoidal", "rope", "p_rope", "pope", "alibi", "t5", "fire", "kerple")
GROUPS = {
    "without positions": ("none", "cope", "fox", "path", "stick_breaking"),
    "positions from 0 on": ("learned", *BY_POSITION),
}
RANDOMIZED = "positions.training=randomized positions.evaluation=drawn"
OFFSET = "learned, offset: encoding=learned positions.training=offset"


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, task=table.names(), size=("default", "smoke"))
    config = ConfigDict()
    config.name = "_".join(["length_generalization", chosen["task"], *(["smoke"] * (chosen["size"] == "smoke"))])
    config.question = (
        f"Small language models that differ only in their positional encoding are trained on the task "
        f"`{chosen['task']}`. Up to which size are their answers right, in samples larger than any in training?"
    )
    config.baseline = "none"
    config.base = tasks.get_config(f"task={chosen['task']},encoding=none,size={chosen['size']}")
    config.sweep = ConfigDict()
    groups = {title: tuple(f"encoding={name}" for name in names) for title, names in GROUPS.items()}
    groups["random positions"] = (OFFSET, *(f"{x}, randomized: encoding={x} {RANDOMIZED}" for x in BY_POSITION))
    config.sweep.encoding = ConfigDict(groups)
    config.sweep.seed = ("seed=0", "seed=1", "seed=2")
    return config
