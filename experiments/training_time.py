"""Which differences between encodings are but a matter of how long they are trained?

python launch.py --config=experiments/training_time.py
python launch.py --config=experiments/training_time.py --dry_run        runs, programs, FLOPs, time

The recipe of length_extrapolation with three times the steps, for encodings that were behind there within the training
length, or past it, two seeds each: set beside the results of that study, it tells who catches up.
"""

from ml_collections import ConfigDict

from configs import base
from experiments.length_extrapolation import SIZES, STEEP_ALIBI, recipe

TIMES = 3  # as many steps
ENCODINGS = ("none", "learned", "rope", "kerple", "fire")


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "training_time" if size == "default" else f"training_time_{size}"
    config.question = (
        f"With {TIMES} times the training of length_extrapolation, do RoPE and learned positions catch up within the "
        "training length, does FIRE become flat past it, and do models learn to find text again?"
    )
    config.baseline = "none"
    config.base = recipe(size)
    training = config.base.training
    training.duration = f"{TIMES * int(training.duration.split()[0])} steps"
    config.sweep = ConfigDict()
    config.sweep.encoding = (*(f"encoding={name}" for name in ENCODINGS), STEEP_ALIBI)
    config.sweep.seed = ("seed=0", "seed=1")
    return config
