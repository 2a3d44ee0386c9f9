"""Study: how does RoPE's base affect loss and copying, within and beyond the training length?

python launch.py --config=experiments/rope_base.py
python launch.py --config=experiments/rope_base.py:size=small        about 30 M parameters, for a GPU or TPU
python launch.py --config=experiments/rope_base.py:heads=wide        only the bases, with wide heads: one program
python launch.py --config=experiments/rope_base.py --dry_run         runs, programs, FLOPs, time

Seven bases from 100 to 10^8 are trained with two head dimensions and 3 seeds. With the larger head dimension, RoPE on a
fraction of the channels (p-RoPE) is also trained. All runs with the same head dimension share one compiled program.
Runs trained with base 10,000 are also evaluated with every other base, for comparison with training with that base.
"""

from ml_collections import ConfigDict

from configs import base
from experiments.length_extrapolation import SIZES, recipe

BASES = ("1e2", "1e3", "1e4", "1e5", "1e6", "1e7", "1e8")
FRACTIONS = (0.25, 0.5, 0.75)
TRAINED = "1e4"  # runs trained with this base are also evaluated with all other bases


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, size=SIZES, heads=("all", "wide"))
    size = chosen["size"]
    config = ConfigDict()
    config.name = "rope_base" if size == "default" else f"rope_base_{size}"
    config.question = (
        "The base of RoPE sets how slowly its slowest pair of channels rotates. Which bases work beyond the training "
        "length, and which still copy text there? Does theory predict it: the critical dimension and the bound on "
        "extrapolation (Liu et al. 2023), and the smallest base for which B_m, the sum of cos(m theta), is never "
        "negative (Men et al. 2024)?"
    )
    config.baseline = ""
    config.base = recipe(size)
    model = config.base.model
    narrow, wide = model.head_dim // 2, model.head_dim
    config.sweep = ConfigDict()
    if chosen["heads"] == "wide":
        config.name += "_wide"
        config.sweep.encoding = _bases(wide, model.num_heads)
    else:
        config.sweep.encoding = ConfigDict(
            {f"heads of {d}": _bases(d, model.num_heads * wide // d) for d in (narrow, wide)}
        )
        config.sweep.encoding[f"part of heads of {wide}"] = tuple(
            f"p={fraction}: encoding=p_rope encoding.fraction={fraction}" for fraction in FRACTIONS
        )
    config.sweep.seed = ("seed=0", "seed=1", "seed=2")
    return config


def _bases(width: int, heads: int) -> tuple[str, ...]:
    others = ",".join(f"'rebased:to={other}'" for other in BASES if other != TRAINED)
    reread = {TRAINED: f" evaluation.rope_scalings=('none',{others})"}
    own = f"model.head_dim={width} model.num_heads={heads} model.num_kv_heads={heads} encoding=rope"
    return tuple(f"d={width} base={base}: {own} encoding.base={base}{reread.get(base, '')}" for base in BASES)
