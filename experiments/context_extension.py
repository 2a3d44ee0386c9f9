"""Study: which method to extend RoPE's context needs the least further training?

python launch.py --config=experiments/context_extension.py
python launch.py --config=experiments/context_extension.py:size=small        about 30 M parameters, for a GPU or TPU
python launch.py --config=experiments/context_extension.py --dry_run         runs, programs, FLOPs, time

Three RoPE runs are trained, and evaluated on longer windows with each scaling rule. Each run then continues for a tenth
of its steps on windows four times as long. The continuations keep the frequencies, use position interpolation,
NTK-aware scaling, YaRN or another base, or drop RoPE (DroPE). To show the effect of the further training itself, some
methods are also run with a quarter of the learning rate, and some with five times the steps.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import base
from experiments.length_extrapolation import SIZES, recipe

FACTOR = 4  # the context length is multiplied by this


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "context_extension" if size == "default" else f"context_extension_{size}"
    config.question = (
        f"A model is trained on short windows and evaluated on windows {FACTOR} times as long. For each method to "
        "extend the context, how much is lost without further training, and how much after a tenth of the training "
        "steps on long windows? Does the model copy text from the new distances?"
    )
    config.baseline = "rope"
    config.base = recipe(size)
    training, steps = config.base.training, int(config.base.training.duration.split()[0])
    length, batch = FACTOR * training.length, training.batch_size // FACTOR  # the same number of tokens per step
    # YaRN's published betas are for a training length of 4096. Scaled in proportion to our training length, they split
    # the pairs at the same fractions.
    yarn = f"yarn:factor={FACTOR},beta_fast={32 * training.length / 4096:g},beta_slow={training.length / 4096:g}"
    rules = {
        "PI": f"linear:factor={FACTOR}",
        "NTK": f"ntk:factor={FACTOR}",
        "YaRN": yarn,
        "base 500,000": "rebased:to=500000.0",
    }
    scalings = ",".join(f"'{rule}'" for rule in ("none", *rules.values()))
    config.sweep = ConfigDict(
        {
            "encoding": {"before": (f"rope: encoding=rope evaluation.rope_scalings=({scalings})",)},
            "seed": ("seed=0", "seed=1", "seed=2"),
        }
    )
    ways = {"nothing": "encoding.scaling=none"} | {name: f"encoding.scaling={rule}" for name, rule in rules.items()}

    def further(steps: int, names: Iterable[str], suffix: str = "", more: str = "") -> tuple[str, ...]:
        longer = (
            f"training.length={length} training.batch_size={batch} training.duration='{steps} steps' "
            f"training.warmup='{steps // 10} steps' evaluation.rope_scalings=('none',) {more}"
        )
        own = ways | {"DroPE": f"training.drope='{steps} steps'"}
        return tuple(f"{name}{suffix}: {own[name]} {longer}" for name in names)

    lower = f"optimizer.learning_rate={config.base.optimizer.learning_rate / 4:g}"
    config.continuations = ConfigDict(
        {
            "way": {
                "after a tenth of the training": further(steps // 10, (*ways, "DroPE")),
                "with a quarter of the learning rate": further(
                    steps // 10, ("nothing", "PI", "NTK"), ", a quarter of the rate", lower
                ),
                "after half of the training": further(steps // 2, ("nothing", "PI", "DroPE"), ", half"),
            }
        }
    )
    return config
