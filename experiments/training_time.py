"""Study: which differences between encodings disappear with longer training?

python launch.py --config=experiments/training_time.py
python launch.py --config=experiments/training_time.py --dry_run        runs, programs, FLOPs, time

The recipe of length_extrapolation with three times the steps and two seeds, for encodings that were behind in that
study within or beyond the training length. A comparison with its results shows which encodings catch up.
"""

from ml_collections import ConfigDict

from configs import base
from experiments.length_extrapolation import SIZES, STEEP_ALIBI, recipe

TIMES = 3  # the number of steps is multiplied by this
ENCODINGS = ("none", "learned", "rope", "kerple", "fire")


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "training_time" if size == "default" else f"training_time_{size}"
    config.question = (
        f"With {TIMES} times the training steps of length_extrapolation, do RoPE and learned positions catch up within "
        "the training length? Does FIRE's loss become flat beyond it? Do the models learn to copy text?"
    )
    config.baseline = "none"
    config.base = recipe(size)
    training = config.base.training
    training.duration = f"{TIMES * int(training.duration.split()[0])} steps"
    config.sweep = ConfigDict()
    config.sweep.encoding = (*(f"encoding={name}" for name in ENCODINGS), STEEP_ALIBI)
    config.sweep.seed = ("seed=0", "seed=1")
    return config
