"""Study: which positional encodings work beyond the training length?

python launch.py --config=experiments/length_extrapolation.py
python launch.py --config=experiments/length_extrapolation.py:size=smoke        every encoding for 60 steps
python launch.py --config=experiments/length_extrapolation.py:size=small        about 30 M parameters, for a GPU or TPU
python launch.py --config=experiments/length_extrapolation.py --dry_run         runs, programs, FLOPs, time

Fifteen encodings, and ALiBi with steeper slopes, are trained with 3 seeds on windows of 128 tokens and evaluated on up
to 16 times that length. RoPE is also evaluated with the scaling rules that need no training. Runs with the same seed
are trained on the same batches. All runs are evaluated on the same windows.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap

GROUPS = {
    "none, or added to embeddings": ("none", "sinusoidal", "learned"),
    "queries and keys": ("rope", "xpos", "fope", "pope"),
    "logits, by position": ("alibi", "kerple", "sandwich", "t5", "fire"),
    "logits, by content": ("cope", "dape", "fox"),
}
SIZES = ("default", "smoke", "small")


def get_config(argument: str = "") -> ConfigDict:
    size = base.options(argument, size=SIZES)["size"]
    config = ConfigDict()
    config.name = "length_extrapolation" if size == "default" else f"length_extrapolation_{size}"
    config.question = (
        "Language models that differ only in their positional encoding are trained on short windows. How well do they "
        "read windows up to 16 times as long? Do they use the added context? Do they still copy text that is further "
        "back than any distance in training?"
    )
    config.baseline = "none"  # loss differences are relative to this encoding
    config.costs = "experiments/results/benchmarks/encodings.csv"  # from `python -m benchmarks encodings`; "" for none

    config.base = recipe(size)
    config.sweep = ConfigDict()  # the product of both axes: one run for each encoding and seed
    groups = {title: tuple(map(_change, names)) for title, names in GROUPS.items()}
    groups["logits, by position"] += (STEEP_ALIBI,)
    config.sweep.encoding = ConfigDict(groups)
    config.sweep.seed = ("seed=0", "seed=1", "seed=2")
    return config


def recipe(size: str) -> ConfigDict:
    """The base recipe of all runs in a study of extrapolation."""
    config = rope_extrap.get_config(f"size={size},encoding=none")
    training, evaluation = config.training, config.evaluation
    if size == "default":
        config.data.tokenizer, config.data.vocab_size = "bpe", 1024
        training.length, training.batch_size = 128, 8
        training.duration, training.warmup = "2000 steps", "100 steps"
        training.log_every, training.validate_every, training.checkpoint_every = "50 steps", "500 steps", "250 steps"
        evaluation.tail = 32
    L = training.length
    chunk = evaluation.copy_chunk = L // 8
    evaluation.lengths = tuple(int(L * times) for times in (0.5, 1, 2, 4, 8, 16))
    within, past = (L // 4, L // 2, L - 2 * chunk), (2 * L, 4 * L, 8 * L)
    evaluation.copy_distances = within + tuple(length - 2 * chunk for length in past)
    return config


def _change(name: str) -> str:
    """The setting for an encoding. RoPE is also evaluated with other frequencies than in training."""
    if name != "rope":
        return f"encoding={name}"
    return "rope: encoding=rope evaluation.rope_scalings=('none','linear','ntk','dynamic_ntk','yarn','llama3')"


# With H heads, ALiBi's slopes range from 2^(-8/H) to 2^-8. For two heads, these published slopes (1/16 and 1/256) are
# weak.
STEEP_ALIBI = "alibi, steep: encoding=alibi encoding.max_exponent=4"
