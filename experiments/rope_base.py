"""How RoPE's base decides what a model reads, and finds again, within and past its training length.

python launch.py --config=experiments/rope_base.py
python launch.py --config=experiments/rope_base.py:size=small        about 30 M parameters, for a GPU or TPU
python launch.py --config=experiments/rope_base.py --dry_run         runs, programs, FLOPs, time

Seven bases from 100 to 10^8, and RoPE on a part of the channels (p-RoPE) as well, at two head widths x 3 seeds: all
runs of a width share one program. Those trained with base 10,000 are also read with every other base, for comparison
with training with it.
"""

from ml_collections import ConfigDict

from configs import base
from experiments.length_extrapolation import SIZES, recipe

BASES = ("1e2", "1e3", "1e4", "1e5", "1e6", "1e7", "1e8")
FRACTIONS = (0.25, 0.5, 0.75)
TRAINED = "1e4"  # read with all other bases too


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "rope_base" if size == "default" else f"rope_base_{size}"
    config.question = (
        "The base of RoPE sets how slowly its slowest pair of channels turns. Which bases read past the training "
        "length, which still find text again there, and does theory tell: the critical dimension and the bound on "
        "extrapolation (Liu et al. 2023), and the base from which B_m, the sum of cos(m theta), is never negative "
        "(Men et al. 2024)?"
    )
    config.baseline = ""
    config.base = recipe(size)
    model = config.base.model
    width, heads = model.head_dim, model.num_heads
    config.sweep = ConfigDict()
    config.sweep.width = ConfigDict(
        {f"heads of {d}": (f"d={d}: {_heads(d, width * heads // d)}",) for d in (width // 2, width)}
    )
    others = ",".join(f"'rebased:to={other}'" for other in BASES if other != TRAINED)
    reread = f" evaluation.scalings=('none',{others})"
    config.sweep.encoding = tuple(
        f"base={value}: encoding=rope encoding.base={value}{reread if value == TRAINED else ''}" for value in BASES
    ) + tuple(f"p={fraction}: encoding=p_rope encoding.fraction={fraction}" for fraction in FRACTIONS)
    config.sweep.seed = ("seed=0", "seed=1", "seed=2")
    return config


def _heads(width: int, count: int) -> str:
    return f"model.head_dim={width} model.num_heads={count} model.num_kv_heads={count}"
