"""Study: how does each encoding perform beyond the training length, and what does it cost?

python launch.py --config=experiments/encoding_table.py
python launch.py --config=experiments/encoding_table.py:size=smoke       for 60 steps
python launch.py --config=experiments/encoding_table.py --dry_run        runs, programs, FLOPs, time

All encodings are trained with their defaults, without scaling rules, with one seed. Intervals are over documents.
"""

import itertools

from ml_collections import ConfigDict

from configs import base, rope_extrap
from posenc_jax import encodings

GROUPS = {  # encodings by where they act, and whether their effect depends on the content of tokens
    "none, or added to embeddings": ("none", "sinusoidal", "learned"),
    "queries and keys": (
        *("rope", "p_rope", "hope", "learned_rope", "rope_pp", "xpos", "fope", "pope"),
        *("decoupled_rope", "selective_rope", "carope", "transformer_xl", "grape_m"),
    ),
    "logits, by position": (
        "alibi",
        "hard_alibi",
        "bam",
        "kerple",
        "sandwich",
        "t5",
        "fire",
        "dynamic_bias",
        "fox_fixed",
    ),
    "logits, by content": (
        *("shaw", "deberta", "tapa", "cope", "dape", "dape_v2", "fox", "wall", "path"),
        *("grape_a", "grape_ap", "stick_breaking"),
    ),
}
SIZES = ("default", "smoke", "small", "base")


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "encoding_table" if size == "default" else f"encoding_table_{size}"
    config.question = (
        "Language models that differ only in their positional encoding are trained on the same batches. How does each "
        "perform beyond the training length, and what does it cost?"
    )
    config.baseline = "none"
    config.costs = "experiments/results/benchmarks/encodings.csv"
    config.base = rope_extrap.get_config(f"size={size},encoding=none")
    config.sweep = ConfigDict()
    others = tuple(name for name in encodings.names() if name not in itertools.chain(*GROUPS.values()))
    groups = GROUPS | ({"others": others} if others else {})
    config.sweep.encoding = ConfigDict(
        {title: tuple(f"encoding={name}" for name in names) for title, names in groups.items()}
    )
    config.sweep.seed = ("seed=0",)
    return config
